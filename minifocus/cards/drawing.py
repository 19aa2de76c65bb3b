"""Pictures that can be drawn anywhere, and questions about them whose answers are known.

A scene is a grey, textured canvas with coloured cards (one to three digits, or a short word) and coloured shapes, laid
out in clusters, so that about half of it is empty. Four families of questions are asked about it:

- ``read``: what number is on the red card?
- ``perceive``: is there a blue star, how many circles are there, what colour is the triangle?
- ``reason``: which of two cards has the larger number, is a number even or odd?
- ``relate``: what is directly to the left of the red card?

Everything follows from one integer seed: the same seed gives the same bytes. Training, validation and test scenes come
from seed ranges that never meet (``SPLITS``). No two cards of a scene share a colour and no two shapes share both kind
and colour, so that "the red card" and "the green circle" always name one thing.

One concession to the small model these scenes are drawn for: text keeps clear of the lines at which LLaVA-NeXT cuts the
resized picture into tiles of 112 pixels, and a relation is asked of two things on the same tile. A digit is a tenth of
such a tile (of a 336-pixel tile it would be a thirtieth), and one that is cut in two is often unreadable to man and
machine. Cards and shapes themselves are cut freely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..arguments import shown
from ..errors import InputError
from ..inputs.anyres import select_best_resolution
from ..inputs.conversations import Conversation, Turn
from ..inputs.template_writer import IMAGE

FAMILIES = ("read", "perceive", "reason", "relate")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 210, 40),
    "orange": (240, 135, 25),
    "purple": (140, 50, 180),
    "cyan": (60, 200, 210),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
KINDS = ("card", *SHAPES)
WORDS = ("cat", "dog", "sun", "map", "key", "bus", "cup", "hat", "pen", "box", "tea", "egg")
SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

SPLITS = {"train": 0, "validation": 100_000_000, "test": 200_000_000}  # first seed of each split
SPLIT_SIZE = 100_000_000

TILE = 112
PINPOINTS = ((112, 224), (224, 112), (224, 224), (112, 336), (336, 112), (224, 336), (336, 224), (336, 336))  # (h, w)

_DIGIT_PITCH = 15  # wider than a patch (14), so that two digits of a card seldom share one
_CARD_HEIGHT = 26
_FONT_SIZE = 18
_GAP = 3  # least number of pixels between two objects

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are exclusive


@dataclass(frozen=True)
class Object:
    """One thing in a scene. ``glyphs`` holds a box per digit of a number card, in reading order; a word has one box."""

    kind: str
    colour: str
    box: Box
    text: str = ""
    glyphs: tuple[Box, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def number(self) -> int | None:
        return int(self.text) if self.text.isdigit() else None


@dataclass(frozen=True)
class Question:
    family: str
    question: str
    answer: str


@dataclass
class Scene:
    """A picture (RGB), what is in it, and what is asked about it."""

    seed: int
    image: Image.Image
    objects: list[Object]
    questions: list[Question] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------ pictures


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
    return Scene(seed, image, objects, _ask(rng, objects, tiles))


# ----------------------------------------------------------------------------------------------------------- questions


def neighbour(objects: list[Object], thing: Object, side: str) -> Object | None:
    """What is directly to the ``side`` of an object, or None if nothing is, or if one could argue about it.

    The neighbour is at most 12 pixels away and shares at least half of the smaller one's extent across that direction;
    nothing else that shares any of it may start within 24 pixels.
    """
    axis, sign = (0 if side in ("left", "right") else 1), (-1 if side in ("left", "above") else 1)
    across = 1 - axis
    a, close = thing.box, []
    for other in objects:
        b = other.box
        gap = a[axis] - b[axis + 2] if sign < 0 else b[axis] - a[axis + 2]
        shared = min(a[across + 2], b[across + 2]) - max(a[across], b[across])
        if other is not thing and 0 <= gap <= 24 and shared > 0:
            smaller = min(a[across + 2] - a[across], b[across + 2] - b[across])
            close.append((other, gap <= 12 and 2 * shared >= smaller))
    return close[0][0] if len(close) == 1 and close[0][1] else None


def _read(rng: np.random.Generator, objects: list[Object]) -> list[tuple[str, str]]:
    pairs = []
    for card in (o for o in objects if o.kind == "card"):
        what = "word" if card.number is None else "number"
        phrases = (f"What {what} is on the {card.name}?", f"What {what} does the {card.name} show?")
        pairs.append((phrases[rng.integers(2)], card.text))
    return pairs


def _perceive(rng: np.random.Generator, objects: list[Object]) -> list[tuple[str, str]]:
    present = {o.name for o in objects}
    pairs = []
    # As many questions answered by yes as by no, about cards as about shapes: the wording must not give it away.
    for kind in ("card", str(rng.choice(SHAPES))):
        there = [c for c in COLOURS if f"{c} {kind}" in present]
        missing = [c for c in COLOURS if f"{c} {kind}" not in present]
        answer = "yes" if rng.random() < 0.5 else "no"
        if there and missing:
            colour = rng.choice(there if answer == "yes" else missing)
            pairs.append((f"Is there {_article(str(colour))} {colour} {kind}?", answer))
    for kind in rng.permutation(SHAPES)[:1]:
        count = sum(o.kind == kind for o in objects)
        if count or rng.random() < 0.4:  # or half of the counts would be zero
            pairs.append((f"How many {kind}s are there?", str(count)))
    for kind in SHAPES:
        same = [o for o in objects if o.kind == kind]
        if len(same) == 1:
            pairs.append((f"What colour is the {kind}?", same[0].colour))
    cards = [o for o in objects if o.kind == "card"]
    for i in rng.permutation(len(cards))[:2]:
        what = "word" if cards[i].number is None else "number"
        pairs.append((f"What colour is the card with the {what} {cards[i].text}?", cards[i].colour))
    return pairs


def _reason(rng: np.random.Generator, objects: list[Object]) -> list[tuple[str, str]]:
    cards = [o for o in objects if o.number is not None]
    pairs = [
        (f"Is the number on the {card.name} even or odd?", "odd" if int(card.text) % 2 else "even") for card in cards
    ]
    for i, a in enumerate(cards):
        for b in cards[:i]:
            first, second = (a, b) if rng.random() < 0.5 else (b, a)
            # The larger number is plainly so: by its length or its first digit. To weigh close ones digit by digit is a
            # skill of its own, which decoders of this size take far longer to learn.
            if len(a.text) == len(b.text) and abs(int(a.text[0]) - int(b.text[0])) < 3:
                continue
            word, pick = ("larger", max) if rng.random() < 0.5 else ("smaller", min)
            answer = pick(first, second, key=lambda card: int(card.text)).colour
            phrase = f"Which card has the {word} number, the {first.colour} or the {second.colour} one?"
            pairs.append((phrase, answer))
    return pairs


def _relate(objects: list[Object], tiles: tuple[list[float], list[float]]) -> list[tuple[str, str]]:
    def cut(a: Box, b: Box) -> bool:
        """Whether a seam runs through the two boxes or between them; its outermost 3 pixels a thing can do without."""
        return any(
            min(a[axis], b[axis]) + 3 < seam < max(a[axis + 2], b[axis + 2]) - 3
            for axis in (0, 1)
            for seam in tiles[axis]
        )

    pairs = []
    for thing in objects:
        for side, phrase in SIDES.items():
            other = neighbour(objects, thing, side)
            if other is not None and not cut(thing.box, other.box):
                pairs.append((f"What is directly {phrase} the {thing.name}?", other.name))
    return pairs


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _ask(
    rng: np.random.Generator, objects: list[Object], tiles: tuple[list[float], list[float]], per_family: int = 4
) -> list[Question]:
    """At most ``per_family`` questions of each family, in random order."""
    families = {
        "read": _read(rng, objects),
        "perceive": _perceive(rng, objects),
        "reason": _reason(rng, objects),
        "relate": _relate(objects, tiles),
    }
    asked = []
    for family, pairs in families.items():
        asked += [Question(family, *pairs[i]) for i in rng.permutation(len(pairs))[:per_family]]
    return [asked[i] for i in rng.permutation(len(asked))]


# -------------------------------------------------------------------------------------------------------------- splits


def scenes(split: str, seed: int = 0, dense: bool | None = None) -> Iterator[Scene]:
    """The scenes of a split, one after another, from its ``seed``-th on.

    ``dense`` None makes every fourth of them dense, True or False all or none. Raises InputError for an unknown split and
    for a seed that lies outside it: splits never meet.
    """
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {shown(split)}")
    if not 0 <= seed < SPLIT_SIZE:
        raise InputError(f"seed: expected 0 to {SPLIT_SIZE - 1}, a scene of the split, got {shown(seed)}")
    return (draw(SPLITS[split] + i, i % 4 == 3 if dense is None else dense) for i in range(seed, SPLIT_SIZE))


def questions(
    split: str = "test", count: int = 1000, seed: int = 0, dense: bool | None = None
) -> Iterator[tuple[Image.Image, str, str, str]]:
    """``count`` tuples (image, question, answer, family), the families in turn, at most one of each a scene.

    ``split``, ``seed`` and ``dense`` say of which scenes, see ``scenes``. Where those run out there are fewer.
    """
    given = 0
    for scene in scenes(split, seed, dense):
        for family in FAMILIES:
            of_family = [q for q in scene.questions if q.family == family]
            if of_family and given < count:
                yield scene.image, of_family[0].question, of_family[0].answer, family
                given += 1
        if given >= count:
            return


def conversation(scene: Scene) -> Conversation:
    """All questions about a scene, in its order, as one conversation. Its id is the scene's seed."""
    turns = [
        Turn(q.question if i else f"{IMAGE}\n{q.question}", q.answer, q.family) for i, q in enumerate(scene.questions)
    ]
    return Conversation(str(scene.seed), (scene.image,), tuple(turns))
