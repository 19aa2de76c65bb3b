"""The unpadded part of a map whose cells are not square, or of which several stand for one window."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import FIVE, SIX, pinpoints_of

from minifocus.inputs.anyres import num_visual_tokens, select_best_resolution, stitch, unpadded_grid
from minifocus.projectors import Grid

sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
PINPOINTS = [tuple(p) for p in pinpoints_of(336, SIX)]


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    together = draw(st.integers(1, 4))
    return Grid(
        draw(st.sampled_from([1, 2, 3, 6, 12, 24])), draw(st.sampled_from([1, 2, 3, 6, 12, 24])) * together, together
    )


def visible(size: tuple[int, int], best: tuple[int, int], grid: Grid) -> tuple[int, int]:
    """Whole rows and windows across that the picture fills, from pixels alone, in fractions."""
    height, width = size
    down, across = Fraction(336, grid.rows), Fraction(336, grid.windows_across)  # a cell's own, in pixels
    scale = min(Fraction(best[0], height), Fraction(best[1], width))
    nearly = Fraction(1, 2 * 10**7)  # floats are rounded to 7 digits before they are cut
    return int(height * scale / down + nearly), int(width * scale / across + nearly)


@given(sizes, st.sampled_from(PINPOINTS), grids())
def test_the_crop(size: tuple[int, int], best: tuple[int, int], grid: Grid) -> None:
    """As much goes at one end as at the other, whole windows, and as few as padding fills at both."""
    top, left, rows, cols = unpadded_grid(size, best, 336, grid)
    whole_rows, whole_cols = best[0] // 336 * grid.rows, best[1] // 336 * grid.columns
    assert 2 * top + rows == whole_rows and 2 * left + cols == whole_cols
    assert left % grid.together == 0 and cols % grid.together == 0 and rows >= 0 and cols >= 0
    assert top == 0 or left == 0
    down, across = visible(size, best, grid)
    assert rows - down in (0, 1) and cols // grid.together - across in (0, 1)


@given(sizes, st.sampled_from(PINPOINTS), st.sampled_from([1, 2, 3, 12, 24]), st.integers(1, 4))
def test_square_cells_keep_to_transformers_formula(
    size: tuple[int, int], best: tuple[int, int], side: int, together: int
) -> None:
    """Written out as it was when all cells were square; E tokens of a window count as one cell that is E wide."""
    height, width = size
    rows, cols = (edge // 336 * side for edge in best)
    if width / height > cols / rows:
        top = (rows - int(round(height * (cols / width), 7))) // 2
        expected = top, 0, rows - 2 * top, cols
    else:
        left = (cols - int(round(width * (rows / height), 7))) // 2
        expected = 0, left, rows, cols - 2 * left
    first, second, third, fourth = unpadded_grid(size, best, 336, Grid(side, side * together, together))
    assert (first, second / together, third, fourth / together) == expected


@given(sizes, st.sampled_from(PINPOINTS), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3))
def test_a_token_of_several_patches_stays_where_one_of_them_does(
    size: tuple[int, int], best: tuple[int, int], window: int, together: int
) -> None:
    fine = unpadded_grid(size, best, 336, Grid(24, 24))
    shown = torch.zeros(*(edge // 336 * 24 for edge in best), dtype=torch.bool)
    shown[fine[0] : fine[0] + fine[2], fine[1] : fine[1] + fine[3]] = True
    windows = shown.unflatten(1, (-1, window)).unflatten(0, (-1, window)).any(dim=3).any(dim=1)
    along = 24 // window
    top, left, rows, cols = unpadded_grid(size, best, 336, Grid(along, along * together, together, window))
    found = torch.zeros_like(windows)
    found[top : top + rows, left // together : (left + cols) // together] = True
    assert torch.equal(found, windows) and left % together == cols % together == 0


@given(sizes, st.sampled_from(PINPOINTS), st.sampled_from([(24, 12), (12, 24), (12, 6)]))
def test_a_turned_picture_has_a_turned_crop(
    size: tuple[int, int], best: tuple[int, int], cells: tuple[int, int]
) -> None:
    top, left, rows, cols = unpadded_grid(size, best, 336, Grid(*cells))
    turned = unpadded_grid(size[::-1], best[::-1], 336, Grid(*cells[::-1]))
    assert turned == (left, top, cols, rows)


@pytest.mark.parametrize("grid", [Grid(4, 2), Grid(2, 4), Grid(2, 4, 2), Grid(1, 6, 3), Grid(3, 12, 4)])
@pytest.mark.parametrize("grids", [FIVE, SIX])
def test_stitch_puts_cells_where_they_are(grid: Grid, grids: list[list[int]]) -> None:
    pinpoints = pinpoints_of(28, grids)
    for size in [(1, 1), (1, 400), (400, 1), (57, 91), (100, 31), (480, 640), (333, 500)]:
        best = select_best_resolution(size, pinpoints)
        across = best[1] // 28
        views = torch.arange(1 + best[0] // 28 * across)[:, None].expand(-1, grid.cells)
        numbers = torch.stack([views, torch.arange(grid.cells).expand_as(views)], dim=-1)
        found = stitch(numbers, size, pinpoints, 28, grid)
        top, left, rows, cols = unpadded_grid(size, best, 28, grid)
        assert found.shape == (rows, cols, 2)
        assert num_visual_tokens(size, pinpoints, 28, grid) == grid.cells + rows * (cols + 1)
        for row in range(rows):
            for column in range(cols):
                r, c = top + row, left + column
                view = 1 + r // grid.rows * across + c // grid.columns
                assert found[row, column].tolist() == [view, r % grid.rows * grid.columns + c % grid.columns]
