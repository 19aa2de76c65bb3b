"""The miniature: drawn pictures of cards and shapes, and questions about them.

`scene.py` says what a scene is made of, `drawing.py` draws one, `question_families.py` asks about it, and `splits.py` has the
scenes of training, validation and test. `conversations.py` and `preset.py` are for training. `feature_map.py` finds the patches
that show a thing.
"""

from .conversations import CardScenes, conversation
from .drawing import draw
from .question_families import neighbour
from .scene import COLOURS, FAMILIES, KINDS, PINPOINTS, SHAPES, SIDES, TILE, WORDS, Box, Object, Question, Scene
from .splits import SPLIT_SIZE, SPLITS, questions, scenes

__all__ = [
    "COLOURS",
    "FAMILIES",
    "KINDS",
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
