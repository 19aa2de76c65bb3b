"""The Llama decoder (Llama, Vicuna, Mistral): rotary positions, grouped-query attention, SwiGLU, and its KV cache.

Parameter names are Hugging Face's. Shapes: B rows, S tokens, T keys, H query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from .activations import ACTIVATIONS, times
from .attention_kernels import no_plans
from .loading.config import RopeConfig, TextConfig
from .rows import Rows


def rope_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """Angle per position of each pair of channels, float32 [D / 2], with `linear` or `llama3` scaling applied."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        original = rope.original_max_position_embeddings
        blend = (original / wavelengths - low) / (high - low)
        blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
        frequencies = torch.where(wavelengths > original / low, frequencies / rope.factor, frequencies)
        between = (wavelengths <= original / low) & (wavelengths >= original / high)
        return torch.where(between, blended, frequencies)
    return frequencies


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B, S] → cos, sin [B, 1, S, D / 2]; angles in float32, results in `dtype`."""
    frequencies = rope_frequencies(rope, head_dim, positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, H, S, D]; channel c is paired with c + D/2 (not with its neighbour)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


QUERY_BLOCK = 256


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q [B, H, S, D], k and v [B, Hkv, T, D] → [B, H, S, D]; the queries are those of the last S keys.

    `mask` [B, 1, S, T] is True where a query may look, which is at no later key; None means causal, where S = T, and
    everything where one token follows others.
    """
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:
        # The queries that share a key head become the rows of one product: keys are read once and never repeated.
        grouped = q.reshape(q.shape[0], k.shape[1], groups, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # No query looks at a later key, which a kernel that is given a mask does not know: block by block it need not.
    ahead, count = k.shape[2] - q.shape[2], q.shape[2]
    blocks = []
    for begin in range(0, count, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, count)
        own, seen = slice(begin, end), slice(0, ahead + end)
        blocks.append(F.scaled_dot_product_attention(q[:, :, own], k[:, :, seen], v[:, :, seen], mask[:, :, own, seen]))
    return torch.cat(blocks, dim=2)


class LayerCache:
    """Keys and values of one layer, [B, Hkv, T, D], with room to grow; rows may be padded on the left."""

    def __init__(self, room: int = 128) -> None:
        self.length, self._room = 0, room
        self._keys = self._values = torch.empty(0)
        self._valid: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add S tokens; `valid` [B, S] marks padding among them (None: there is none)."""
        end = self.length + k.shape[2]
        if self.length == 0 or end > self._keys.shape[2]:
            # Behind a prompt little: an eighth of a long one would be more than most answers take.
            room = self._room if self.length == 0 else max(128, end // 8)
            shape = (*k.shape[:2], end + room, k.shape[3])
            keys, values = k.new_empty(shape), v.new_empty(shape)
            if self.length:
                keys[:, :, : self.length], values[:, :, : self.length] = self.keys, self.values
            self._keys, self._values = keys, values
        self._keys[:, :, self.length : end], self._values[:, :, self.length : end] = k, v
        if self.length == 0:
            self._valid = valid
        elif self._valid is not None:
            self._valid = torch.cat([self._valid, self._valid.new_ones(k.shape[0], k.shape[2])], dim=1)
        self.length = end

    @property
    def keys(self) -> torch.Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        return self._values[:, :, : self.length]

    @property
    def mask(self) -> torch.Tensor | None:
        """[B, 1, 1, T] for a token that may look at the whole cache; None when no row is padded."""
        return None if self._valid is None else self._valid[:, None, None]


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight: the order in which Llama rounds."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[B, S, heads × D] → [B, heads, S, D]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """x [B, S, C] → [B, S, C], or [B, last, C]. With a cache, its tokens come before x and x is added to it."""
        wanted = slice(None) if last is None else slice(-last, None)
        q = rotate(self.split_heads(self.q_proj(x[:, wanted])), cos[:, :, wanted], sin[:, :, wanted])
        k = rotate(self.split_heads(self.k_proj(x)), cos, sin)
        v = self.split_heads(self.v_proj(x))
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves float32, which attention would cast block by block
        if cache is not None:
            cache.append(k, v, valid)
            if cache.length > k.shape[2]:
                k, v, mask = cache.keys, cache.values, cache.mask
        if mask is not None:
            mask = mask[:, :, wanted] if mask.shape[2] > 1 else mask
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(times(self.act(self.gate_proj(x)), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """x [B, S, C] → the same, or of its `last` tokens only: those whose output is read (1, or any with a mask)."""
        wanted = x if last is None else x[:, -last:]
        x = wanted + self.self_attn(self.input_layernorm(x), cos, sin, mask, valid, cache, last)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embeddings, decoder layers and the last norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # gradient checkpointing: layers run again in the backward pass, and keep little for it

    def decoder_layers(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.layers)  # nn.ModuleList forgets what it holds

    def rope(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_tables(self.config.rope, self.config.head_dim, positions, dtype)

    @no_plans()
    def prefill(
        self,
        rows: Rows,
        caches: list[LayerCache] | None = None,
        before_layer: Callable[[int, DecoderLayer, Rows], Rows] | None = None,
        last: int | None = None,
    ) -> Rows:
        """All layers over whole rows. `before_layer` may drop tokens: later layers, and their caches, see the rest.

        With `last`, the hidden states that come back are those of the last so many columns, [B, last, C]: the last layer
        then computes no others. More than one of them take rows with a mask.
        """
        x, valid, mask = rows.hidden, rows.valid, rows.attention_mask()
        cos, sin = self.rope(rows.positions, x.dtype)
        for index, layer in enumerate(self.decoder_layers()):
            if before_layer is not None:
                rows = rows.with_hidden(x)
                dropped = before_layer(index, layer, rows)
                if dropped is not rows:
                    rows = dropped
                    x, valid, mask = rows.hidden, rows.valid, rows.attention_mask()
                    cos, sin = self.rope(rows.positions, x.dtype)
            wanted = last if index == len(self.layers) - 1 else None
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, mask, None, None, wanted, use_reentrant=False)
            else:
                padded = None if mask is None else valid
                x = layer(x, cos, sin, mask, padded, caches[index] if caches is not None else None, wanted)
        return rows.with_hidden(self.norm(x))

    @no_plans()
    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[LayerCache]) -> torch.Tensor:
        """One more token for each row: token_ids and positions [B] → hidden states [B, C]."""
        x = self.embed_tokens(token_ids[:, None])
        cos, sin = self.rope(positions[:, None], x.dtype)
        for layer, cache in zip(self.decoder_layers(), caches, strict=True):
            x = layer(x, cos, sin, cache=cache)
        return self.norm(x)[:, 0]


class Llama(nn.Module):
    """The decoder with its output head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
