"""The visual granularity router (AVG-LLaVA §3.1): it reads a picture at all granularities, and words, and chooses one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

HEADS = 8


def filter_text(thumbnail: torch.Tensor, words: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` words most like the thumbnail, the most alike first: [G, C], [W, C] → [count, C], filled up with zeros.

    How alike is the mean of a word's cosines with the thumbnail's tokens of the finest granularity.
    """
    unit = F.normalize(thumbnail.float(), dim=-1, eps=1e-8).mean(dim=0)  # a mean of cosines is a product with this mean
    # Not as a matrix product, whose rounding would differ from word to word, and with autocast be that of bfloat16.
    alike = (F.normalize(words.float(), dim=-1, eps=1e-8) * unit).sum(dim=-1)
    chosen = words[alike.argsort(descending=True, stable=True)[:count]]
    return F.pad(chosen, (0, 0, 0, count - len(chosen)))


class Router(nn.Module):
    """A transformer layer, an MLP and a voter. Parameter names are those of the public code.

    width       channels C of the decoder, a multiple of 8
    slots       tokens of a view at all granularities, coarse to fine, and behind them those of the filtered words
    choices     granularities
    attention   "tokens": between all of a view's slots, as in the paper; "views": between the views at each slot, as in the
                public code, whose layer is given the axes in another order than it was made for. Its weights expect that
    """

    def __init__(self, width: int, slots: int, choices: int, attention: Literal["tokens", "views"] = "tokens"):
        super().__init__()
        if width % HEADS:
            raise InputError(
                f"sampler: AVG-LLaVA's router expects a decoder of a multiple of {HEADS} channels, got {width}"
            )
        self.attention = attention
        self.merger = nn.TransformerEncoderLayer(width, HEADS, width, dropout=0.1, batch_first=True)
        first, last = nn.Linear(width, width), nn.Linear(width, choices)
        nn.init.kaiming_normal_(first.weight)
        nn.init.kaiming_normal_(last.weight)
        self.router = nn.Sequential(first, nn.GELU(), last)
        self.voter = nn.Parameter(torch.randn(slots, 1))
        self.norm = nn.LayerNorm(choices)

    def forward(self, visual: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """A picture's views at all granularities [T, N, C], filtered words of Q prompts [Q, K, C] → logits [Q, choices]."""
        prompts, views = len(words), len(visual)
        dtype = self.voter.dtype
        x = torch.cat([visual.expand(prompts, -1, -1, -1), words[:, None].expand(-1, views, -1, -1)], dim=2).to(
            dtype
        )  # [Q, T, N + K, C]
        if self.attention == "tokens":
            x = self.merger(x.flatten(0, 1)).unflatten(0, (prompts, views))
        else:
            x = self.merger(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (prompts, -1)).transpose(1, 2)
        votes = torch.einsum("qtnc,n->qtc", self.router(x), self.voter[:, 0])
        return self.norm(votes.mean(dim=1))
