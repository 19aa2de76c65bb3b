"""Floating-point operations of a prompt, two for each multiplication with its addition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from minifocus.loading.config import Config


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
