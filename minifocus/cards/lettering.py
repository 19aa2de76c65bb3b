"""The fonts of each split, and the masks of single digits and letters. No font is in two splits.

The fonts come with matplotlib and with packages of fonts (``pip install 'minifocus[cards]'``). DejaVu, STIX and Caladea have
licences of their own that allow any use; the others are under the SIL Open Font Licence 1.1.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .packages import package_folder

_MATPLOTLIB = "mpl-data/fonts/ttf"
FONTS = {  # (package, file in it)
    "train": (
        *(("matplotlib", f"{_MATPLOTLIB}/DejaVu{name}.ttf") for name in ("Sans", "Sans-Bold", "SansMono-Bold")),
        *(("matplotlib", f"{_MATPLOTLIB}/DejaVu{name}.ttf") for name in ("Serif", "Serif-Bold", "Sans-BoldOblique")),
        *(("matplotlib", f"{_MATPLOTLIB}/STIX{name}.ttf") for name in ("GeneralBol", "GeneralBolIta")),
        *(("font_caladea", f"files/Caladea-{name}.ttf") for name in ("Regular", "Bold", "BoldItalic")),
        *(("font_hanken_grotesk", f"files/HankenGrotesk-{name}.otf") for name in ("Medium", "Bold", "BoldItalic")),
        *(("font_source_sans_pro", f"files/SourceSansPro-{name}.otf") for name in ("Semibold", "Black", "BoldIt")),
    ),
    "validation": (
        *(("font_manrope", f"files/Manrope-{name}.ttf") for name in ("Medium", "Bold")),
        ("font_fredoka_one", "files/FredokaOne-Regular.ttf"),
    ),
    "test": (
        *(("font_lato", f"files/Lato-{name}.ttf") for name in ("Regular", "Bold", "Black", "BoldItalic")),
        *(("font_source_serif_pro", f"files/SourceSerifPro-{name}.otf") for name in ("Semibold", "Bold")),
    ),
}
WIDEST = 14  # pixels; a wider letter is made narrower, so that letters at a pitch of 15 stay apart


@cache
def _font(split: str, font: int, capital: int) -> ImageFont.FreeTypeFont:
    """A font of the split in the size at which an H is about `capital` pixels high."""
    package, name = FONTS[split][font]
    file = str(package_folder(package) / name)
    _, top, _, bottom = ImageFont.truetype(file, 100).getbbox("H")
    return ImageFont.truetype(file, round(100 * capital / (bottom - top)))


@cache
def glyph_mask(split: str, font: int, capital: int, character: str) -> np.ndarray:
    """Coverage of a digit or letter, cropped to its ink: float32 [height, width, 1] in 0 … 1.

    `font` is a number in the split's FONTS, `capital` the height of an H in pixels.
    """
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).text((16, 8), character, font=_font(split, font, capital), fill=255, stroke_width=0.3)
    mask = mask.crop(mask.getbbox())
    if mask.width > WIDEST:
        mask = mask.resize((WIDEST, mask.height), Image.Resampling.LANCZOS)
    return np.asarray(mask, np.float32)[..., None] / 255
