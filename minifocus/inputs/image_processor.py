"""Picture → tiles: resized, cut, and normalised as for CLIP.

LLaVA-1.5 takes the centre of the picture as one tile, or, if `do_pad` says so, all of it on a square of the mean colour.
LLaVA-NeXT takes a thumbnail of the whole picture and then, row by row, the tiles of the grid resolution ("pinpoint") that fits
it best. The values equal those of transformers' Pillow processors bit for bit. Sizes are (height, width).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..arguments import shown
from ..errors import InputError
from ..loading.config import PINPOINTS
from ..loading.json_fields import JsonFields
from .anyres import select_best_resolution
from .open_image import MAX_PIXELS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PROCESSORS = {"llava": ("CLIPImageProcessor", "LlavaImageProcessor"), "llava_next": ("LlavaNextImageProcessor",)}


@dataclass(frozen=True)
class ImageProcessor:
    """The settings of a folder's processor file.

    size  the shortest edge after resizing, or (height, width)
    pad   LLaVA-1.5: whether a picture is padded to a square first
    """

    anyres: bool
    image_size: int
    size: int | tuple[int, int]
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    pad: bool = False

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        model_type: str,
        image_size: int,
        grid_pinpoints: Iterable[tuple[int, int]] = (),
    ) -> ImageProcessor:
        """From `image_processor` in processor_config.json, else preprocessor_config.json, else the model's defaults.

        model_type is "llava" or "llava_next"; image_size and grid_pinpoints are the model's own (config.json). Raises
        CheckpointError, naming file and key, for a setting that this package does not support, or that does not fit the model.
        """
        anyres, square = model_type == "llava_next", (image_size,) * 2
        pinpoints = tuple((height, width) for height, width in grid_pinpoints) if anyres else ()
        expected = [list(pinpoint) for pinpoint in pinpoints]
        of_the_model = {"size": image_size, "crop_size": image_size, "image_grid_pinpoints": expected}
        fields = _read_fields(Path(folder), of_the_model)
        for key in ("do_resize", "do_rescale", "do_normalize"):
            fields.check(key, fields.get(key, True) is True, "true (nothing else is supported)")
        # Null never means transformers' default: for a flag it means no, and for a number it is an error.
        fields.check("use_square_size", fields.get("use_square_size", False) in (False, None), "false")
        kind = str(fields.get("image_processor_type", _PROCESSORS[model_type][0]))
        kind = kind.removesuffix("Fast").removesuffix("Pil")
        fields.check("image_processor_type", kind in _PROCESSORS[model_type], " or ".join(_PROCESSORS[model_type]))
        # In LLaVA-NeXT do_pad only fills up a batch with empty tiles. CLIP's processor has no padding to a square.
        pad, padder = fields.get("do_pad", False), kind == "LlavaImageProcessor"
        fields.check("do_pad", anyres or pad in (False, None) or (pad is True and padder), "false")

        size, tile = _read_edges(fields, "size"), f"{image_size}, the tile of the vision tower"
        fields.check("size", not anyres or size in (image_size, square), tile)
        if anyres or fields.get("do_center_crop", True) is True:
            fields.check("crop_size", _read_edges(fields, "crop_size") in (image_size, square), tile)
        else:
            fields.check("do_center_crop", size == square, f"true, unless size is {image_size}x{image_size}")
        resample = fields.get("resample", int(Image.Resampling.BICUBIC))
        fields.check("resample", type(resample) is int and 0 <= resample <= 5, "a Pillow filter from 0 to 5")
        mean, std = fields.three_numbers("image_mean", CLIP_MEAN), fields.three_numbers("image_std", CLIP_STD)
        fields.check("image_std", min(std) > 0, "positive numbers")
        factor = fields.number("rescale_factor", 1 / 255)
        same = not anyres or fields.get("image_grid_pinpoints", PINPOINTS) == expected
        fields.check("image_grid_pinpoints", same, f"config.json's {shown(expected)}")
        return cls(anyres, image_size, size, mean, std, factor, resample, pinpoints, pad is True and not anyres)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """An RGB image → pixel_values float32 [T, 3, S, S] and its (height, width).

        T is 1 for LLaVA-1.5 and 1 + tiles for LLaVA-NeXT, the thumbnail first. Raises InputError for another mode.
        """
        if image.mode != "RGB":
            raise InputError(f"expected an RGB picture, as open_image returns it, got mode {image.mode}")
        side, given = self.image_size, (image.height, image.width)
        if self.anyres:
            best = select_best_resolution(given, self.grid_pinpoints)
            thumbnail = np.asarray(_resize(image, (side, side), self.resample)).transpose(2, 0, 1)
            pixels = np.concatenate([thumbnail[None], self._tiles(image, best)])
        else:
            image = self._padded(image) if self.pad else image
            size = self._resized((image.height, image.width))
            tile = _resize_and_crop(image, size, side, self.resample)
            pixels = np.asarray(tile).transpose(2, 0, 1)[None]
        # A byte has 256 values: normalise these, in the order and precision of transformers, and look the pixels up in them.
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        values = np.empty(pixels.shape, dtype=np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            values[:, channel] = ((levels - np.float32(mean)) / np.float32(std))[pixels[:, channel]]
        return torch.from_numpy(values), given

    def seen(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what the model sees of a picture of (h, w). It exceeds a picture that is padded."""
        if self.anyres:
            return 0, 0, size[1], size[0]
        ends = []
        square = (max(size),) * 2 if self.pad else size
        for length, padded, resized in zip(size, square, self._resized(square), strict=True):
            first = (resized - self.image_size) // 2
            scale, before = padded / resized, (padded - length) // 2
            ends.append((math.floor(first * scale) - before, math.ceil((first + self.image_size) * scale) - before))
        (top, bottom), (left, right) = ends
        return left, top, right, bottom

    def _padded(self, image: Image.Image) -> Image.Image:
        """The picture in the middle of a square of the mean colour. A sliver that makes a huge one is shortened first."""
        side = max(image.height, image.width)
        if side * side > MAX_PIXELS:
            scale, side = math.isqrt(MAX_PIXELS) / side, math.isqrt(MAX_PIXELS)
            shorter = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
            image = image.resize(shorter[::-1], self.resample)
        red, green, blue = (min(max(int(value * 255), 0), 255) for value in self.mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """LLaVA-1.5: the size to which a picture of (h, w) is resized before its centre is cut out."""
        if isinstance(self.size, tuple):
            return self.size
        return int(self.size * size[0] / min(size)), int(self.size * size[1] / min(size))

    def _tiles(self, image: Image.Image, best: tuple[int, int]) -> np.ndarray[Any, Any]:
        """uint8 [T, 3, S, S]: the picture scaled into `best`, centred on black, cut into tiles row by row."""
        (height, width), side = best, self.image_size
        scale_y, scale_x = height / image.height, width / image.width
        if scale_x < scale_y:
            inner = (min(math.ceil(image.height * scale_x), height), width)
        else:
            inner = (height, min(math.ceil(image.width * scale_y), width))
        canvas = Image.new("RGB", (width, height))
        canvas.paste(_resize(image, inner, self.resample), ((width - inner[1]) // 2, (height - inner[0]) // 2))
        grid = np.asarray(canvas).reshape(height // side, side, width // side, side, 3)
        return grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)


def _read_fields(folder: Path, of_the_model: dict[str, Any]) -> JsonFields:
    """The fields of the folder's processor file. Without one they are `of_the_model`."""
    newer = JsonFields.of_file(folder / "processor_config.json", default={})
    if newer.given("image_processor"):
        return newer.section("image_processor")
    return JsonFields.of_file(folder / "preprocessor_config.json", default=of_the_model)


def _read_edges(fields: JsonFields, key: str) -> int | tuple[int, int]:
    """One number is the shortest edge, two are (height, width); 224 is transformers' default for every model."""
    value = fields.get(key, 224)
    if isinstance(value, dict):
        value = {name: edge for name, edge in value.items() if edge is not None}
        names = ["shortest_edge"] if len(value) == 1 else ["height", "width"]
        value = [value.get(name) for name in names] if len(value) == len(names) else []
    edges = value if isinstance(value, list) else [value]
    valid = 1 <= len(edges) <= 2 and all(type(edge) is int and 1 <= edge <= 2**16 for edge in edges)
    fields.check(key, valid, "shortest_edge, or height and width")
    return edges[0] if len(edges) == 1 else (edges[0], edges[1])


def _resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    height, width = size
    if width > image.width and width * image.height > MAX_PIXELS:
        # Pillow before 13 resizes all rows first. A sliver of millions of rows is shortened before it is widened.
        image = image.resize((image.width, height), resample)
    return image.resize((width, height), resample)


def _resize_and_crop(image: Image.Image, size: tuple[int, int], side: int, resample: int) -> Image.Image:
    """The central side x side square of `image` resized to `size`, with black around a smaller picture."""
    height, width = size
    top, left = (height - side) // 2, (width - side) // 2
    y0, y1 = max(top, 0), min(top + side, height)
    x0, x1 = max(left, 0), min(left + side, width)
    if height * width <= MAX_PIXELS:
        region = _resize(image, size, resample).crop((x0, y0, x1, y1))
    else:  # resize only the part that is kept
        first_y, last_y, *box_y = _source(image.height, height, y0, y1)
        first_x, last_x, *box_x = _source(image.width, width, x0, x1)
        part = image.crop((first_x, first_y, last_x, last_y))
        region = part.resize((x1 - x0, y1 - y0), resample, (box_x[0], box_y[0], box_x[1], box_y[1]))
    return region.crop((left - x0, top - y0, left - x0 + side, top - y0 + side))


def _source(length: int, resized: int, start: int, stop: int) -> tuple[int, int, float, float]:
    """The pixels [first, last) of an axis that make [start, stop) of the resized axis, and its start and stop from `first`.

    The pixels include the filter's reach (3 for Lanczos). Pillow holds start and stop in float32, so they must be small.
    """
    step = length / resized
    reach = 3 * max(step, 1) + 1
    first, last = max(int(start * step - reach), 0), min(math.ceil(stop * step + reach), length)
    return first, last, start * step - first, min(stop * step - first, last - first)
