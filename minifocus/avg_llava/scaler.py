"""The visual granularity scaler (AVG-LLaVA §3.1): every view of a picture pooled by the same window, before they are stitched.

Its poolings halve the tokens again and again, across and down in turn: 1×1, 1×2, 2×2, 2×4, 4×4 of a view's 24×24 tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from .. import arguments
from ..errors import InputError
from ..inputs.anyres import select_best_resolution, unpadded_grid
from ..loading.config import Config
from ..projectors import Grid
from ..samplers.hooks import PictureFeatures, VisualTokens, leading_tokens

Window = tuple[int, int]  # cells down and across that become one token
Crop = Literal["whole", "released"]

HALVINGS = 4  # the paper's: five granularities


def all_granularities(grid: Grid) -> tuple[int, ...]:
    """The tokens of a view at the paper's five granularities, coarse to fine, of which those that the view's grid has."""
    fits = [2**i for i in range(HALVINGS + 1) if not (grid.rows % _window(2**i)[0] or grid.columns % _window(2**i)[1])]
    return tuple(grid.cells // times for times in reversed(fits))


def _window(times: int) -> Window:
    """The window that leaves one token of `times`, a power of two: across first, as in the paper."""
    halvings = times.bit_length() - 1
    return 2 ** (halvings // 2), 2 ** ((halvings + 1) // 2)


def window_of(name: str, granularity: object, grid: Grid) -> Window:
    """The window that leaves `granularity` tokens of a view. Raises InputError, with the option's `name`, where none does."""
    known = all_granularities(grid)
    tokens = arguments.whole_of(name, granularity, known)
    return _window(grid.cells // tokens)


def check_grid(grid: Grid) -> None:
    """Raise InputError for a grid whose tokens do not lie beside one another as patches do."""
    if grid.together > 1:
        raise InputError(
            "sampler: AVG-LLaVA pools tokens that stand for one place each; this projector makes several of one"
        )


def pool_views(views: torch.Tensor, window: Window) -> torch.Tensor:
    """[T, rows, columns, C] → [T, rows / down, columns / across, C]"""
    return F.avg_pool2d(views.permute(0, 3, 1, 2), window).permute(0, 2, 3, 1)


def scale(picture: PictureFeatures, window: Window, config: Config, crop: Crop = "whole") -> VisualTokens:
    """A picture's tokens at one granularity: the thumbnail's, then the stitched map's with a newline after each of its rows.

    crop  which cells of the coarse map stay: "whole", all that show something of the picture, or "released", what the public
          code's formula gives, which takes cells that are wider than high for squares, so that it cuts off half the picture

    A token's place is that of its first visible cell in the layout of the finest map. A token of padding alone, which the
    released crop may keep, takes a place nearby.
    """
    layout, pooled = picture.layout, pool_views(picture.views, window)
    down, across = window
    if not config.anyres:
        leading = leading_tokens(picture)
        whole, fine = pooled[0], (0, 0, layout.height, layout.width)
        first, last = (0, 0), (pooled.shape[1], pooled.shape[2])
    else:
        best = select_best_resolution(picture.size, config.grid_pinpoints)
        tiles = (best[0] // config.vision.image_size, best[1] // config.vision.image_size)
        whole = pooled[1:].unflatten(0, tiles).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        fine = unpadded_grid(picture.size, best, config.vision.image_size, config.grid)
        if crop == "released":
            first, last = _released_crop(picture.size, (whole.shape[0], whole.shape[1]))
        else:
            first, last = (
                (fine[0] // down, fine[1] // across),
                (
                    -(-(fine[0] + fine[2]) // down),
                    -(-(fine[1] + fine[3]) // across),
                ),
            )
        height, width = pooled.shape[1:3]
        rows, columns = _ranges((0, 0), (height, width), whole.device)
        places = (rows[:, None] * down * layout.thumbnail_width + columns * across).flatten()
        leading = (pooled[0].flatten(0, 1), places, places.new_tensor(window).expand(len(places), 2))
    # A picture may be too flat for a row or a column of the finest map, and then has no places for any of a coarse one.
    last = (last[0] if layout.height else first[0], last[1] if layout.width else first[1])
    kept = whole[first[0] : last[0], first[1] : last[1]]
    rows, columns = _ranges(first, last, whole.device)
    top, bottom = _visible(rows, down, fine[0], fine[2])
    left, right = _visible(columns, across, fine[1], fine[3])
    source = layout.of_cells((top[:, None] * layout.width + left).flatten()).view(len(rows), len(columns))
    extent = torch.stack(torch.broadcast_tensors((bottom - top)[:, None], right - left), dim=-1)
    if picture.newline is not None:
        line = picture.newline.to(kept.dtype).expand(len(rows), 1, -1)
        kept = torch.cat([kept, line], dim=1)
        source = torch.cat([source, layout.of_newlines(bottom - 1)[:, None]], dim=1)
        extent = torch.cat([extent, extent.new_ones(len(rows), 1, 2)], dim=1)
    body = (kept.flatten(0, 1), source.flatten(), extent.flatten(0, 1))
    tokens, places, extents = (torch.cat(pair) for pair in zip(leading, body, strict=True))
    if crop == "released":
        places = _apart(places, layout.num_tokens)
    return VisualTokens(tokens, places, extents, layout)


def _ranges(first: Window, last: Window, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (
        torch.arange(begin, max(begin, end), device=device) for begin, end in zip(first, last, strict=True)
    )
    return rows, columns


def _visible(coarse: torch.Tensor, step: int, begin: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of coarse rows (or columns), the first visible fine one, and the one after the last; at least one, if there are any."""
    first = (coarse * step - begin).clamp(0, max(count - 1, 0))
    return first, ((coarse + 1) * step - begin).clamp(max=count).maximum(first + 1)


def _released_crop(size: tuple[int, int], coarse: tuple[int, int]) -> tuple[Window, Window]:
    """The first cell and the one behind the last, by the public code: int() of the visible share, cells taken for squares."""
    (height, width), (rows, columns) = size, coarse
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        return (cut, 0), (rows - cut, columns)
    cut = (columns - int(width * (rows / height))) // 2
    return (0, cut), (rows, columns - cut)


def _apart(places: torch.Tensor, count: int) -> torch.Tensor:
    """Rising places [n] out of 0 … count - 1, n at most count, as near to the given ones as they can be when each is its own."""
    number = torch.arange(len(places), device=places.device)
    return ((places - number).cummax(0).values + number).minimum(number + count - len(places))
