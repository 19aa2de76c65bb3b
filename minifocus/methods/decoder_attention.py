"""What the methods inside the language model share: tokens to choose from, and attention weights.

Weights are computed for the few queries that a method asks for (or block by block), beside the layer's own fused
attention; no layer's whole attention is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch

from .. import arguments
from ..errors import InputError
from ..llama import DecoderLayer, rope_tables, rotate
from ..loading.config import TextConfig
from ..ops.checks import wide
from ..rows import Rows
from ..samplers.hooks import Context, Selection, VisualTokens


def visual_tokens_of(context: Context, rows: Rows, row: int, column: int) -> VisualTokens:
    """The picture that a visual token belongs to, as it entered the decoder."""
    return context.pictures[row][int(rows.picture[row, column])]


def num_entered(visual: VisualTokens) -> int:
    """The number of a picture's tokens that entered the decoder, not counting those that no sampler scores."""
    return int((~visual.layout.unscored(visual.source)).sum())


def newlines_of(rows: Rows, row: int, column: int) -> int:
    """The number of tokens that `rows.newline` marks in the picture of the token at `column`."""
    own = rows.newline[row] & rows.valid[row] & (rows.picture[row] == rows.picture[row, column])
    return int(own.sum())


def keep_where(rows: Rows, choose: Callable[[int, torch.Tensor], torch.Tensor], scores: torch.Tensor) -> Selection:
    """A selection by `choose`: (row, columns of a picture's tokens) → which of them stay, bool. `scores` [B, S]."""
    scored = (rows.picture >= 0) & ~rows.newline & rows.valid
    kept = rows.valid & ~scored
    for row, tokens in rows.pictures():
        kept[row, tokens[choose(row, tokens)]] = True
    return Selection(kept, scores.float().where(scored, torch.nan))


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool [n], the `count` largest of scores [n]; of equal ones the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept


def queries_and_keys(
    layer: DecoderLayer, rows: Rows, config: TextConfig, first_query: int, rope: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, S - first_query, D], scaled, and k [B, H, S, D] of a layer before it is run, in float32."""
    attention, normed = layer.self_attn, layer.input_layernorm(rows.hidden)
    q = attention.split_heads(attention.q_proj(normed[:, first_query:]))
    k = attention.split_heads(attention.k_proj(normed))
    if rope:
        cos, sin = rope_tables(config.rope, config.head_dim, rows.positions, q.dtype)
        q, k = rotate(q, cos[:, :, first_query:], sin[:, :, first_query:]), rotate(k, cos, sin)
    q, k = q.to(wide(q.dtype)) * config.head_dim**-0.5, k.to(wide(k.dtype))
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def last_query(layer: DecoderLayer, rows: Rows, config: TextConfig) -> torch.Tensor:
    """The attention of each row's last token in a layer: softmax over all keys, mean over heads, [B, S]."""
    q, k = queries_and_keys(layer, rows, config, rows.valid.shape[1] - 1)
    logits = (q @ k.transpose(2, 3)).masked_fill(~rows.valid[:, None, None], -torch.inf)
    return logits.softmax(dim=-1).mean(dim=1)[:, 0]


def layers_of(name: str, given: object, default: tuple[int, ...], depth: int, least: int = 0) -> tuple[int, ...]:
    """An option that lists layers from `least` on in ascending order (one number is a list of one), or `default`.

    Raises InputError.
    """
    layers = default if given is None else (given,) if isinstance(given, Integral) else given
    if not isinstance(layers, tuple | list) or not layers:
        raise InputError(f"{name}: expected layers in ascending order, got {arguments.shown(given)}")
    checked = [arguments.whole(name, layer, least, depth - 1) for layer in layers]
    if sorted(set(checked)) != checked:
        raise InputError(f"{name}: expected layers in ascending order, got {arguments.shown(given)}")
    return tuple(checked)
