"""Pictures that any computer can draw, with questions whose answers are known.

A scene is a grey, textured canvas with coloured cards (one to three digits, or a short word) and coloured shapes, laid
out in clusters, so that about half of it is empty. Four families of questions are asked about it:

- ``read``: what number is on the red card?
- ``perceive``: is there a blue star, how many circles are there, what colour is the triangle?
- ``reason``: which of two cards has the larger number, is a number even or odd?
- ``relate``: what is directly to the left of the red card?

Everything follows from one integer seed: the same seed gives the same bytes. Training, validation and test scenes come
from seed ranges that never meet (``splits.py``). No two cards of a scene share a colour and no two shapes share both kind
and colour, so that "the red card" and "the green circle" always name one thing.

One concession to the small model these scenes are drawn for: text keeps clear of the lines at which LLaVA-NeXT cuts the
resized picture into tiles of 112 pixels, and a relation is asked of two things on the same tile. A digit is a tenth of
such a tile (of a 336-pixel tile it would be a thirtieth), and a digit that is cut in two is often unreadable to anyone.
Cards and shapes themselves are cut freely.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..inputs.anyres import select_best_resolution
from .question_families import ask
from .scene import COLOURS, PINPOINTS, SHAPES, TILE, WORDS, Box, Object, Scene

_DIGIT_PITCH = 15  # wider than a patch (14), so that two digits of a card seldom share one
_CARD_HEIGHT = 26
_FONT_SIZE = 18
_GAP = 3  # least number of pixels between two objects


def _seams(width: int, height: int) -> tuple[list[float], list[float]]:
    """Columns and rows of a canvas at which its resized, centred copy is cut into tiles."""
    h, w = select_best_resolution((height, width), PINPOINTS)
    scale = min(w / width, h / height)
    left, top = (w - width * scale) / 2, (h - height * scale) / 2
    return (
        [(x - left) / scale for x in range(TILE, w, TILE)],
        [(y - top) / scale for y in range(TILE, h, TILE)],
    )


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A smooth grey gradient, blotches or stripes, and grain. Returns float32 [height, width, 3]."""
    coarse = rng.uniform(75, 185) + rng.uniform(-12, 12, 3) + rng.uniform(-30, 30, (4, 4, 1))
    canvas = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(canvas, np.float32)
    texture = rng.integers(3)
    if texture == 1:
        blotches = Image.fromarray(rng.integers(0, 25, (height // 8, width // 8), np.uint8))
        pixels = pixels + np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC), np.float32)[..., None]
    elif texture == 2:
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 20)
        y, x = np.mgrid[:height, :width]
        stripes = 8 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        pixels = pixels + stripes[..., None].astype(np.float32)
    return pixels + rng.normal(0, 3, (height, width, 1)).astype(np.float32)


@cache
def _shape_mask(kind: str, size: int) -> np.ndarray:
    """Coverage of a shape that fills a square of ``size`` pixels: float32 [size, size, 1] in 0 … 1."""
    big = 4 * size
    mask = Image.new("L", (big, big), 0)
    pen, last = ImageDraw.Draw(mask), big - 1
    if kind == "circle":
        pen.ellipse((0, 0, last, last), fill=255)
    elif kind == "square":
        pen.rectangle((0.06 * last, 0.06 * last, 0.94 * last, 0.94 * last), fill=255)
    elif kind == "triangle":
        pen.polygon([(last / 2, 0), (last, 0.95 * last), (0, 0.95 * last)], fill=255)
    else:
        corners = []
        for i in range(10):
            radius, angle = (0.5 if i % 2 == 0 else 0.21) * last, -math.pi / 2 + i * math.pi / 5
            corners.append((last / 2 + radius * math.cos(angle), 0.53 * last + radius * math.sin(angle)))
        pen.polygon(corners, fill=255)
    return np.asarray(mask.resize((size, size), Image.Resampling.LANCZOS), np.float32)[..., None] / 255


@cache
def _text_mask(text: str) -> np.ndarray:
    """Coverage of one digit or one word, drawn boldly and cropped to its ink: float32 [height, width, 1]."""
    mask = Image.new("L", (96, 48), 0)
    font = ImageFont.load_default(_FONT_SIZE)
    ImageDraw.Draw(mask).text((16, 8), text, font=font, fill=255, stroke_width=0.4)
    return np.asarray(mask.crop(mask.getbbox()), np.float32)[..., None] / 255


def _card_glyphs(text: str, left: int, top: int, width: int) -> tuple[Box, ...]:
    """Boxes of the digits of a number (evenly spaced), or of a word as a whole, on a card at (left, top)."""
    parts = list(text) if text.isdigit() else [text]
    boxes = []
    for i, part in enumerate(parts):
        h, w = _text_mask(part).shape[:2]
        centre = left + width / 2 + (i - (len(parts) - 1) / 2) * _DIGIT_PITCH
        x, y = round(centre - w / 2), top + (_CARD_HEIGHT - h) // 2
        boxes.append((x, y, x + w, y + h))
    return tuple(boxes)


def _card_width(text: str) -> int:
    return 8 + (_DIGIT_PITCH * len(text) if text.isdigit() else _text_mask(text).shape[1] + 2)


def _paint(pixels: np.ndarray, thing: Object, rng: np.random.Generator) -> None:
    left, top, right, bottom = thing.box
    colour = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    area = pixels[top:bottom, left:right]
    if thing.kind != "card":
        mask = _shape_mask(thing.kind, right - left)
        area[:] = area * (1 - mask) + colour * mask
        return
    area[:] = colour
    ink = 15.0 if colour @ (0.3, 0.59, 0.11) > 125 else 245.0
    parts = list(thing.text) if thing.number is not None else [thing.text]
    for part, (x0, y0, x1, y1) in zip(parts, thing.glyphs, strict=True):
        mask = _text_mask(part)
        pixels[y0:y1, x0:x1] = pixels[y0:y1, x0:x1] * (1 - mask) + ink * mask


def _contents(rng: np.random.Generator, dense: bool) -> list[tuple[str, str, str]]:
    """(kind, colour, text) of the objects of a scene; each card's colour, number and word occurs once."""
    names = list(COLOURS)
    num_cards = rng.integers(6, 9) if dense else rng.integers(3, 7)
    num_shapes = rng.integers(0, 3) if dense else rng.integers(2, 7)
    things, used = [], set()
    for colour in rng.permutation(names)[:num_cards]:
        text = ""
        while not text or text in used:
            digits = 3 if dense else rng.integers(1, 4)
            is_word = not dense and rng.random() < 0.25
            text = str(rng.choice(WORDS)) if is_word else str(rng.integers(10 ** (digits - 1), 10**digits))
        used.add(text)
        things.append(("card", str(colour), text))
    # Kinds repeat (that gives something to count), pairs of kind and colour do not.
    kinds = rng.permutation(SHAPES)[: rng.integers(2, 5)]
    while len(things) < num_cards + num_shapes:
        kind, colour = str(rng.choice(kinds)), str(rng.choice(names))
        if (kind, colour, "") not in things:
            things.append((kind, colour, ""))
    return [things[i] for i in rng.permutation(len(things))]


def _gap(a: Box, b: Box) -> int:
    """Pixels between two boxes along the axis that separates them most; negative when they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _place(rng: np.random.Generator, size: tuple[int, int], dense: bool, seams: bool) -> list[Object]:
    """Lay the objects out in clusters: most go next to one that is there already. What finds no room is left out."""
    width, height = size
    columns, rows = _seams(width, height) if seams else ([], [])
    centres = rng.uniform(0.2, 0.8, (2 if dense else int(rng.integers(2, 4)), 2)) * size
    placed: list[Object] = []
    for kind, colour, text in _contents(rng, dense):
        side = int(rng.integers(24, 33))
        w, h = (_card_width(text), _CARD_HEIGHT) if kind == "card" else (side, side)
        for attempt in range(80):
            if placed and rng.random() < 0.7:  # next to another object, with edges or middles roughly in line
                l0, t0, r0, b0 = placed[rng.integers(len(placed))].box
                gap, slip = int(rng.integers(_GAP, 9)), rng.integers(-5, 6)
                x, y = (l0 + r0 - w) // 2 + int(slip), (t0 + b0 - h) // 2 + int(slip)
                match rng.integers(4):
                    case 0:
                        x = l0 - gap - w
                    case 1:
                        x = r0 + gap
                    case 2:
                        y = t0 - gap - h
                    case _:
                        y = b0 + gap
            else:
                middle = centres[rng.integers(len(centres))] + rng.normal(0, 16 + attempt, 2)
                x, y = (middle - (w / 2, h / 2)).astype(int)
            box = (int(x), int(y), int(x) + w, int(y) + h)
            if min(box[:2]) < 1 or box[2] >= width or box[3] >= height:
                continue
            if any(_gap(box, other.box) < _GAP for other in placed):
                continue
            glyphs = _card_glyphs(text, box[0], box[1], w) if text else ()
            if glyphs and any(glyphs[0][0] - 1 < c < glyphs[-1][2] + 1 for c in columns):
                continue
            if any(y0 - 1 < r < y1 + 1 for r in rows for _, y0, _, y1 in glyphs[:1]):
                continue
            placed.append(Object(kind, colour, box, text, glyphs))
            break
    return placed


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height): the long side 224 … 352 pixels, the short one at least 140, any aspect ratio between."""
    long = int(rng.integers(224, 353))
    short = int(rng.integers(max(140, long // 2), long + 1))
    return (long, short) if rng.random() < 0.5 else (short, long)


def draw(seed: int, dense: bool = False, size: tuple[int, int] | None = None) -> Scene:
    """Draw the scene of a seed and ask about it.

    ``dense`` puts six to eight cards of three digits each into tight clusters. ``size`` (width, height) replaces the
    random canvas; such a canvas need not be one that is cut into tiles, so text is then placed anywhere.
    """
    rng = np.random.default_rng([seed, int(dense)])
    drawn = _canvas_size(rng)
    width, height = size or drawn
    if size is None and dense:
        width, height = max(width, 200), max(height, 200)
    pixels = _background(rng, width, height)
    objects = _place(rng, (width, height), dense, seams=size is None)
    for thing in objects:
        _paint(pixels, thing, rng)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    tiles = _seams(width, height) if size is None else ([], [])
    return Scene(seed, image, objects, ask(rng, objects, tiles))
