"""The patches of the feature map that show each thing of a scene, in tiles of 112 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..inputs.anyres import select_best_resolution, unpadded_grid
from ..projectors import Grid
from .scene import MOST_GLYPHS, PINPOINTS, TILE, Box, Scene

PATCH = 14
GRID = TILE // PATCH


@dataclass(frozen=True)
class View:
    """What one 112-pixel tile shows of a scene: the scene's pixel p is at p · scale + offset in the tile, as (x, y)."""

    scale: tuple[float, float]
    offset: tuple[float, float]
    whole: bool  # whether this is the thumbnail, which has everything in it, but text too small to read

    def boxes(self, boxes: list[Box]) -> np.ndarray:
        """Boxes of the scene → float [n, 4] in this view."""
        return np.array(boxes, float).reshape(-1, 4) * np.tile(self.scale, 2) + np.tile(self.offset, 2)


def patch_cover(boxes: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Share of each of rows x cols patches that each box [n, 4] of a view covers: float [n, rows, cols]."""

    def shared(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
        edges = np.arange(count) * PATCH
        return (np.minimum(high[:, None], edges + PATCH) - np.maximum(low[:, None], edges)).clip(0)

    tall, wide = shared(boxes[:, 1], boxes[:, 3], rows), shared(boxes[:, 0], boxes[:, 2], cols)
    return tall[:, :, None] * wide[:, None, :] / PATCH**2


def scene_geometry(size: tuple[int, int]) -> tuple[View, tuple[int, int]]:
    """A picture of (h, w) → where its pixels are on the canvas that is cut into tiles, and the canvas' (h, w)."""
    height, width = size
    canvas = select_best_resolution(size, PINPOINTS)
    scale = min(canvas[0] / height, canvas[1] / width)
    offset = ((canvas[1] - width * scale) / 2, (canvas[0] - height * scale) / 2)
    return View((scale, scale), offset, whole=False), canvas


@dataclass(frozen=True)
class Places:
    """Where a scene's things are in its sequence of N uncompressed tokens: the thumbnail's, then the map's row by row.

    things      [scene's objects, N] bool, the patches that show each
    newline     [N] bool, the tokens that end the map's rows
    glyphs      [scene's objects, 4] int64, the token with the middle of each digit or letter of its text (0: none)
    grid        (rows, columns) of the map
    """

    things: np.ndarray
    newline: np.ndarray
    glyphs: np.ndarray
    grid: tuple[int, int]

    @property
    def foreground(self) -> np.ndarray:
        """[N] bool, the patches that show some thing."""
        return np.asarray(self.things.any(axis=0))


def locate(scene: Scene) -> Places:
    width, height = scene.image.size
    boxes = [thing.box for thing in scene.objects]
    thumbnail = patch_cover(View((TILE / width, TILE / height), (0, 0), True).boxes(boxes), GRID, GRID)
    view, canvas = scene_geometry((height, width))
    top, left, rows, cols = unpadded_grid((height, width), canvas, TILE, Grid(GRID, GRID))
    whole = patch_cover(view.boxes(boxes), canvas[0] // PATCH, canvas[1] // PATCH)
    cells = np.pad(whole[:, top : top + rows, left : left + cols], ((0, 0), (0, 0), (0, 1)))
    shares = [thumbnail.reshape(len(boxes), GRID * GRID), cells.reshape(len(boxes), rows * (cols + 1))]
    things = np.concatenate(shares, axis=1) > 0.05
    place = np.arange(things.shape[1]) - GRID * GRID
    newline = (place >= 0) & (place % (cols + 1) == cols)
    glyphs = np.zeros((len(boxes), MOST_GLYPHS), np.int64)
    for k, thing in enumerate(scene.objects):
        for i, (x0, y0, x1, y1) in enumerate(view.boxes(list(thing.glyphs))):
            row, col = int((y0 + y1) / 2 // PATCH) - top, int((x0 + x1) / 2 // PATCH) - left
            glyphs[k, i] = GRID * GRID + row * (cols + 1) + col
    return Places(things, newline, glyphs, (rows, cols))
