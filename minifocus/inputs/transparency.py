"""A picture's transparent parts, put over white. An alpha channel, the palette, or one key value in the file can make them.

Pillow gives the key value in info["transparency"] as it is in the file. But it widens a PNG's shallow greys and narrows its
deep colours, and tells their depth only until the pixels are loaded. PNG viewers compare the stored samples with the key by
exactly the bits that a sample has.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from ..arguments import shown
from ..errors import InputError

_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Stored:
    """What a Pillow image tells about its file only until the pixels are loaded.

    clear  info["transparency"], without that of a tRNS chunk after the pixels, which is not valid
    bits   the bits of a sample: 2, 4 or 8, or 16 for colours; None: not known
    low    the low bytes of a PNG of 16-bit colours, of which Pillow keeps the high ones
    frame  (left, top, right, bottom) of a GIF's first frame; the canvas around it is transparent
    """

    clear: Any = None
    bits: int | None = None
    low: Image.Image | None = None
    frame: tuple[int, ...] | None = None

    @classmethod
    def of(cls, image: Image.Image) -> Stored:
        clear = image.info.get("transparency")
        tiles = getattr(image, "tile", None) if image.tell() == 0 else None
        if image.format not in ("PNG", None):  # None: the caller made the image
            return cls(clear, bits=8, frame=tuple(tiles[0][1]) if tiles and image.format == "GIF" else None)
        if not tiles or clear is None:
            return cls(clear)
        sample = tiles[0][3]
        if sample == "RGB;16B":
            return cls(clear, bits=16, low=_low_bytes(image))
        return cls(clear, bits={"L;2": 2, "L;4": 4}.get(sample, 8))

    def opaque(self, image: Image.Image, name: str) -> Image.Image | None:
        """[height, width], mode "L": 0 where `clear` or `frame` makes the loaded image transparent; None if nowhere.

        `clear` is ignored in modes for which Pillow gives it no meaning. Raises InputError for one that does not fit the mode.
        """
        opaque = None if self.clear is None else self._by_value(image, name)
        if self.frame is None or self.frame == (0, 0, *image.size):
            return opaque
        inside = Image.new("L", image.size, 0)
        left, top, right, bottom = self.frame
        inside.paste(255, (left, top, right, bottom))
        return inside if opaque is None else ImageChops.darker(inside, opaque)

    def _by_value(self, image: Image.Image, name: str) -> Image.Image | None:
        clear, mode = self.clear, image.mode
        one = int(clear) if isinstance(clear, numbers.Integral) else None

        def refusal(expected: str) -> InputError:
            named = f"{name}: info['transparency'] of a picture of mode {mode}"
            return InputError(f"{named}: expected {expected}, got {shown(clear)}")

        if mode == "P":
            alphas = [255] * 256
            if one is not None and 0 <= one < 256:
                alphas[one] = 0
            elif isinstance(clear, bytes | bytearray):
                alphas[: min(len(clear), 256)] = clear[:256]
            else:
                raise refusal("an entry of the palette, or bytes")
            return image.point(alphas, "L")
        if mode == "RGB":
            colour = isinstance(clear, tuple | list) and all(isinstance(value, numbers.Integral) for value in clear)
            if not (colour and len(clear) == 3):
                raise refusal("three whole numbers")
            key = [int(value) for value in clear]
            # Where the bits are not known, a key above 255 means 16. The low bytes are then lost, and the high ones decide.
            deep = max(key) > 255 if self.bits is None else self.bits == 16
            values = [value >> 8 if deep else value for value in key]
            bands = image.split()
            if self.low is not None:
                bands, values = bands + self.low.split(), values + key
            first, *others = (_differs(band, value & 255) for band, value in zip(bands, values, strict=True))
            for other in others:
                first = ImageChops.lighter(first, other)
            return first
        if mode not in ("1", "L", "F") and not mode.startswith("I"):
            return None
        if one is None:
            raise refusal("a whole number")
        if mode == "1":
            return _differs(image.convert("L"), 255 * (one & 1))  # older versions have 1 there, newer ones 255
        if mode == "L":
            top = 2 ** (self.bits or _bits(image, one)) - 1
            return _differs(image, (one & top) * (255 // top))
        return Image.fromarray(np.where(np.asarray(image) == one, np.uint8(0), np.uint8(255)))


def over_white(image: Image.Image, opaque: Image.Image | None) -> Image.Image:
    """A loaded image as a new one in RGB, over white where it is transparent itself or by `opaque`."""
    if image.mode in ("RGBa", "La"):  # colours already multiplied by their alpha
        image = image.convert(image.mode.upper())
    if opaque is not None:
        image = image.copy()
        image.info.pop("transparency", None)  # Pillow would apply it too, and to the original's palette
    if image.mode == "P" and not (image.palette and image.palette.mode.endswith("A")):
        image = image.convert("RGB")  # a palette without alpha may hold anything after its colours
    if opaque is not None or image.mode == "P" or "A" in image.getbands():
        image = image.convert("RGBA")
        if opaque is not None:
            image.putalpha(ImageChops.darker(image.getchannel("A"), opaque))
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image.convert("RGB")


def _low_bytes(image: Any) -> Image.Image:
    """The low bytes of a PNG's 16-bit colours: the file is read once more in the other byte order."""
    again: Any = Image.open(image.fp, formats=["PNG"])
    again.tile = [(*again.tile[0][:3], "RGB;16L")]
    again.load()
    low: Image.Image = again
    return low


def _bits(image: Image.Image, key: int) -> int:
    """The fewest bits with which a PNG can store the values of a loaded grey picture and its key."""
    present = [value for value, count in enumerate(image.histogram()) if count]
    for bits, step in ((2, 85), (4, 17)):
        if key < 2**bits and not any(value % step for value in present):
            return bits
    return 8


def _differs(band: Image.Image, value: int) -> Image.Image:
    """0 where an 8-bit band is `value`, else 255."""
    return band.point([0 if level == value else 255 for level in range(256)])
