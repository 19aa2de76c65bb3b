"""LLaVA-NeXT's grid of tiles: the resolution that a picture gets, and the feature map that its tiles are joined to.

The resolutions to choose from are called pinpoints. Sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..arguments import shown
from ..errors import InputError


def select_best_resolution(size: tuple[int, int], pinpoints: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The pinpoint that keeps most of the picture's pixels. Of several, the one with the least padding; then the first."""
    height, width = size
    pinpoints = list(pinpoints)
    if height < 1 or width < 1 or not pinpoints:
        raise InputError(
            f"expected a picture of at least 1x1 and a grid pinpoint, got {height}x{width} and {shown(pinpoints)}"
        )

    def fit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=fit)
    return best[0], best[1]


def unpadded_grid(
    size: tuple[int, int], best: tuple[int, int], image_size: int, patches_per_side: int
) -> tuple[int, int, int, int]:
    """(top, left, rows, cols): the part of the stitched feature map that shows the picture and not its padding.

    The map of resolution `best` has best / image_size * patches_per_side cells a side. A very flat picture has 0 rows.
    """
    height, width = size
    rows, cols = (edge // image_size * patches_per_side for edge in best)
    if width / height > cols / rows:
        top = (rows - int(round(height * (cols / width), 7))) // 2
        return top, 0, rows - 2 * top, cols
    left = (cols - int(round(width * (rows / height), 7))) // 2
    return 0, left, rows, cols - 2 * left


def num_visual_tokens(
    size: tuple[int, int], pinpoints: Iterable[tuple[int, int]], image_size: int, patch_size: int
) -> int:
    """How many `<image>` places a LLaVA-NeXT picture takes: thumbnail, map, and one newline after each map row."""
    side = image_size // patch_size
    _, _, rows, cols = unpadded_grid(size, select_best_resolution(size, pinpoints), image_size, side)
    return side * side + rows * (cols + 1)


def stitch(
    features: torch.Tensor, size: tuple[int, int], pinpoints: Iterable[tuple[int, int]], image_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [1 + T, g * g, C] of a picture's views → thumbnail [g * g, C] and unpadded map [rows, cols, C].

    The map has no newline column: the model adds it. Raises InputError when T does not fit the picture's size.
    """
    best = select_best_resolution(size, pinpoints)
    tile_rows, tile_cols = best[0] // image_size, best[1] // image_size
    views, cells, channels = features.shape
    side = math.isqrt(cells)
    if side * side != cells or views != 1 + tile_rows * tile_cols:
        expected = f"1 + {tile_rows} * {tile_cols} views of a square number of features"
        raise InputError(f"a {size[0]}x{size[1]} picture has {expected}, got {views} views of {cells}")
    grid = features[1:].reshape(tile_rows, tile_cols, side, side, channels)
    whole = grid.transpose(1, 2).reshape(tile_rows * side, tile_cols * side, channels)
    top, left, rows, cols = unpadded_grid(size, best, image_size, side)
    return features[0], whole[top : top + rows, left : left + cols]
