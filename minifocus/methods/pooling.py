"""Average and max pooling ("avgpool", "maxpool"): every k×k window of the map becomes one token.

The bluntest way to shorten a picture, and with training a strong one on pictures without small text. Windows at ragged
edges pool the cells that there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .. import arguments
from ..loading.config import Config
from ..samplers.hooks import BeforeLLM, PictureFeatures, Piece, VisualTokens, Words, leading_tokens, with_newlines
from ..samplers.vision_guided import check_thumbnail


@dataclass(frozen=True)
class PoolingOptions:
    """
    window     side of a window, in cells, 1 to 24
    thumbnail  LLaVA-NeXT's thumbnail tokens: "keep", "compress" (pooled like the map) or "drop"
    """

    window: int = 2
    thumbnail: Literal["keep", "compress", "drop"] = "keep"

    def __post_init__(self) -> None:
        thumbnail = arguments.choice("thumbnail", self.thumbnail, ("keep", "compress", "drop"))
        arguments.settle(self, window=arguments.whole("window", self.window, 1, 24), thumbnail=thumbnail)


class Pooling(BeforeLLM):
    """`how` is "mean" or "max"."""

    def __init__(self, options: PoolingOptions, config: Config, how: Literal["mean", "max"]):
        super().__init__()
        check_thumbnail(options.thumbnail, config.anyres)
        self.options, self.how = options, how

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """[H, W, C] → [⌈H/k⌉, ⌈W/k⌉, C]"""
        window = self.options.window
        if not x.shape[0] or not x.shape[1]:
            return x[::window, ::window]
        planes = x.permute(2, 0, 1)[None]
        if self.how == "max":
            pooled = F.max_pool2d(planes, window, ceil_mode=True)
        else:
            pooled = F.avg_pool2d(planes, window, ceil_mode=True)
        return pooled[0].permute(1, 2, 0)

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        layout, body = picture.layout, self.pool_map(picture.map)
        if self.options.thumbnail == "compress":
            leading = self.pool_map(picture.thumbnail)
        else:
            leading = leading_tokens(picture, 0 if self.options.thumbnail == "drop" else None)
        cells = body[1]
        row = cells // max(layout.width, 1) // self.options.window
        body = (body[0], layout.of_cells(cells), body[2])
        return VisualTokens(*with_newlines(picture, leading, body, row, self.options.window), layout)

    def pool_map(self, x: torch.Tensor) -> Piece:
        """Pool a map [H, W, C]: the tokens, the raster number of the cell where each begins, and the cells that each covers."""
        (height, width), window, pooled = x.shape[:2], self.options.window, self.pool(x)
        rows, columns = (torch.arange(count, device=x.device) * window for count in pooled.shape[:2])
        covered = [(height - rows).clamp(max=window), (width - columns).clamp(max=window)]
        extent = torch.stack(torch.meshgrid(*covered, indexing="ij"), dim=-1)
        return pooled.flatten(0, 1), (rows[:, None] * width + columns).flatten(), extent.flatten(0, 1)
