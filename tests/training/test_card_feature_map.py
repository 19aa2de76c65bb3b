"""Where things are among the patches: the geometry beside the pictures' own way through processor and stitching."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from minifocus import cards
from minifocus.cards.feature_map import GRID, PATCH, locate
from minifocus.inputs.anyres import stitch
from minifocus.inputs.image_processor import ImageProcessor
from minifocus.projectors import Grid

PROCESS = ImageProcessor(anyres=True, image_size=cards.TILE, size=cards.TILE, grid_pinpoints=cards.PINPOINTS)
SCENES = [*islice(cards.scenes("validation", 40), 5), *islice(cards.scenes("validation", 90, dense=True), 5)]


def brightness(size: tuple[int, int], boxes: list[cards.Box]) -> np.ndarray:
    """A black picture with white boxes → the mean of each patch, as a sequence of uncompressed tokens (newlines: NaN)."""
    image = Image.new("RGB", size)
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    tiles, picture = PROCESS(image)
    means = tiles.mean(1).unflatten(1, (GRID, PATCH)).unflatten(3, (GRID, PATCH)).mean((2, 4))  # [tiles, 8, 8]
    views = means.flatten(1)[..., None]
    leading, cells = views[0], stitch(views, picture, cards.PINPOINTS, cards.TILE, Grid(GRID, GRID))
    rows = torch.cat([cells, cells.new_full((cells.shape[0], 1, 1), torch.nan)], dim=1)
    return torch.cat([leading, rows.flatten(0, 1)])[:, 0].numpy()


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.seed))
def test_things_and_letters_are_where_the_model_sees_them(scene: cards.Scene) -> None:
    places = locate(scene)
    dark = np.nanmin(brightness(scene.image.size, []))
    white = np.nanmax(brightness(scene.image.size, [(0, 0, *scene.image.size)]))
    assert places.things.shape == (len(scene.objects), len(brightness(scene.image.size, [])))
    for thing, own, glyphs in zip(scene.objects, places.things, places.glyphs, strict=True):
        seen = brightness(scene.image.size, [thing.box]) - dark
        assert np.array_equal(np.isnan(seen), places.newline)
        share = np.nan_to_num(seen) / (white - dark)
        assert own[share > 0.08].all() and not own[share < 0.005].any()
        for glyph, place in zip(thing.glyphs, glyphs, strict=False):
            x, y = (glyph[0] + glyph[2]) / 2, (glyph[1] + glyph[3]) / 2
            dot = (round(x) - 2, round(y) - 2, round(x) + 2, round(y) + 2)
            light = np.nan_to_num(brightness(scene.image.size, [dot]) - dark)
            light[: GRID * GRID] = 0  # the thumbnail's
            assert light[place] >= 0.2 * light.max()
    assert np.array_equal(places.foreground, places.things.any(0))
    assert len(places.newline) == GRID * GRID + places.grid[0] * (places.grid[1] + 1)
