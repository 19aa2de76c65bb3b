"""LLaVA-NeXT's grid of tiles: the resolution that a picture gets, and the feature map that its tiles are joined to.

The resolutions to choose from are called pinpoints. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..arguments import shown
from ..errors import InputError
from ..projectors.base import Grid


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
    size: tuple[int, int], best: tuple[int, int], image_size: int, grid: Grid
) -> tuple[int, int, int, int]:
    """(top, left, rows, cols): the part of the stitched feature map that shows the picture and not its padding.

    `grid` is a tile's own; the map of resolution `best` has best / image_size of them. A token of several patches stays if one
    of them does. A very flat picture has 0 rows.
    """
    height, width = size
    window, together = grid.window, grid.together
    rows = best[0] // image_size * grid.rows * window  # of patches
    cols = best[1] // image_size * grid.windows_across * window
    top = left = 0
    # The last factor is the shape of a patch: 1 where it is square.
    if width / height > best[1] / best[0]:
        top = (rows - int(round(height * (cols / width) * (grid.rows / grid.windows_across), 7))) // 2
    else:
        left = (cols - int(round(width * (rows / height) * (grid.windows_across / grid.rows), 7))) // 2

    def kept(whole: int, cut: int) -> int:
        """The windows in a row of patches of which `cut` go at both ends."""
        return whole // window - 2 * (cut // window) if whole > 2 * cut else 0

    return top // window, left // window * together, kept(rows, top), kept(cols, left) * together


def num_visual_tokens(size: tuple[int, int], pinpoints: Iterable[tuple[int, int]], image_size: int, grid: Grid) -> int:
    """How many `<image>` places a LLaVA-NeXT picture takes: thumbnail, map, and one newline after each map row."""
    _, _, rows, cols = unpadded_grid(size, select_best_resolution(size, pinpoints), image_size, grid)
    return grid.cells + rows * (cols + 1)


def stitch(
    views: torch.Tensor, size: tuple[int, int], pinpoints: Iterable[tuple[int, int]], image_size: int, grid: Grid
) -> torch.Tensor:
    """The tokens [1 + T, rows · columns, C] of a picture's thumbnail and tiles → the unpadded map [rows, cols, C] of the tiles.

    The map has no newline column: the model adds it. Raises InputError when T does not fit the picture's size.
    """
    best = select_best_resolution(size, pinpoints)
    down, across = best[0] // image_size, best[1] // image_size
    if len(views) != 1 + down * across or views.shape[1] != grid.cells:
        expected = f"1 + {down} * {across} views of {grid.cells} features"
        raise InputError(f"a {size[0]}x{size[1]} picture has {expected}, got {len(views)} views of {views.shape[1]}")
    tiles = views[1:].unflatten(0, (down, across)).unflatten(2, (grid.rows, grid.columns))
    whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    top, left, rows, cols = unpadded_grid(size, best, image_size, grid)
    return whole[top : top + rows, left : left + cols]
