"""A picture file or a Pillow image → RGB, as a viewer shows it."""

from __future__ import annotations

import math
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..arguments import whole
from ..errors import InputError
from ..files.reading import FILE, kind, named, opened
from .transparency import Stored, over_white

MAX_PIXELS = 89_478_485  # 1 GiB / 12: Pillow's own warning limit, which this package enforces itself, as an error

# A closed list, because other plugins do more than decode: EPS runs Ghostscript, and ICO and ICNS hold a second size.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
_AS_CONTENT = "; a file's content goes in as PIL.Image.open(io.BytesIO(content))"
_ORIENTATION = {  # EXIF tag 0x0112 → what a viewer does
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: str | os.PathLike[str] | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file or a Pillow image as RGB, as a viewer shows it: upright, first frame, transparency over white.

    The size is checked before anything is decoded. Raises InputError, naming the file, for a missing or unreadable
    file, a picture without pixels, and one of more than `max_pixels`.
    """
    limit = whole("max_pixels", max_pixels, 1)
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", None)
        return _read(
            source, named(file) if file and isinstance(file, str | bytes | os.PathLike) else "the picture", limit
        )
    if not isinstance(source, str | bytes | os.PathLike):
        raise InputError(f"a picture must be a path or a PIL.Image, got {type(source).__name__}{_AS_CONTENT}")
    path = os.fsdecode(source)
    found = kind(path)
    if found != FILE:
        hint = ""
        if "://" in path[:16]:
            hint = "; a picture is not fetched from a URL"
        elif path[:5].lower() == "data:" or "\0" in path or len(path) > 255:
            hint = _AS_CONTENT
        raise InputError(f"{named(path)}: expected a picture file, found {found}{hint}")
    with opened(path, InputError) as stream:
        return _read(stream, named(path), limit)


def _read(source: Image.Image | BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name, max_pixels)
        Image.init()  # registers every decoder of this Pillow
        with Image.open(source, formats=[known for known in _FORMATS if known in Image.OPEN]) as image:
            return _to_rgb(image, name, max_pixels)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        formats = ", ".join(_FORMATS)
        raise InputError(f"{name}: not a picture that can be read: expected one of {formats}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: over the limit of {max_pixels} pixels: {error}") from error
    except Exception as error:  # on damaged data, Pillow's decoders raise nearly any class
        raise InputError(f"{name}: not a picture that can be read: {str(error)[:300]}") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        pixels = f"{height}x{width} = {width * height} pixels"
        raise InputError(f"{name}: {pixels} (height x width) are over the limit of {max_pixels}")
    if width * height == 0:
        raise InputError(f"{name}: a picture without pixels ({height}x{width})")
    stored = Stored.of(image)
    image.load()
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # a viewer shows the picture even when its metadata is damaged
        orientation = None
    opaque = stored.opaque(image, name)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image, name)
    image = over_white(image, opaque)
    image = image.transpose(_ORIENTATION[orientation]) if orientation in _ORIENTATION else image
    image.info = {}  # the orientation has been applied and must not be again
    return image


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """A deep grey picture as 8-bit grey, rescaled where Pillow would clip.

    16-bit values span 0…65535, other whole numbers 0…255 or 0…65535, floats 0…1 or 0…255. For values outside of that no
    white is known, so their own range is used.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise InputError(f"{name}: the picture holds NaN or infinite values")
    # Pillow also reads 16-bit files as 32-bit integers: all such PPMs and, in older versions, such PNGs.
    deep = image.mode != "I" or image.format in ("PNG", "PPM")
    for white in (1.0, 255.0) if image.mode == "F" else (65535.0,) if deep else (255.0, 65535.0):
        if low >= 0 and high <= white:
            low, high = 0.0, white
            break
    values -= low
    values *= 255.0 / ((high - low) or 1.0)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))
