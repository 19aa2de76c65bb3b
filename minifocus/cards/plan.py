"""What a scene is to have: its cards, signs, shapes, table or chart, each with its own layout, before it has a place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .lettering import FONTS, glyph_mask
from .scene import COLOURS, SHAPES, Box, Object
from .words import draw_word

PITCH = 15  # pixels between digits or letters; wider than a patch (14), so that two seldom share one
PLATE_HEIGHT = 26  # of a card or a sign, and of a table's row
BAR_STEP = 8  # pixels between two heights of bars
BAR_WIDTH, BAR_LEVELS = 13, 5


@dataclass(frozen=True)
class Plan:
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
        centre = (left + right) / 2 + (i - (len(text) - 1) / 2) * PITCH
        x, y = round(centre - w / 2), (top + bottom - h + 1) // 2
        boxes.append((x, y, x + w, y + h))
    return tuple(boxes)


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


class Planner:
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

    def plate(self, kind: str, colour: str) -> Plan:
        """A card with a number or a sign with a word."""
        digits = 3 if self.dense else int(self.rng.integers(1, 4))
        text = self.text(lambda: draw_word(self.rng, self.split) if kind == "sign" else _number(self.rng, digits))
        font, box = self.font(), (0, 0, (8 if kind == "card" else 12) + PITCH * len(text), PLATE_HEIGHT)
        glyphs = _glyphs(self.split, font, text, box)
        return Plan(box[2:], (Object(kind, colour, box, text, glyphs),), (font,))

    def table(self) -> Plan:
        """Two to four rows, each a swatch of colour and a number of two digits."""
        rows, fonts, font = [], [], self.font()
        for i, colour in enumerate(self.colours(int(self.rng.integers(2, 5)))):
            top = 2 + i * PLATE_HEIGHT
            text = self.text(lambda: _number(self.rng, 2))
            glyphs = _glyphs(self.split, font, text, (24, top, 26 + 2 * PITCH, top + PLATE_HEIGHT))
            rows.append(Object("row", colour, (2, top, 28 + 2 * PITCH, top + PLATE_HEIGHT - 1), text, glyphs))
            fonts.append(font)
        return Plan((30 + 2 * PITCH, 2 + len(rows) * PLATE_HEIGHT), tuple(rows), tuple(fonts), paper=True)

    def chart(self) -> Plan:
        """Three to five bars of different heights that stand on one line."""
        colours = self.colours(int(self.rng.integers(3, BAR_LEVELS + 1)))
        levels = self.rng.permutation(BAR_LEVELS)[: len(colours)]
        floor = 5 + BAR_STEP * (BAR_LEVELS + 1)
        bars = []
        for i, (colour, level) in enumerate(zip(colours, levels, strict=True)):
            left = 4 + i * (BAR_WIDTH + 3)
            bars.append(Object("bar", colour, (left, floor - BAR_STEP * (int(level) + 2), left + BAR_WIDTH, floor)))
        return Plan((5 + len(bars) * (BAR_WIDTH + 3), floor + 3), tuple(bars), (), paper=True)

    def shapes(self, count: int) -> list[Plan]:
        """Kinds repeat (that gives something to count), pairs of kind and colour do not."""
        kinds = self.rng.permutation(SHAPES)[: self.rng.integers(2, 5)]
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            pair = (str(self.rng.choice(kinds)), str(self.rng.choice(list(COLOURS))))
            pairs += [] if pair in pairs else [pair]
        plans = []
        for kind, colour in pairs:
            side = int(self.rng.integers(22, 33))
            plans.append(Plan((side, side), (Object(kind, colour, (0, 0, side, side)),), ()))
        return plans

    def everything(self) -> list[Plan]:
        """In the order in which they are placed: what is largest first."""
        rng, dense = self.rng, self.dense
        num_cards = int(rng.integers(6, 9) if dense else rng.integers(3, 6))
        num_signs = int(rng.integers(0, 2) if dense else rng.integers(0, 3))
        num_shapes = 1 if dense else int(rng.integers(2, 6))
        panels = [self.table() if rng.random() < 0.5 else self.chart()] if rng.random() < 0.5 else []
        plates = [self.plate("card", colour) for colour in self.colours(num_cards)]
        plates += [self.plate("sign", colour) for colour in self.colours(num_signs)]
        things = plates + self.shapes(num_shapes)
        return panels + [things[i] for i in rng.permutation(len(things))]
