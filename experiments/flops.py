"""Floating-point operations of a prompt, two for each multiplication with its addition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from minifocus.avg_llava.sampler import AVGLLaVA, new_router
from minifocus.loading.config import Config
from minifocus.loading.weights import without_values
from minifocus.samplers.hooks import BeforeLLM


def decoder_flops(config: Config, layer_tokens: Sequence[int]) -> int:
    """Of the decoder's layers, each over its own number of tokens n, and of one row of the output head.

    A layer takes 2·n·(weights) for its projections and 2·n²·(width of the queries) for each of QKᵀ and its product with
    V: the whole square, as the papers count it, although causal kernels skip half.
    """
    text = config.text
    width, queries = text.hidden_size, text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    weights = width * (2 * queries + 2 * keys) + 3 * width * text.intermediate_size
    return sum(2 * n * weights + 4 * n * n * queries for n in layer_tokens) + 2 * width * text.vocab_size


def vision_flops(config: Config, tiles: int) -> int:
    """Of the vision tower, as far as it is run, and of the projector."""
    vision, tokens = config.vision, config.vision.grid**2 + 1
    width, blocks = vision.hidden_size, max(config.feature_layers)
    block = 2 * tokens * (4 * width * width + 2 * width * vision.intermediate_size) + 4 * tokens * tokens * width
    patches = 2 * vision.grid**2 * 3 * vision.patch_size**2 * width
    with torch.device("meta"), FlopCounterMode(display=False) as projector:
        config.projector.build(config.ends)(torch.empty(1, vision.grid**2, width * len(config.feature_layers)))
    return tiles * (blocks * block + patches + projector.get_total_flops())


def router_flops(sampler: BeforeLLM | None, tiles: int) -> int:
    """Of AVG-LLaVA's router, where it chooses: of all views at all granularities and the filtered words. Else 0."""
    if not isinstance(sampler, AVGLLaVA) or sampler.router is None or sampler.forced is not None:
        return 0
    width, slots = sampler.config.text.hidden_size, sum(sampler.granularities)
    router = without_values(
        lambda: new_router(sampler.options, sampler.config)
    ).train()  # the kernels of answers are not counted
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        router(torch.empty(tiles, slots, width), torch.empty(1, sampler.options.filtered_text, width))
    return counter.get_total_flops()
