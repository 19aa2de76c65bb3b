"""The two places where a sampler may act: before the language model, and inside it.

A method implements one of the two interfaces below and is listed in `samplers/__init__.py`; nothing else in the
package knows which methods there are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..llama import DecoderLayer
from ..rows import Rows
from ..vision import Block


@dataclass(frozen=True)
class Layout:
    """A picture's uncompressed token sequence: `leading` tokens, then each row of an H×W map and perhaps a newline."""

    leading: int
    height: int
    width: int
    newlines: bool

    @property
    def row_length(self) -> int:
        return self.width + self.newlines

    @property
    def num_tokens(self) -> int:
        return self.leading + self.height * self.row_length

    def of_cells(self, cells: torch.Tensor) -> torch.Tensor:
        """Raster numbers of map cells → places in the sequence."""
        width = max(self.width, 1)
        return self.leading + cells // width * self.row_length + cells % width

    def of_newline(self, row: int) -> int:
        """The place of the newline after a row of the map."""
        return self.leading + row * self.row_length + self.width

    def cells(self, places: torch.Tensor) -> torch.Tensor:
        """Places in the sequence → raster numbers of map cells, -1 for leading tokens and newlines."""
        inside = places - self.leading
        row, column = inside // max(self.row_length, 1), inside % max(self.row_length, 1)
        return torch.where((inside >= 0) & (column < self.width), row * self.width + column, -1)

    def coordinates(self, places: torch.Tensor) -> torch.Tensor:
        """Places in the sequence → [n, 2], (row, column) on the map, or on the thumbnail among the leading tokens; -1
        for newlines and for leading tokens that are no thumbnail."""
        cells, width = self.cells(places), max(self.width, 1)
        side = math.isqrt(self.leading) if self.newlines else 0
        on_map = torch.stack([cells // width, cells % width], dim=-1).where(cells[:, None] >= 0, -1)
        if not side:
            return on_map
        on_thumbnail = torch.stack([places // side, places % side], dim=-1)
        return on_thumbnail.where((places < self.leading)[:, None], on_map)


@dataclass(frozen=True)
class PictureFeatures:
    """One picture after the projector.

    map        [H, W, C]  the stitched, unpadded feature map X (LLaVA-1.5: the only map); H or W may be 0
    thumbnail  [g, g, C]  the global view's map X_g (LLaVA-1.5: the same as `map`)
    leading    [L, C]     tokens that go before the map: LLaVA-NeXT's thumbnail; a kept CLS token; or none
    newline    [C]        the learned token after each row of the map; None for LLaVA-1.5
    tile       [H, W]     int64, which of the picture's tiles a cell is from: from 1 on; LLaVA-1.5: 0. None: all are 0
    cues       (map's [H, W, K], thumbnail's [g, g, K]), what the sampler took from the vision tower (`BeforeLLM.look`)
    """

    map: torch.Tensor
    thumbnail: torch.Tensor
    leading: torch.Tensor
    newline: torch.Tensor | None
    tile: torch.Tensor | None = None
    cues: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def layout(self) -> Layout:
        return Layout(len(self.leading), self.map.shape[0], self.map.shape[1], self.newline is not None)


@dataclass(frozen=True)
class VisualTokens:
    """What the language model reads of one picture.

    tokens   [n, C]
    source   [n]      int64, the place of each token in the picture's uncompressed sequence (a pooled token: that of
                      its window's first cell); no two are equal
    newline  [n]      bool
    extent   [n, 2]   int64, the map cells that a token stands for, down and across from its source: (1, 1) if not pooled
    layout            of that uncompressed sequence
    choice   [Rh, Rw] int64, the branch chosen per region, for those samplers that choose one
    logits   [R, S]   the selector's logits, for the balance loss; in training only
    """

    tokens: torch.Tensor
    source: torch.Tensor
    newline: torch.Tensor
    extent: torch.Tensor
    layout: Layout
    choice: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class BeforeLLM(nn.Module, ABC):
    """From a picture's feature maps to the tokens that the language model reads."""

    def look(self, index: int, block: Block, x: torch.Tensor) -> torch.Tensor | None:
        """What to take from the vision tower's block `index` and its input x [N, 1 + g², C]: [N, g², K], or None.

        Called before every block that is run, and for the next one if there is one. What several blocks give is joined.
        """
        return None

    @abstractmethod
    def forward(self, picture: PictureFeatures, text: torch.Tensor) -> VisualTokens:
        """`text` [T, C]: the embeddings of the row's instruction tokens (T may be 0)."""


@dataclass(frozen=True)
class Selection:
    """Which tokens stay.

    kept    [B, S]  bool
    scores  [B, S]  float32, NaN where none was given
    after   whether the others leave after the layer that it was called for, instead of before it
    """

    kept: torch.Tensor
    scores: torch.Tensor
    after: bool = False


class InsideLLM(Protocol):
    """From the hidden states at some layer to the tokens that later layers see. Called at prefill only."""

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows) -> Selection | None:
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


def uncompressed(picture: PictureFeatures) -> VisualTokens:
    """Every token of the picture, as LLaVA and LLaVA-NeXT have them."""
    layout, rows = picture.layout, picture.map
    newline = torch.zeros(layout.height, layout.row_length, dtype=torch.bool, device=rows.device)
    if picture.newline is not None:
        rows = torch.cat([rows, picture.newline.to(rows.dtype).expand(layout.height, 1, -1)], dim=1)
        newline[:, layout.width :] = True
    tokens = torch.cat([picture.leading, rows.flatten(0, 1)])
    newline = torch.cat([newline.new_zeros(layout.leading), newline.flatten()])
    source = torch.arange(len(tokens), device=tokens.device)
    return VisualTokens(tokens, source, newline, source.new_ones(len(tokens), 2), layout)
