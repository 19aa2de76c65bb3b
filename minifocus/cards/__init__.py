"""The miniature: drawn pictures of cards and shapes, and questions about them (see `drawing`)."""

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
