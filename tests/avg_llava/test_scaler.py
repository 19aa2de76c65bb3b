"""AVG-LLaVA's scaler against plain loops over cells, on pictures of many shapes, in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PINPOINTS, build, copy_with_projector, save
from hypothesis import given, settings
from hypothesis import strategies as st

import minifocus
from minifocus.avg_llava.scaler import all_granularities, pool_views, scale, window_of
from minifocus.inputs.anyres import select_best_resolution
from minifocus.loading.config import Config, load_config
from minifocus.projectors import Grid
from minifocus.samplers.hooks import PictureFeatures, VisualTokens, uncompressed

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
SIZES = [(57, 91), (30, 90), (100, 31), (1, 1), (1, 400), (400, 1), (56, 56), (28, 84), (84, 28), (3, 500), (28, 56)]
SIZES += [(49, 51), (56, 28), (1000, 1001)]
# The public model's, as (height, width).
PUBLIC = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def config_of(tmp: Path, kind: str, **changes: Any) -> Config:
    build_folder = save(build(kind, seed=1, **changes), tmp)
    return load_config(build_folder)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """By name: grids of a view 4, 8 and 24 wide, STF's on top, and LLaVA-1.5's without and with its class token."""
    made = tmp_path_factory.mktemp
    plain = save(build("llava_next", seed=1), made("four"))
    double = [[2 * height, 2 * width] for height, width in PINPOINTS]
    eight = save(build("llava_next", seed=1, vision_image_size=56, image_grid_pinpoints=double), made("eight"))
    return {
        "4": load_config(plain),
        "8": load_config(eight),
        "24": config_of(
            made("public"), "llava_next", vision_image_size=336, vision_patch_size=14, image_grid_pinpoints=PUBLIC
        ),
        "stf": load_config(copy_with_projector(eight, made("stf"), {"name": "stf", "window": 2, "mbtf": False})),
        "llava": config_of(made("llava"), "llava"),
        "llava with cls": config_of(made("cls"), "llava", vision_feature_select_strategy="full"),
    }


def features_of(config: Config, size: tuple[int, int], channels: int = 2) -> PictureFeatures:
    """Features whose numbers say where they are from: what the model would make of a picture, without its tower."""
    grid, side = config.grid, config.vision.image_size
    tiles = 1
    if config.anyres:
        best = select_best_resolution(size, config.grid_pinpoints)
        tiles += best[0] // side * (best[1] // side)
    generator = torch.Generator().manual_seed(size[0] * 1009 + size[1])
    cls = 1 if not config.anyres and config.keep_cls else 0
    features = torch.randn(tiles, cls + grid.cells, channels, generator=generator, dtype=torch.float64)
    views = features[:, cls:].unflatten(1, (grid.rows, grid.columns))
    whole, leading, newline = views[0], features[0, :cls], None
    if config.anyres:
        rows, columns = best[0] // side, best[1] // side
        joined = torch.cat([torch.cat([views[1 + r * columns + c] for c in range(columns)], 1) for r in range(rows)])
        top, left, height, width = crop(size, (len(joined), joined.shape[1]), grid.window)
        whole, leading = joined[top : top + height, left : left + width], views[0].flatten(0, 1)
        newline = torch.full((channels,), 1e6, dtype=torch.float64)
    return PictureFeatures(whole, views[0], leading, newline, None, views, size, 0)


def crop(size: tuple[int, int], shape: tuple[int, int], window: int) -> tuple[int, int, int, int]:
    """LLaVA-NeXT's, for square patches: top, left, rows, columns. A token of `window` by `window` stays if one of them does."""
    (height, width), (rows, columns) = size, (shape[0] * window, shape[1] * window)
    top, left = 0, 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    kept_rows = {row // window for row in range(top, rows - top)}
    kept_columns = {column // window for column in range(left, columns - left)}
    return top // window, left // window, len(kept_rows), len(kept_columns)


Token = tuple[list[float], tuple[int, int]]  # values, extent


def naive(
    picture: PictureFeatures, window: tuple[int, int], config: Config, released: bool
) -> Iterator[tuple[Any, ...]]:
    """(values, place or None, extent) of each token, by loops over cells of spec A1 and the end of spec C."""
    (ph, pw), views = window, picture.views
    g_rows, g_columns = views.shape[1:3]

    def mean(view: int, row: int, column: int) -> list[float]:
        cells = [views[view, row * ph + y, column * pw + x] for y in range(ph) for x in range(pw)]
        return [math.fsum(float(cell[c]) for cell in cells) / len(cells) for c in range(views.shape[3])]

    if not config.anyres:
        for number, token in enumerate(picture.leading):
            yield token.tolist(), number, (1, 1)
        for i in range(g_rows // ph):
            for j in range(g_columns // pw):
                yield mean(0, i, j), len(picture.leading) + i * ph * g_columns + j * pw, (ph, pw)
        return
    for i in range(g_rows // ph):
        for j in range(g_columns // pw):
            yield mean(0, i, j), i * ph * g_columns + j * pw, (ph, pw)
    best = select_best_resolution(picture.size, config.grid_pinpoints)
    down, across = (side // config.vision.image_size for side in best)
    rows, columns = down * g_rows, across * g_columns  # of the fine map with its padding
    top, left, height, width = crop(picture.size, (rows, columns), config.grid.window)
    coarse_rows, coarse_columns = range(rows // ph), range(columns // pw)
    if released:
        (h, w), (ch, cw) = picture.size, (rows // ph, columns // pw)
        if w / h > cw / ch:
            cut = (ch - int(h * (cw / w))) // 2
            coarse_rows = range(cut, ch - cut)
        else:
            cut = (cw - int(w * (ch / h))) // 2
            coarse_columns = range(cut, cw - cut)
    else:
        coarse_rows = range(top // ph, math.ceil((top + height) / ph))
        coarse_columns = range(left // pw, math.ceil((left + width) / pw))
    if not height or not width:
        coarse_rows, coarse_columns = (coarse_rows if height else range(0)), (coarse_columns if width else range(0))
    length, first = width + 1, len(picture.leading)
    for i in coarse_rows:
        seen_rows = [row for row in range(i * ph, (i + 1) * ph) if top <= row < top + height]
        for j in coarse_columns:
            seen = [column for column in range(j * pw, (j + 1) * pw) if left <= column < left + width]
            view = 1 + i * ph // g_rows * across + j * pw // g_columns
            token = mean(view, i % (g_rows // ph), j % (g_columns // pw))
            if seen_rows and seen:
                yield token, first + (seen_rows[0] - top) * length + seen[0] - left, (len(seen_rows), len(seen))
            else:
                assert released
                yield token, None, None
        yield [1e6] * views.shape[3], first + (seen_rows[-1] - top) * length + width if seen_rows else None, (1, 1)


def check(config: Config, size: tuple[int, int], window: tuple[int, int], form: Any) -> VisualTokens:
    picture = features_of(config, size)
    visual = scale(picture, window, config, form)
    expected = list(naive(picture, window, config, form == "released"))
    values = torch.tensor([token for token, _, _ in expected], dtype=torch.float64)
    assert torch.allclose(visual.tokens, values.view(visual.tokens.shape), rtol=0, atol=1e-12)
    places, extents = visual.source.tolist(), [tuple(extent) for extent in visual.extent.tolist()]
    assert len(places) == len(extents) == len(expected) <= picture.layout.num_tokens or form == "released"
    assert places == sorted(set(places)) and (not places or 0 <= places[0] <= places[-1] < picture.layout.num_tokens)
    if all(place is not None for _, place, _ in expected):
        natural = [place for _, place, _ in expected]
        if natural == sorted(set(natural)):  # else the released crop's tokens have been moved apart
            assert places == natural
        else:
            assert form == "released"
        assert extents == [extent for _, _, extent in expected]
    assert form == "released" or all(place is not None for _, place, _ in expected)
    assert int(visual.extent.min()) >= 1
    if form == "whole":
        covered = torch.zeros(picture.layout.height, picture.layout.width, dtype=torch.int64)
        for place, (tall, wide) in zip(places, extents, strict=True):
            cell = int(picture.layout.cells(torch.tensor([place])))
            if cell >= 0:
                row, column = divmod(cell, picture.layout.width)
                assert row + tall <= covered.shape[0] and column + wide <= covered.shape[1]
                covered[row : row + tall, column : column + wide] += 1
        assert bool((covered == 1).all())
    return visual


@pytest.mark.parametrize("form", ["whole", "released"])
@pytest.mark.parametrize("name", ["4", "8", "stf", "llava", "llava with cls"])
def test_plain_loops(configs: dict[str, Config], name: str, form: str) -> None:
    config = configs[name]
    for size in SIZES if config.anyres else [(config.vision.image_size,) * 2]:
        for window in WINDOWS:
            check(config, size, window, form)


@settings(max_examples=60)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    window=st.sampled_from(WINDOWS),
    form=st.sampled_from(["whole", "released"]),
    name=st.sampled_from(["4", "8", "stf"]),
)
def test_plain_loops_on_any_picture(
    configs: dict[str, Config], height: int, width: int, window: tuple[int, int], form: str, name: str
) -> None:
    check(configs[name], (height, width), window, form)


def test_the_paper_s_granularities_and_what_the_public_crop_loses(configs: dict[str, Config]) -> None:
    """Spec A1's numbers."""
    config = configs["24"]
    assert all_granularities(config.grid) == (36, 72, 144, 288, 576)
    assert [window_of("g", n, config.grid) for n in (576, 288, 144, 72, 36)] == WINDOWS

    def rows(size: tuple[int, int], form: Any) -> list[tuple[int, int]]:
        picture = features_of(config, size, 1)
        found = []
        for window in WINDOWS:
            visual = scale(picture, window, config, form)
            thumbnail = 576 // (window[0] * window[1])
            lines = int((visual.tokens[:, 0] == 1e6).sum())
            assert (len(visual.tokens) - thumbnail) % max(lines, 1) == 0
            found.append((lines, (len(visual.tokens) - thumbnail) // lines - 1))
        return found

    assert rows((480, 640), "released") == [(36, 48), (18, 24), (18, 24), (10, 12), (10, 12)]
    assert rows((480, 640), "whole") == [(36, 48), (36, 24), (18, 24), (18, 12), (10, 12)]
    assert rows((672, 672), "released") == [(48, 48), (24, 24), (24, 24), (12, 12), (12, 12)]
    assert rows((672, 672), "whole") == [(48, 48), (48, 24), (24, 24), (24, 12), (12, 12)]
    middle = scale(features_of(config, (672, 672)), (1, 2), config, "released")
    cells = middle.layout.cells(middle.source[288:])
    assert cells[cells >= 0].min() == 12 * 48 and cells.max() == 35 * 48 + 46  # half the picture, in its middle
    for size in [(672, 672), (480, 640), (100, 999)]:
        check(config, size, (2, 4), "whole")
        check(config, size, (1, 2), "released")


@pytest.mark.parametrize("name", ["4", "8", "24", "stf", "llava", "llava with cls"])
def test_the_finest_granularity_is_uncompressed(configs: dict[str, Config], name: str) -> None:
    config = configs[name]
    for size in SIZES if config.anyres else [(28, 28)]:
        picture = features_of(config, size)
        plain = uncompressed(picture)
        for form in ("whole", "released"):
            visual = scale(picture, (1, 1), config, form)  # type: ignore[arg-type]
            if form == "whole" or len(visual.source) == len(plain.source):  # int() may take a row that round() keeps
                for field in ("tokens", "source", "extent"):
                    assert torch.equal(getattr(visual, field), getattr(plain, field)), (size, form, field)
                assert visual.layout == plain.layout == picture.layout


def test_the_paper_s_alternating_poolings_compose() -> None:
    views = torch.randn(3, 24, 24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stacked = views
    for number, window in enumerate(WINDOWS):
        if number:
            step = (1, 2) if number % 2 else (2, 1)
            stacked = torch.nn.functional.avg_pool2d(stacked.permute(0, 3, 1, 2), step, step).permute(0, 2, 3, 1)
        assert torch.allclose(pool_views(views, window), stacked, rtol=0, atol=1e-14)


def test_granularities_of_other_grids() -> None:
    """Those of the five that divide the grid, and an error that names what there is."""
    assert all_granularities(Grid(12, 12)) == (9, 18, 36, 72, 144)
    assert all_granularities(Grid(6, 6)) == (9, 18, 36)
    assert all_granularities(Grid(5, 5)) == (25,)
    assert all_granularities(Grid(4, 2)) == (2, 4, 8)
    for wrong in (35, 0, -36, 36.0, "36", True, None):
        with pytest.raises(minifocus.InputError, match=r"mine: expected one of 36, 72, 144, 288, 576, got"):
            window_of("mine", wrong, Grid(24, 24))


def test_dtypes_are_kept(configs: dict[str, Config]) -> None:
    """The coarse tokens are means in the model's own dtype."""
    picture = features_of(configs["4"], (57, 91))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fields = {
            name: getattr(picture, name).to(dtype) for name in ("map", "thumbnail", "leading", "newline", "views")
        }
        low = PictureFeatures(**fields, cues=None, size=picture.size, num_plain=0)
        for window in WINDOWS:
            found, exact = (scale(one, window, configs["4"]) for one in (low, picture))
            assert found.tokens.dtype == dtype and torch.equal(found.source, exact.source)
            near = exact.tokens[exact.tokens[:, 0] != 1e6]
            assert (found.tokens[exact.tokens[:, 0] != 1e6] - near).abs().max() <= 8 * torch.finfo(dtype).eps
