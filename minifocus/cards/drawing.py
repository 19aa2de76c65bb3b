"""Pictures that any computer can draw, with questions whose answers are known.

A scene is a photograph or a texture with confetti, and on it, all over the picture: coloured cards with one to three digits,
signs with a word, coloured shapes, a table of numbers or a chart of bars. Between them are bright shapes that are never asked
about. Four families of questions are asked about it:

- ``read``: what number is on the red card, what word is on the blue sign, what number is beside green in the table?
- ``perceive``: is there a blue star, how many circles are there, what colour is the triangle?
- ``reason``: which of two cards has the larger number, is a number even or odd, which bar is the tallest?
- ``relate``: what is directly to the left of the red card?

Everything follows from one integer seed: the same seed gives the same bytes, with the same Pillow, fonts and photographs.
Training, validation and test scenes come from seed ranges that never meet, and share no photograph, kind of texture, font or
word. No two things of a kind share a colour, so that "the red card" and "the green circle" always name one thing.

One concession to the small model these scenes are drawn for: text and charts keep clear of the lines at which LLaVA-NeXT cuts
the resized picture into tiles of 112 pixels, and a relation is asked of two things on the same tile. A digit is a tenth of
such a tile (of a 336-pixel tile it would be a thirtieth), and a digit that is cut in two is often unreadable to anyone.
Cards and shapes themselves are cut freely.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ..inputs.anyres import select_best_resolution
from .backgrounds import draw_background, draw_distractor
from .lettering import glyph_mask
from .plan import Plan, Planner
from .question_families import ask
from .scene import COLOURS, PINPOINTS, SHAPES, TILE, Box, Scene, split_of

_GAP = 3  # least number of pixels between two objects
_PAPER = (242.0, 240.0, 232.0)  # of signs, tables and charts


def _seams(width: int, height: int) -> tuple[list[float], list[float]]:
    """Columns and rows of a canvas at which its resized, centred copy is cut into tiles."""
    h, w = select_best_resolution((height, width), PINPOINTS)
    scale = min(w / width, h / height)
    left, top = (w - width * scale) / 2, (h - height * scale) / 2
    return (
        [(x - left) / scale for x in range(TILE, w, TILE)],
        [(y - top) / scale for y in range(TILE, h, TILE)],
    )


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


def _gap(a: Box, b: Box) -> int:
    """Pixels between two boxes along the axis that separates them most; negative when they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _beside(rng: np.random.Generator, box: Box, width: int, height: int) -> tuple[int, int]:
    """A corner for something of this size next to a box, with edges or middles roughly in line."""
    left, top, right, bottom = box
    gap, slip = int(rng.integers(_GAP, 9)), int(rng.integers(-5, 6))
    x, y = (left + right - width) // 2 + slip, (top + bottom - height) // 2 + slip
    match rng.integers(4):
        case 0:
            return left - gap - width, y
        case 1:
            return right + gap, y
        case 2:
            return x, top - gap - height
        case _:
            return x, bottom + gap


def _place(rng: np.random.Generator, size: tuple[int, int], plans: list[Plan], seams: bool) -> list[tuple[Plan, Box]]:
    """A box for each plan, anywhere or next to one that is there already. What finds no room is left out."""
    width, height = size
    columns, rows = _seams(width, height) if seams else ([], [])
    placed: list[tuple[Plan, Box]] = []
    for plan in plans:
        w, h = plan.size
        if w + 2 >= width or h + 2 >= height:
            continue
        for _ in range(80):
            if placed and rng.random() < 0.6:
                x, y = _beside(rng, placed[rng.integers(len(placed))][1], w, h)
            else:
                x, y = int(rng.integers(1, width - w)), int(rng.integers(1, height - h))
            box = (x, y, x + w, y + h)
            if min(x, y) < 1 or box[2] >= width or box[3] >= height:
                continue
            if any(_gap(box, other) < _GAP for _, other in placed):
                continue
            whole = [part.glyphs or ((part.box,) if plan.paper else ()) for part in plan.at(x, y)]
            if any(of[0][0] - 1 < c < of[-1][2] + 1 for of in whole if of for c in columns):
                continue
            if any(min(b[1] for b in of) - 1 < r < max(b[3] for b in of) + 1 for of in whole if of for r in rows):
                continue
            placed.append((plan, box))
            break
    return placed


def _paint(pixels: np.ndarray, split: str, plan: Plan, corner: tuple[int, int], rng: np.random.Generator) -> None:
    x, y = corner
    if plan.paper:
        pixels[y : y + plan.size[1], x : x + plan.size[0]] = _PAPER
    for k, thing in enumerate(plan.at(x, y)):
        left, top, right, bottom = thing.box
        colour = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
        area, ink = pixels[top:bottom, left:right], 15.0
        if thing.kind in SHAPES:
            mask = _shape_mask(thing.kind, right - left)
            area[:] = area * (1 - mask) + colour * mask
        elif thing.kind == "row":
            area[3:-3, 2:20] = colour
            pixels[bottom, left:right] = 150.0  # the line below the row
        else:
            area[:] = colour
            if thing.kind == "sign":
                area[3:-3, 3:-3] = _PAPER
            elif thing.kind == "card":
                ink = 15.0 if colour @ (0.3, 0.59, 0.11) > 125 else 245.0
        for character, (x0, y0, x1, y1) in zip(thing.text, thing.glyphs, strict=True):
            mask = glyph_mask(split, *plan.fonts[k], character)
            pixels[y0:y1, x0:x1] = pixels[y0:y1, x0:x1] * (1 - mask) + ink * mask


def _distract(rng: np.random.Generator, pixels: np.ndarray, taken: list[Box]) -> list[Box]:
    """Fill the gaps between things with bright shapes that nobody asks about; returns their boxes."""
    height, width = pixels.shape[:2]
    found: list[Box] = []
    for _ in range(width * height // 1500):
        side = int(rng.integers(12, 31))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        box = (x, y, x + side, y + side)
        if all(_gap(box, other) >= 2 for other in taken + found):
            draw_distractor(rng, pixels, box)
            found.append(box)
    return found


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height): the long side 224 … 352 pixels, the short one at least 140, any aspect ratio between."""
    long = int(rng.integers(224, 353))
    short = int(rng.integers(max(140, long // 2), long + 1))
    return (long, short) if rng.random() < 0.5 else (short, long)


def draw(seed: int, dense: bool = False, size: tuple[int, int] | None = None) -> Scene:
    """Draw the scene of a seed and ask about it.

    ``dense`` puts six to eight cards of three digits each on the canvas, with few other things. ``size`` (width, height)
    replaces the random canvas; such a canvas need not be one that is cut into tiles, so text is then placed anywhere. Raises
    InputError for a seed of no split, and where the fonts or photographs are not installed.
    """
    split = split_of(seed)
    rng = np.random.default_rng([seed, int(dense)])
    drawn = _canvas_size(rng)
    width, height = size or drawn
    if size is None and dense:
        width, height = max(width, 200), max(height, 200)
    pixels = draw_background(rng, split, width, height)
    placed = _place(rng, (width, height), Planner(rng, split, dense).everything(), seams=size is None)
    distractors = _distract(rng, pixels, [box for _, box in placed])
    for plan, box in placed:
        _paint(pixels, split, plan, box[:2], rng)
    objects = [thing for plan, box in placed for thing in plan.at(*box[:2])]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    tiles = _seams(width, height) if size is None else ([], [])
    return Scene(seed, image, objects, ask(rng, objects, tiles), distractors)
