"""The scenes of training, validation and test, and the questions about them."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from ..arguments import shown
from ..errors import InputError
from .drawing import draw
from .scene import FAMILIES, SPLIT_SIZE, SPLITS, Scene


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
