"""Check what processors of transformers return, and count the tiles and tokens of a picture in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import arguments
from ..errors import InputError
from ..loading.config import Config
from ..projectors import Grid
from .anyres import num_visual_tokens as anyres_visual_tokens
from .anyres import select_best_resolution

Sizes = torch.Tensor | Sequence[Sequence[int]] | None

# What processors and tokenizers of transformers return on request beside what a model reads. All of it follows from
# input_ids or is of use to the caller alone; transformers' own LLaVA reads none of it.
PROCESSOR_KEYS = frozenset(
    ("mm_token_type_ids", "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "assistant_masks")
)


def num_tiles(config: Config, size: tuple[int, int]) -> int:
    """Tiles of a picture of (h, w), the thumbnail included."""
    if not config.anyres:
        return 1
    height, width = select_best_resolution(size, config.grid_pinpoints)
    return 1 + (height // config.vision.image_size) * (width // config.vision.image_size)


def num_visual_tokens(config: Config, size: tuple[int, int]) -> int:
    """Uncompressed visual tokens, and so placeholders, of a picture of (h, w)."""
    return _num_tokens(config, size, config.grid)


def num_plain_tokens(config: Config, size: tuple[int, int]) -> int:
    """What it would be with LLaVA's own projector, which has a token for every patch."""
    return _num_tokens(config, size, Grid(config.vision.grid, config.vision.grid))


def _num_tokens(config: Config, size: tuple[int, int], grid: Grid) -> int:
    if not config.anyres:
        return grid.cells + config.keep_cls
    return anyres_visual_tokens(size, config.grid_pinpoints, config.vision.image_size, grid)


def check_names(given: dict[str, object]) -> None:
    """Refuse, with InputError, keyword arguments that are not PROCESSOR_KEYS."""
    for name in given:
        if name not in PROCESSOR_KEYS:
            raise InputError(f"{name[:100]}: not an argument of forward")


def check_ids(config: Config, ids: torch.Tensor, mask: torch.Tensor | None, instruction: torch.Tensor | None) -> None:
    """input_ids [B, S] int64 within the vocabulary, and masks of that shape; each row's padding is at its ends."""
    arguments.tensor("input_ids", ids)
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise InputError(f"input_ids: expected int64 [rows, tokens], got {ids.dtype} {list(ids.shape)}")
    vocabulary = config.text.vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"input_ids: expected numbers from 0 to {vocabulary - 1}, got {low} to {high}")
    for name, value in (("attention_mask", mask), ("instruction_mask", instruction)):
        if value is not None and arguments.tensor(name, value).shape != ids.shape:
            raise InputError(f"{name}: expected the shape of input_ids {list(ids.shape)}, got {list(value.shape)}")
    if mask is not None:
        steps = mask.bool().int().diff(dim=1, prepend=mask.new_zeros(len(mask), 1).int())
        if not bool(mask.bool().any(dim=1).all()) or bool(((steps == 1).sum(dim=1) != 1).any()):
            raise InputError(
                "attention_mask: expected every row to have one run of ones, with padding at its ends only"
            )


def placeholder_runs(placeholder: torch.Tensor, counts: Sequence[int], row: int) -> list[int]:
    """Where the placeholders of the next pictures begin in a row's `placeholder` [S] bool.

    counts[i] of them stand in a run for the i-th of the pictures that are left. Raises InputError where they do not.
    """
    begins: list[int] = []
    places = placeholder.nonzero().squeeze(1)
    while len(places):
        number = len(begins)
        if number == len(counts):
            raise InputError(f"input_ids: row {row} has {len(places)} image placeholders more than the pictures fill")
        needed = counts[number]
        block = places[:needed]
        begin = int(block[0])
        if len(block) < needed or int(block[-1]) - begin != needed - 1:
            run = int((block == begin + torch.arange(len(block), device=block.device)).sum())
            raise InputError(
                f"input_ids: row {row}: picture {number} takes {needed} image placeholders in a run, got {run}"
            )
        begins.append(begin)
        places = places[needed:]
    return begins


def split_pixels(
    config: Config, pixel_values: torch.Tensor | Sequence[torch.Tensor] | None, image_sizes: Sizes
) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Each picture's own tiles [T_i, 3, S, S], without the zero tiles that pad a batch, and its (h, w)."""
    if pixel_values is None:
        return [], []
    own = pixel_values if isinstance(pixel_values, list | tuple) else [pixel_values]
    floating = all(isinstance(one, torch.Tensor) and one.is_floating_point() for one in own)
    if not floating or (isinstance(pixel_values, torch.Tensor) and not pixel_values.dim()):
        got = arguments.shown(pixel_values)
        raise InputError(f"pixel_values: expected a tensor of floating-point numbers or a list of some, got {got}")
    if not len(pixel_values):
        return [], []
    side = config.vision.image_size
    if config.anyres and isinstance(pixel_values, torch.Tensor) and pixel_values.dim() == 4:
        counts = [num_tiles(config, size) for size in _picture_sizes(image_sizes)]
        if sum(counts) != len(pixel_values):
            raise InputError(f"pixel_values: expected {sum(counts)} tiles by image_sizes, got {len(pixel_values)}")
        pixel_values = pixel_values.split(counts)
    dims = 4 if config.anyres else 3
    shapes = [list(p.shape) for p in pixel_values]
    wrong = next((shape for shape in shapes if len(shape) != dims or shape[-3:] != [3, side, side]), None)
    if wrong is not None:
        wanted = f"[pictures, {'tiles, ' if config.anyres else ''}3, {side}, {side}]"
        raise InputError(f"pixel_values: expected {wanted}, got {[len(shapes), *wrong]}")
    if not config.anyres:
        return [p[None] for p in pixel_values], [(side, side)] * len(shapes)
    sizes = _picture_sizes(image_sizes, len(shapes))
    tiles = []
    for number, (one, size) in enumerate(zip(pixel_values, sizes, strict=True)):
        needed = num_tiles(config, size)
        if len(one) < needed:
            raise InputError(f"pixel_values: picture {number} of {size} needs {needed} tiles, got {len(one)}")
        tiles.append(one[:needed])
    return tiles, sizes


def _picture_sizes(given: Sizes, count: int | None = None) -> list[tuple[int, int]]:
    """(h, w) of each picture; InputError where they are not, or not `count`."""
    try:
        sizes = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        sizes = torch.empty(0)
    whole = not (sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool)
    fits = whole and sizes.dim() == 2 and sizes.shape[1] == 2 and len(sizes) == (count or len(sizes))
    if not fits or not bool((sizes >= 1).all()):
        wanted = "each picture" if count is None else f"each of {count} pictures"
        raise InputError(f"image_sizes: expected positive whole (h, w) for {wanted}, got {arguments.shown(given)}")
    return [(int(h), int(w)) for h, w in sizes.tolist()]
