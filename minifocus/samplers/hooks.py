"""The two places where a method may act: before the language model, and inside it.

A method implements one of the two interfaces below and is listed in `minifocus/methods/__init__.py`; nothing else in the
package knows which methods there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..inputs.token_layout import Layout
from ..llama import DecoderLayer
from ..ops import gather_tokens
from ..rows import Rows
from ..vision import VisionTower


@dataclass(frozen=True)
class PictureFeatures:
    """One picture after the projector.

    map        [H, W, C]  the stitched, unpadded feature map X (LLaVA-1.5: the only map); H or W may be 0
    thumbnail  [g, g, C]  the global view's map X_g (LLaVA-1.5: the same as `map`)
    leading    [L, C]     tokens that go before the map: LLaVA-NeXT's thumbnail; a kept CLS token; or none
    newline    [C]        the learned token after each row of the map; None for LLaVA-1.5
    cues       (map's [H, W, K], thumbnail's [g, g, K]), what the sampler took from the vision tower (`BeforeLLM.cues`)
    views      [T, g, g, C]  the maps of thumbnail and tiles before they are stitched; g × g stands for `Config.grid`
    size       (h, w) of the picture, in pixels
    num_plain  tokens of it that LLaVA reads with a token for every patch (`Layout.num_plain`)
    """

    map: torch.Tensor
    thumbnail: torch.Tensor
    leading: torch.Tensor
    newline: torch.Tensor | None
    cues: tuple[torch.Tensor, torch.Tensor] | None
    views: torch.Tensor
    size: tuple[int, int]
    num_plain: int

    @property
    def layout(self) -> Layout:
        (height, width), newlines = self.map.shape[:2], self.newline is not None
        across = self.thumbnail.shape[1] if newlines else 0
        return Layout(len(self.leading), height, width, newlines, across, self.num_plain)


@dataclass(frozen=True)
class VisualTokens:
    """What the language model reads of one picture.

    tokens   [n, C]
    source   [n]      int64, the place of each token in the picture's uncompressed sequence (a pooled token: that of
                      its window's first cell); no two are equal
    extent   [n, 2]   int64, the map cells that a token stands for, down and across from its source: (1, 1) if not pooled
    layout            of that uncompressed sequence
    choice   [Rh, Rw] int64, the branch chosen per region, for those samplers that choose one
    logits   [R, S]   the selector's logits, for the balance loss; in training only
    begin             the column of input_ids where the picture's placeholders begin, once it is embedded
    """

    tokens: torch.Tensor
    source: torch.Tensor
    extent: torch.Tensor
    layout: Layout
    choice: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    begin: int = 0


@dataclass(frozen=True)
class Words:
    """Word embeddings of a prompt, before any layer.

    question  [Q, C]  the user's own words; Q may be 0
    prompt    [P, C]  all text, the question and what the template adds among it, in order
    """

    question: torch.Tensor
    prompt: torch.Tensor


class BeforeLLM(nn.Module, ABC):
    """From a picture's feature maps to the tokens that the language model reads.

    tower_blocks  the blocks of the vision tower, from 0, whose inputs `cues` wants to see
    """

    tower_blocks: Sequence[int] = ()

    def cues(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        """Cues from the vision tower for the patches of all N tiles: [N, g², K], or None.

        `states` are what the tower's forward gave, those of `tower_blocks` among them.
        """
        return None

    @abstractmethod
    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        """`text` is that of the picture's row."""


@dataclass(frozen=True)
class Selection:
    """Which tokens stay.

    kept    [B, S]  bool
    scores  [B, S]  float32, NaN where none was given
    """

    kept: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class Context:
    """What an inside-LLM sampler is told besides the rows before a layer.

    pictures  per row, per picture: its tokens as they entered the decoder
    previous  the layer that has just been run and its input, of the same tokens; None before the first
    """

    pictures: Sequence[Sequence[VisualTokens]]
    previous: tuple[DecoderLayer, Rows] | None = None


class InsideLLM(Protocol):
    """From the hidden states at some layer to the tokens that later layers see. Called at prefill only."""

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        """Called before every layer with its hidden states, if there are pictures; None keeps everything.

        Text, and whatever is not a visual token, must stay; each row's last token stays whatever is said of it. The
        layer's own norm and projections are on `layer`.
        """
        ...


@dataclass
class Samplers:
    """A method: what it does before the language model and inside it; either may be None."""

    before: BeforeLLM | None = None
    inside: InsideLLM | None = None


# Tokens [n, C], the place of each [n] int64, and the map cells that it covers [n, 2] int64.
Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def uncompressed(picture: PictureFeatures) -> VisualTokens:
    """Every token of the picture, as LLaVA and LLaVA-NeXT have them."""
    layout = picture.layout
    cells = torch.arange(layout.height * layout.width, device=picture.map.device)
    body = (picture.map.flatten(0, 1), layout.of_cells(cells), cells.new_ones(len(cells), 2))
    return VisualTokens(*with_newlines(picture, leading_tokens(picture), body, cells // max(layout.width, 1)), layout)


def leading_tokens(picture: PictureFeatures, count: int | None = None) -> Piece:
    """The first `count` of the tokens that go before the map, or all of them."""
    tokens = picture.leading[:count]
    places = torch.arange(len(tokens), device=tokens.device)
    return tokens, places, places.new_ones(len(tokens), 2)


def with_newlines(picture: PictureFeatures, leading: Piece, body: Piece, row: torch.Tensor, window: int = 1) -> Piece:
    """Join `leading` and the map's tokens `body`, and put a newline after each row of the map.

    `row` [n] int64 says which row of `window` × `window` windows a token of `body` is in; it never falls. A newline takes
    the place of the one after the last row of cells in its windows.
    """
    tokens, _, extent = body
    if picture.newline is None:
        return tuple(map(torch.cat, zip(leading, body, strict=True)))  # type: ignore[return-value]
    rows = torch.arange(-(-picture.layout.height // window), device=row.device)
    ends = picture.layout.of_newlines(((rows + 1) * window).clamp(max=picture.layout.height) - 1)
    newline = picture.newline.to(tokens.dtype).expand(len(rows), -1)
    columns = zip(leading, body, (newline, ends, extent.new_ones(len(rows), 2)), strict=True)
    # A stable sort by row puts every newline behind the tokens of its row, and changes no other order.
    order = torch.cat([row.new_full((len(leading[0]),), -1), row, rows]).argsort(stable=True)
    return tuple(gather_tokens([torch.cat(column) for column in columns], order))  # type: ignore[return-value]
