"""The miniature: drawn pictures of cards and shapes, and questions about them.

`scene.py` says what a scene is made of, `plan.py` what one is to have, and `drawing.py` draws it on what `backgrounds.py`
has, with the letters of `lettering.py` and the words of `words.py`. `question_families.py` asks about it, and `splits.py` has
the scenes of training, validation and test. `conversations.py` and `preset.py` are for training. `feature_map.py` finds the
patches that show a thing.
"""

from .conversations import CardScenes, conversation
from .drawing import draw
from .question_families import neighbour
from .scene import (
    COLOURS,
    FAMILIES,
    FREE,
    KINDS,
    MOST_GLYPHS,
    PINPOINTS,
    SHAPES,
    SIDES,
    SPLIT_SIZE,
    SPLITS,
    TILE,
    Box,
    Object,
    Question,
    Scene,
)
from .splits import questions, scenes
from .words import WORDS

__all__ = [
    "COLOURS",
    "FAMILIES",
    "FREE",
    "KINDS",
    "MOST_GLYPHS",
    "PINPOINTS",
    "SHAPES",
    "SIDES",
    "SPLITS",
    "SPLIT_SIZE",
    "TILE",
    "WORDS",
    "Box",
    "CardScenes",
    "Object",
    "Question",
    "Scene",
    "conversation",
    "draw",
    "neighbour",
    "questions",
    "scenes",
]
