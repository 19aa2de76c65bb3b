"""Token counts and the stitched feature map, against transformers."""

import random
from types import SimpleNamespace

import pytest
import torch
from pictures import FIVE, HUB, ONE, SIX, pinpoints_of
from transformers.image_processing_utils import select_best_resolution as oracle_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from minifocus.errors import InputError
from minifocus.inputs.anyres import num_visual_tokens, select_best_resolution, stitch, unpadded_grid
from minifocus.projectors import Grid

TABLE = [  # spec §4: (h, w), kept rows and columns, tokens
    ((336, 336), (24, 24), 1176),
    ((672, 672), (48, 48), 2928),
    ((480, 640), (36, 48), 2340),
    ((640, 480), (48, 36), 2352),
    ((899, 1024), (42, 48), 2634),
    ((1080, 1920), (28, 48), 1948),
    ((100, 1000), (8, 72), 1160),
    ((1000, 100), (72, 8), 1224),
    ((333, 500), (24, 36), 1464),
    ((1, 1), (24, 24), 1176),
    ((1, 10000), (0, 48), 576),
]


@pytest.mark.parametrize("size, kept, tokens", TABLE)
def test_tokens_of_the_table(size, kept, tokens):
    assert unpadded_grid(size, select_best_resolution(size, HUB), 336, Grid(24, 24))[2:] == kept
    assert num_visual_tokens(size, HUB, 336, Grid(24, 24)) == tokens


def random_sizes(count):
    yield from ((47, 94), (94, 47), (55, 66), (55, 132), (132, 55), (998, 1497))  # 24 comes out as 23.999…
    rng = random.Random(0)
    for _ in range(count):
        longest = rng.choice([30, 700, 3000, 20_000])
        yield rng.randint(1, longest), rng.randint(1, longest)


@pytest.mark.parametrize(
    "tile, patch, grids", [(336, 14, FIVE), (336, 14, SIX), (224, 32, ONE), (30, 4, FIVE), (28, 14, SIX)]
)
def test_tokens_equal_transformers(tile, patch, grids):
    grid, side = pinpoints_of(tile, grids), tile // patch
    for size in random_sizes(400):
        best = select_best_resolution(size, grid)
        assert best == oracle_best_resolution(size, grid)
        rows, cols = best[0] // tile, best[1] // tile
        kept, newlines = LlavaNextProcessor._get_unpadded_features(None, *size, side, side, rows, cols)
        assert num_visual_tokens(size, grid, tile, Grid(side, side)) == side * side + kept + newlines, size

        cells = torch.arange(rows * side * cols * side).view(1, rows * side, cols * side)
        top, left, kept_rows, kept_cols = unpadded_grid(size, best, tile, Grid(side, side))
        ours = cells[:, top : top + kept_rows, left : left + kept_cols]
        assert torch.equal(ours, unpad_image(cells, size)), size


def test_best_resolution_of_nothing():
    with pytest.raises(InputError, match="0x5"):
        select_best_resolution((0, 5), HUB)
    with pytest.raises(InputError, match="pinpoint"):
        select_best_resolution((5, 5), [])


@pytest.mark.parametrize("grids", [ONE, FIVE, SIX])
@pytest.mark.parametrize("tile, patch", [(28, 14), (30, 4), (12, 4)])
def test_stitch_equals_transformers(tile, patch, grids):
    grid, side = pinpoints_of(tile, grids), tile // patch
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=patch), image_grid_pinpoints=grid
    )
    newline = torch.randn(5)
    for size in [(1, 1), (1, 10000), (10000, 1), (480, 640), (333, 500), *random_sizes(20)]:
        rows, cols = (edge // tile for edge in select_best_resolution(size, grid))
        features = torch.randn(1 + rows * cols, side * side, 5)
        thumbnail, cells = features[0], stitch(features, size, grid, tile, Grid(side, side))
        column = newline.expand(cells.shape[0], 1, 5)
        ours = torch.cat([thumbnail, torch.cat([cells, column], dim=1).flatten(0, 1)])
        packed, lengths = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config), [features], torch.tensor([size]), "default", newline
        )
        assert torch.equal(ours, packed[0]), size
        assert len(ours) == lengths[0] == num_visual_tokens(size, grid, tile, Grid(side, side))


def test_stitch_passes_gradients_to_what_it_keeps():
    features = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    cells = stitch(features, (20, 60), [[28, 56]], 28, Grid(2, 2))
    assert cells.shape == (2, 4, 2) and cells.dtype == torch.float64
    cells.sum().backward()
    assert features.grad[0].eq(0).all() and features.grad[1:].eq(1).all()
    assert stitch(features, (1, 60), [[28, 56]], 28, Grid(2, 2)).shape == (0, 4, 2)


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 4, 2), (4, 4, 2), (3, 5, 2)])
def test_stitch_refuses_other_counts(shape):
    with pytest.raises(InputError, match=r"10x20 picture has 1 \+ 1 \* 2 views.*got"):
        stitch(torch.zeros(shape), (10, 20), [[28, 56]], 28, Grid(2, 2))
