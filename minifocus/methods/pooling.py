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
from ..errors import InputError
from ..loading.config import Config
from ..samplers.hooks import BeforeLLM, Layout, PictureFeatures, VisualTokens


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
        if not config.anyres and options.thumbnail != "keep":
            raise InputError(f"thumbnail: LLaVA-1.5 has no thumbnail to {options.thumbnail}")
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

    def forward(self, picture: PictureFeatures, text: torch.Tensor) -> VisualTokens:
        layout, window = picture.layout, self.options.window
        parts = [self._leading(picture)]
        pooled = self.pool(picture.map)
        for row, tokens in enumerate(pooled):
            cells = row * window * layout.width + torch.arange(len(tokens), device=tokens.device) * window
            source, extent = layout.of_cells(cells), _extents(layout, row * window, len(tokens), window, tokens.device)
            parts.append((tokens, source, extent, torch.zeros_like(source, dtype=torch.bool)))
            if picture.newline is not None:
                place = source.new_tensor([layout.of_newline(min((row + 1) * window, layout.height) - 1)])
                parts.append((picture.newline[None].to(tokens.dtype), place, place.new_ones(1, 2), place >= 0))
        tokens, source, extent, newline = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return VisualTokens(tokens, source, newline, extent, layout)

    def _leading(self, picture: PictureFeatures) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens, source, extent, newline of what goes before the map."""
        tokens, device = picture.leading, picture.leading.device
        source = torch.arange(len(tokens), device=device)
        extent = source.new_ones(len(tokens), 2)
        if self.options.thumbnail == "drop":
            tokens, source, extent = tokens[:0], source[:0], extent[:0]
        elif self.options.thumbnail == "compress":
            side, window = picture.thumbnail.shape[0], self.options.window
            small, own = self.pool(picture.thumbnail), Layout(0, side, side, False)
            down, across = small.shape[:2]
            rows, cols = torch.arange(down, device=device) * window, torch.arange(across, device=device) * window
            tokens, source = small.flatten(0, 1), (rows[:, None] * side + cols).flatten()
            extent = torch.cat([_extents(own, int(row), across, window, device) for row in rows])
        return tokens, source, extent, torch.zeros_like(source, dtype=torch.bool)


def _extents(layout: Layout, row: int, count: int, window: int, device: torch.device) -> torch.Tensor:
    """[count, 2], the cells of the windows that begin in a row of the map."""
    across = (layout.width - torch.arange(count, device=device) * window).clamp(max=window)
    return torch.stack([torch.full_like(across, min(window, layout.height - row)), across], dim=1)
