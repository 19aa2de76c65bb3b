"""Methods that keep what the vision tower's class token looks at.

FasterVLM ("fastervlm"; Zhang et al. 2024): one block's attention, the last one whose output the model reads; every tile
keeps the same share.

VTC-CLS ("vtc-cls"; Wang et al. 2024): the attention of several last blocks, summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .. import arguments
from ..loading.config import Config
from ..samplers.hooks import PictureFeatures
from ..vision import VisionTower
from .pruning import PruningOptions, RankingPruner, cues
from .tower_attention import block_and_input, check_block, class_attention, last_block


@dataclass(frozen=True)
class FasterVLMOptions(PruningOptions):
    """
    block  of the vision tower, from 0; None: the last whose output is read (22 of 24 in LLaVA)
    """

    per: Literal["picture", "map", "tile"] = "tile"
    block: int | None = None


class FasterVLM(RankingPruner):
    def __init__(self, options: FasterVLMOptions, config: Config):
        super().__init__(options)
        last = check_block(config, options.block, last_block(config))
        self.tower_blocks = range(last, last + 1)

    def look(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        return [class_attention(*block_and_input(tower, states, block)) for block in self.tower_blocks]

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        return cues(picture).sum(dim=-1)


@dataclass(frozen=True)
class VTCCLSOptions(PruningOptions):
    """
    blocks  how many blocks to sum over, up to the last whose output is read; None: half of those
    """

    blocks: int | None = None


class VTCCLS(FasterVLM):
    def __init__(self, options: VTCCLSOptions, config: Config):
        RankingPruner.__init__(self, options)
        last = check_block(config, None, last_block(config))
        count = (last + 2) // 2 if options.blocks is None else arguments.whole("blocks", options.blocks, 1, last + 1)
        self.tower_blocks = range(last + 1 - count, last + 1)
