"""Tiles in C++ against ImageProcessor, and what they are made of: resizing against Pillow, the grid against anyres.py."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from encoded_pictures import draw_size
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runtime_pictures import LIBRARIES, SOURCES, Refused, RuntimePictures

from minifocus.export.picture_settings import picture_settings
from minifocus.inputs.anyres import num_visual_tokens, select_best_resolution, unpadded_grid
from minifocus.inputs.image_processor import ImageProcessor
from minifocus.projectors import Grid

SEEDS = st.integers(0, 2**32 - 1)
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (4, 4)]


@pytest.fixture(scope="module")
def runtime(compile_pieces) -> RuntimePictures:
    return RuntimePictures(compile_pieces("pictures", SOURCES, LIBRARIES))


def random_picture(draw: random.Random, height: int, width: int) -> np.ndarray:
    """Noise, or steps from one extreme to the other, of which filters overshoot."""
    numpy = np.random.default_rng(draw.getrandbits(32))
    return numpy.choice([np.arange(256), [0, 255]][draw.randrange(2)], (height, width, 3)).astype(np.uint8)


def write_manifest(folder: Path, processor: ImageProcessor) -> Path:
    lines = picture_settings(processor, SimpleNamespace(grid=Grid(24, 24)))
    file = folder / "manifest.txt"
    file.write_text("".join(" ".join([key, *map(str, values)]) + "\n" for key, values in lines.items()))
    return file


# ------------------------------------------------------------------------------------------------------------ resizing


@given(seed=SEEDS)
def test_resizing_equals_pillow(runtime, seed):
    """Any size to any other, by any filter, in any box."""
    draw = random.Random(seed)
    (height, width), size, filter_ = draw_size(draw, 60), draw_size(draw, 60), draw.randrange(6)
    picture, box = random_picture(draw, height, width), None
    if draw.random() < 0.5:
        edges = [sorted(draw.uniform(0, length) for _ in range(2)) for length in (width, height)]
        if draw.random() < 0.4:  # of whole pixels, perhaps of the new size
            edges = [[int(start), int(stop) + 1] for start, stop in edges]
            size = (edges[1][1] - edges[1][0], edges[0][1] - edges[0][0]) if draw.random() < 0.5 else size
        box = (edges[0][0], edges[1][0], edges[0][1], edges[1][1])
    theirs = Image.fromarray(picture).resize(size[::-1], filter_, box)
    assert np.array_equal(runtime.resize(picture, size, filter_, box), np.asarray(theirs))


@pytest.mark.parametrize("filter_", range(6))
def test_large_sizes_equal_pillow(runtime, filter_):
    """Where the last bits of positions show, and where rows go first or just do not."""
    draw = random.Random(filter_)
    rows_first = [((1500, 40), (300, 37)), ((100, 60), (79, 50)), ((100, 60), (80, 50)), ((100, 60), (81, 50))]
    positions = [((7, 200_001), (5, 336)), ((200_001, 7), (336, 5)), ((40, 1500), (41, 333))]
    for before, after in rows_first + positions:
        picture = random_picture(draw, *before)
        theirs = Image.fromarray(picture).resize(after[::-1], filter_)
        assert np.array_equal(runtime.resize(picture, after, filter_), np.asarray(theirs)), (before, after)


def test_weights_that_are_too_many_to_keep(runtime):
    """Those of so many columns are made in two parts."""
    picture = random_picture(random.Random(0), 2, 1_000_000)
    theirs = Image.fromarray(picture).resize((700, 2), Image.Resampling.LANCZOS)
    assert np.array_equal(runtime.resize(picture, (2, 700), 1), np.asarray(theirs))


@pytest.mark.parametrize("size, box", [((0, 5), None), ((5, -1), None), ((5, 5), (0, 0, 8, 7)), ((5, 5), (-1, 0, 5, 5)),
                                       ((5, 5), (3, 0, 2, 5)), ((5, 5), (0, 0, float("nan"), 5))])  # fmt: skip
def test_what_cannot_be_resized(runtime, size, box):
    with pytest.raises(Refused, match="resize: expected a (size|box)"):
        runtime.resize(np.zeros((6, 7, 3), np.uint8), size, 3, box)


# --------------------------------------------------------------------------------------------------------------- tiles


def random_processor(draw: random.Random) -> ImageProcessor:
    side, anyres = draw.choice([7, 14, 28]), draw.random() < 0.5
    grids = draw.sample(GRIDS, draw.randint(1, len(GRIDS)))
    edges = [side, draw.randint(1, 60), (side, side), (draw.randint(1, 60), draw.randint(1, 60))]
    return ImageProcessor(
        anyres=anyres,
        image_size=side,
        size=side if anyres else draw.choice(edges),
        mean=tuple(draw.choice([draw.random(), 0.0, -0.5, 1.7]) for _ in range(3)),
        std=tuple(draw.choice([draw.random() + 1e-3, 1.0]) for _ in range(3)),
        rescale_factor=draw.choice([1 / 255, 1 / 127.5, draw.random()]),
        resample=draw.choice([2, 3, 3, 3, draw.randrange(6)]),
        grid_pinpoints=tuple((rows * side, columns * side) for rows, columns in grids) if anyres else (),
        pad=not anyres and draw.random() < 0.5,
    )


@given(seed=SEEDS)
def test_tiles_equal_those_of_python(runtime, tmp_path_factory, seed):
    draw = random.Random(seed)
    processor, picture = random_processor(draw), random_picture(draw, *draw_size(draw, 90))
    values, size = processor(Image.fromarray(picture))
    ours, our_size = runtime.tiles(write_manifest(tmp_path_factory.getbasetemp(), processor), picture)
    assert our_size == size
    assert np.array_equal(ours, values.numpy()), processor  # bit for bit


HUB = tuple((336 * rows, 336 * columns) for rows, columns in GRIDS[:5])
FULL_SIZE = {
    "next": ImageProcessor(True, 336, 336, grid_pinpoints=HUB),
    "1.5": ImageProcessor(False, 336, 336),
    "1.5, padded": ImageProcessor(False, 336, 336, pad=True),
    "1.5, large": ImageProcessor(False, 336, 60_000),
}


CASES = [(kind, size) for kind in FULL_SIZE for size in [(333, 501), (300_001, 2), (1, 40_000)]]
CASES.remove(("1.5, padded", (1, 40_000)))  # a second square of as many pixels as a picture may have


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_tiles_of_full_size_and_of_slivers(runtime, tmp_path, kind, size):
    """A sliver is made small before it is made wide, padded, or enlarged to gigabytes."""
    processor, picture = FULL_SIZE[kind], random_picture(random.Random(0), *size)
    ours, _ = runtime.tiles(write_manifest(tmp_path, processor), picture)
    assert np.array_equal(ours, processor(Image.fromarray(picture))[0].numpy())


def test_pictures_that_are_none(runtime, tmp_path):
    manifest = write_manifest(tmp_path, FULL_SIZE["next"])
    with pytest.raises(Refused, match="expected a picture of 1 to 89478485 pixels, got 0x5"):
        runtime.tiles(manifest, np.zeros((0, 5, 3), np.uint8))


WRONG_LINES = {
    "picture.anyres": ["1", "", "true true"],
    "picture.image_size": ["0", "-336", "100000", "336.5", "336 336"],
    "picture.size": ["", "0", "1 2 3", "70000"],
    "picture.mean": ["0.5", "0.1 0.2 0.3 0.4", "0 0 nan", "inf 0 0", "0 0 x"],
    "picture.std": ["0 1 1", "1 1 -1", "1 1 nan"],
    "picture.rescale_factor": ["nan", "1 2", "inf"],
    "picture.resample": ["6", "-1", "bicubic"],
    "picture.pad": ["no"],
    "picture.pinpoints": ["", "336", "336 336 336", "336 337", "0 336", "33600000 33600000", "336 -336"],
    "picture.grid": ["", "24 24", "24 24 1 1 1", "0 24 1 1", "24 24 5 1", "65536 65536 1 1", "24 24 1 0"],
}


@pytest.mark.parametrize("key", WRONG_LINES)
def test_manifests_that_no_exporter_writes(runtime, tmp_path, key):
    manifest = write_manifest(tmp_path, FULL_SIZE["next"])
    lines = dict(line.partition(" ")[::2] for line in manifest.read_text().splitlines())
    assert set(lines) == set(WRONG_LINES)
    for wrong in [*WRONG_LINES[key], None]:
        changed = {**lines, key: wrong}
        manifest.write_text("".join(f"{name} {value}\n" for name, value in changed.items() if value is not None))
        with pytest.raises(Refused, match=f"manifest.txt: {key}: (expected|no such key)"):
            runtime.tiles(manifest, np.zeros((4, 4, 3), np.uint8))


# ------------------------------------------------------------------------------------------------------------ the grid


@given(seed=SEEDS)
def test_the_grid_equals_python_s(runtime, seed):
    """On sizes of every scale, and on those of which 24 comes out as 23.999…"""
    draw = random.Random(seed)
    tile, pinpoints = draw.choice([28, 30, 224, 336]), draw.sample(GRIDS, draw.randint(1, len(GRIDS)))
    pinpoints = [(rows * tile, columns * tile) for rows, columns in pinpoints]
    together, window = draw.choice([1, 1, 2, 4]), draw.choice([1, 1, 2, 4])
    grid = Grid(draw.randint(1, 30), draw.randint(1, 30) * together, together, window)
    for _ in range(20):
        longest = draw.choice([30, 700, 20_000, 10_000_000])
        size = draw.choice([(47, 94), (55, 66), (998, 1497), (draw.randint(1, longest), draw.randint(1, longest))])
        best = select_best_resolution(size, pinpoints)
        region = unpadded_grid(size, best, tile, grid)
        tokens = num_visual_tokens(size, pinpoints, tile, grid)
        assert runtime.anyres(size, pinpoints, tile, grid) == [*best, *region, tokens], (size, grid)
    with pytest.raises(Refused, match="expected a picture of at least 1x1 and a grid pinpoint, got 0x5"):
        runtime.anyres((0, 5), pinpoints, tile, grid)
    with pytest.raises(Refused, match="grid pinpoint, got 5x5 and 0 pinpoints"):
        runtime.anyres((5, 5), [], tile, grid)
