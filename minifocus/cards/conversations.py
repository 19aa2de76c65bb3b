"""Scenes as conversations to train on."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import settle
from ..inputs.conversations import Conversation, Turn
from ..inputs.template_writer import IMAGE
from .scene import SPLIT_SIZE, Scene
from .splits import scenes


def conversation(scene: Scene) -> Conversation:
    """All questions about a scene, in its order, as one conversation. Its id is the scene's seed."""
    turns = [
        Turn(q.question if i else f"{IMAGE}\n{q.question}", q.answer, q.family) for i, q in enumerate(scene.questions)
    ]
    return Conversation(str(scene.seed), (scene.image,), tuple(turns))


@dataclass(frozen=True)
class CardScenes:
    """The miniature's scenes, drawn when asked for: `count` of a split from its scene `first` on, or as many as it has.

    Raises InputError for a scene that is not of the split.
    """

    count: int = SPLIT_SIZE // 2
    first: int = 0
    split: str = "train"
    dense: bool | None = None

    def __post_init__(self) -> None:
        scenes(self.split, self.first)  # refuses a scene that is not of the split
        settle(self, count=min(self.count, SPLIT_SIZE - self.first))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        drawn = scenes(self.split, self.first + index, self.dense)
        return conversation(next(scene for scene in drawn if scene.questions))
