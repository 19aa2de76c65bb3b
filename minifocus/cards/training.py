"""Train on the miniature: its scenes as conversations, and the settings that work for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..arguments import settle
from ..inputs.conversations import Conversation
from ..training.presets import Preset
from .drawing import SPLIT_SIZE, conversation, scenes


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
        scenes(self.split, self.first)  # refuses what is none
        settle(self, count=min(self.count, SPLIT_SIZE - self.first))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        drawn = scenes(self.split, self.first + index, self.dense)
        return conversation(next(scene for scene in drawn if scene.questions))


# A thousand times smaller than what the paper trains: its rates are what was found to work. Turns about one picture are asked
# each for itself, and scenes are drawn at random, so that there is nothing to shuffle.
_INSTRUCT = Preset(
    lr_projector=1e-3,
    lr_selector=1e-5,
    lr_selector_bias=3e-3,
    lr_llm=1e-3,
    lr_vision=0.0,
    batch=16,
    micro_batch=4,
    warmup=0.05,
    optimizer="muon",
    turns="independent",
    max_turns=12,
    shuffle=False,
    steps=500,
)
MINIATURE = {
    "align": replace(_INSTRUCT, lr_projector=2e-3, lr_selector=0.0, lr_selector_bias=0.0, lr_llm=0.0),
    "instruct": _INSTRUCT,
}
