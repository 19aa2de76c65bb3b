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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ..inputs.anyres import select_best_resolution
from .backgrounds import draw_background, draw_distractor
from .lettering import FONTS, glyph_mask
from .question_families import ask
from .scene import COLOURS, PINPOINTS, SHAPES, TILE, Box, Object, Scene, split_of
from .words import draw_word

_PITCH = 15  # of digits and letters; wider than a patch (14), so that two seldom share one
_PLATE_HEIGHT = 26  # of a card or a sign, and of a table's row
_GAP = 3  # least number of pixels between two objects
BAR_STEP = 8  # pixels between two heights of bars
_BAR_WIDTH, _BAR_LEVELS = 13, 5
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


@dataclass(frozen=True)
class _Plan:
    """Something to be placed as a whole: a card, a sign, a shape, or a panel (a table or a chart) with its parts.

    size    (width, height)
    parts   the objects that it consists of, with their boxes as if it stood at (0, 0)
    fonts   per part, the number of its font and the height of its capitals
    paper   whether it lies on a sheet of its own: a panel
    """

    size: tuple[int, int]
    parts: tuple[Object, ...]
    fonts: tuple[tuple[int, int], ...]
    paper: bool = False

    def at(self, x: int, y: int) -> list[Object]:
        def moved(box: Box) -> Box:
            return (box[0] + x, box[1] + y, box[2] + x, box[3] + y)

        return [replace(part, box=moved(part.box), glyphs=tuple(map(moved, part.glyphs))) for part in self.parts]


def _glyphs(split: str, font: tuple[int, int], text: str, area: Box) -> tuple[Box, ...]:
    """Boxes of the digits or letters of a text, evenly spaced, in the middle of an area."""
    left, top, right, bottom = area
    boxes = []
    for i, character in enumerate(text):
        h, w = glyph_mask(split, *font, character).shape[:2]
        centre = (left + right) / 2 + (i - (len(text) - 1) / 2) * _PITCH
        x, y = round(centre - w / 2), (top + bottom - h + 1) // 2
        boxes.append((x, y, x + w, y + h))
    return tuple(boxes)


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


class _Planner:
    """What a scene is to have: each colour once a kind, each text once."""

    def __init__(self, rng: np.random.Generator, split: str, dense: bool):
        self.rng, self.split, self.dense = rng, split, dense
        self.texts: set[str] = set()

    def font(self) -> tuple[int, int]:
        return int(self.rng.integers(len(FONTS[self.split]))), int(self.rng.integers(11, 14))

    def text(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self.texts:
            pass
        self.texts.add(text)
        return text

    def colours(self, count: int) -> list[str]:
        return [str(colour) for colour in self.rng.permutation(list(COLOURS))[:count]]

    def plate(self, kind: str, colour: str) -> _Plan:
        """A card with a number or a sign with a word."""
        digits = 3 if self.dense else int(self.rng.integers(1, 4))
        text = self.text(lambda: draw_word(self.rng, self.split) if kind == "sign" else _number(self.rng, digits))
        font, box = self.font(), (0, 0, (8 if kind == "card" else 12) + _PITCH * len(text), _PLATE_HEIGHT)
        glyphs = _glyphs(self.split, font, text, box)
        return _Plan(box[2:], (Object(kind, colour, box, text, glyphs),), (font,))

    def table(self) -> _Plan:
        """Two to four rows, each a swatch of colour and a number of two digits."""
        rows, fonts, font = [], [], self.font()
        for i, colour in enumerate(self.colours(int(self.rng.integers(2, 5)))):
            top = 2 + i * _PLATE_HEIGHT
            text = self.text(lambda: _number(self.rng, 2))
            glyphs = _glyphs(self.split, font, text, (24, top, 26 + 2 * _PITCH, top + _PLATE_HEIGHT))
            rows.append(Object("row", colour, (2, top, 28 + 2 * _PITCH, top + _PLATE_HEIGHT - 1), text, glyphs))
            fonts.append(font)
        return _Plan((30 + 2 * _PITCH, 2 + len(rows) * _PLATE_HEIGHT), tuple(rows), tuple(fonts), paper=True)

    def chart(self) -> _Plan:
        """Three to five bars of different heights that stand on one line."""
        colours = self.colours(int(self.rng.integers(3, _BAR_LEVELS + 1)))
        levels = self.rng.permutation(_BAR_LEVELS)[: len(colours)]
        floor = 5 + BAR_STEP * (_BAR_LEVELS + 1)
        bars = []
        for i, (colour, level) in enumerate(zip(colours, levels, strict=True)):
            left = 4 + i * (_BAR_WIDTH + 3)
            bars.append(Object("bar", colour, (left, floor - BAR_STEP * (int(level) + 2), left + _BAR_WIDTH, floor)))
        return _Plan((5 + len(bars) * (_BAR_WIDTH + 3), floor + 3), tuple(bars), (), paper=True)

    def shapes(self, count: int) -> list[_Plan]:
        """Kinds repeat (that gives something to count), pairs of kind and colour do not."""
        kinds = self.rng.permutation(SHAPES)[: self.rng.integers(2, 5)]
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            pair = (str(self.rng.choice(kinds)), str(self.rng.choice(list(COLOURS))))
            pairs += [] if pair in pairs else [pair]
        plans = []
        for kind, colour in pairs:
            side = int(self.rng.integers(22, 33))
            plans.append(_Plan((side, side), (Object(kind, colour, (0, 0, side, side)),), ()))
        return plans

    def everything(self) -> list[_Plan]:
        """In the order in which they are placed: what is largest first."""
        rng, dense = self.rng, self.dense
        num_cards = int(rng.integers(6, 9) if dense else rng.integers(3, 6))
        num_signs, num_shapes = (
            (int(rng.integers(0, 2)), 1) if dense else (int(rng.integers(0, 3)), int(rng.integers(2, 6)))
        )
        panels = [self.table() if rng.random() < 0.5 else self.chart()] if rng.random() < 0.5 else []
        plates = [self.plate("card", colour) for colour in self.colours(num_cards)]
        plates += [self.plate("sign", colour) for colour in self.colours(num_signs)]
        things = plates + self.shapes(num_shapes)
        return panels + [things[i] for i in rng.permutation(len(things))]


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


def _place(rng: np.random.Generator, size: tuple[int, int], plans: list[_Plan], seams: bool) -> list[tuple[_Plan, Box]]:
    """A box for each plan, anywhere or next to one that is there already. What finds no room is left out."""
    width, height = size
    columns, rows = _seams(width, height) if seams else ([], [])
    placed: list[tuple[_Plan, Box]] = []
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


def _paint(pixels: np.ndarray, split: str, plan: _Plan, corner: tuple[int, int], rng: np.random.Generator) -> None:
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
    placed = _place(rng, (width, height), _Planner(rng, split, dense).everything(), seams=size is None)
    distractors = _distract(rng, pixels, [box for _, box in placed])
    for plan, box in placed:
        _paint(pixels, split, plan, box[:2], rng)
    objects = [thing for plan, box in placed for thing in plan.at(*box[:2])]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    tiles = _seams(width, height) if size is None else ([], [])
    return Scene(seed, image, objects, ask(rng, objects, tiles), distractors)
