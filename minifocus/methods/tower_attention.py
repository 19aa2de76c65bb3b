"""Attention weights of the vision tower, for samplers. They norm and project a block's input once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from .. import arguments
from ..errors import InputError
from ..loading.config import Config
from ..ops.checks import wide
from ..vision import Block, VisionTower


def block_and_input(tower: VisionTower, states: Mapping[int, torch.Tensor], index: int) -> tuple[Block, torch.Tensor]:
    """A block of the tower, from 0, and its input [N, 1 + g², C]."""
    return cast(Block, tower.encoder.layers[index]), states[index]


def queries_and_keys(block: Block, x: torch.Tensor, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's input [N, 1 + g², C] → q of some of its tokens [N, H, Q, D] (scaled) and k [N, H, 1 + g², D], float32."""
    attention, normed = block.self_attn, block.layer_norm1(x)
    q = attention.split_heads(attention.q_proj(normed[:, queries]))
    k = attention.split_heads(attention.k_proj(normed))
    return q.to(wide(q.dtype)) * q.shape[-1] ** -0.5, k.to(wide(k.dtype))


def class_attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The class token's attention to the patches, mean over heads: [N, 1 + g², C] → [N, g², 1]."""
    q, k = queries_and_keys(block, x, slice(0, 1))
    return (q @ k.transpose(2, 3)).softmax(dim=-1).mean(dim=1)[:, 0, 1:, None]


def last_block(config: Config) -> int:
    """The last block whose output the model reads."""
    return max(config.feature_layers) - 1


def reachable_block(config: Config) -> int:
    """The last block whose input is computed: the first that is not run, where the tower has one."""
    return min(max(config.feature_layers), config.vision.num_hidden_layers - 1)


def check_block(config: Config, given: int | None, default: int) -> int:
    """The option `block`, or `default`. Raises InputError for a block that the tower does not reach."""
    if max(config.feature_layers) < 1:
        raise InputError(
            "sampler: this model's vision features come from before its first block, which has no attention"
        )
    return arguments.whole("block", default if given is None else given, 0, reachable_block(config))
