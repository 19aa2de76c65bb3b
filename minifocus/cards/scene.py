"""What a scene of the miniature is made of: its things, their colours and kinds, and the questions about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from ..arguments import shown
from ..errors import InputError

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
FREE = ("card", "sign", *SHAPES)  # kinds that stand by themselves
KINDS = (*FREE, "row", "bar")  # a row of a table, a bar of a chart
MOST_GLYPHS = 4  # letters of a sign's word
SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

TILE = 112
PINPOINTS = ((112, 224), (224, 112), (224, 224), (112, 336), (336, 112), (224, 336), (336, 224), (336, 336))  # (h, w)

SPLITS = {"train": 0, "validation": 100_000_000, "test": 200_000_000}  # first seed of each split
SPLIT_SIZE = 100_000_000

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are exclusive


def split_of(seed: int) -> str:
    """The split that a scene's seed belongs to. Raises InputError for a seed of none."""
    if not 0 <= seed < len(SPLITS) * SPLIT_SIZE:
        raise InputError(f"seed: expected 0 to {len(SPLITS) * SPLIT_SIZE - 1}, got {shown(seed)}")
    return list(SPLITS)[seed // SPLIT_SIZE]


@dataclass(frozen=True)
class Object:
    """One thing in a scene. ``glyphs`` holds a box for each digit or letter of its text, in reading order."""

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
    """A picture (RGB), what can be asked about in it, what is asked, and where things are that never are asked about."""

    seed: int
    image: Image.Image
    objects: list[Object]
    questions: list[Question] = field(default_factory=list)
    distractors: list[Box] = field(default_factory=list)
