"""What a scene of the miniature is made of: its things, their colours and kinds, and the questions about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

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

TILE = 112
PINPOINTS = ((112, 224), (224, 112), (224, 224), (112, 336), (336, 112), (224, 336), (336, 224), (336, 336))  # (h, w)

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
