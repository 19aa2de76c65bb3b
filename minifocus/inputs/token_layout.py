"""The order in which LLaVA and LLaVA-NeXT read a picture: which token of its uncompressed sequence stands where."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """A picture's uncompressed token sequence: `leading` tokens, then each row of an H×W map and perhaps a newline.

    Places are numbers in that sequence; all methods take and return int64 tensors of one dimension.

    thumbnail_width  columns of LLaVA-NeXT's thumbnail among the leading tokens; 0 without one
    num_plain        tokens that LLaVA with a token for every patch would read of the picture
    """

    leading: int
    height: int
    width: int
    newlines: bool
    thumbnail_width: int
    num_plain: int

    @property
    def row_length(self) -> int:
        return self.width + self.newlines

    @property
    def num_tokens(self) -> int:
        return self.leading + self.height * self.row_length

    def of_cells(self, cells: torch.Tensor) -> torch.Tensor:
        """Raster numbers of map cells → their places."""
        width = max(self.width, 1)
        return self.leading + cells // width * self.row_length + cells % width

    def of_newlines(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the map → the places of the newlines after them."""
        return self.leading + rows * self.row_length + self.width

    def cells(self, places: torch.Tensor) -> torch.Tensor:
        """Places → raster numbers of map cells, -1 for leading tokens and newlines."""
        inside = places - self.leading
        row, column = inside // max(self.row_length, 1), inside % max(self.row_length, 1)
        return torch.where((inside >= 0) & (column < self.width), row * self.width + column, -1)

    def unscored(self, places: torch.Tensor) -> torch.Tensor:
        """bool, the tokens that no sampler scores: newlines, and LLaVA-1.5's class token where it is kept."""
        if not self.newlines:
            return places < self.leading
        return (places >= self.leading) & (self.cells(places) < 0)
