"""GlobalCom² ("globalcom2"; Liu et al. 2025): the thumbnail decides how much of each tile stays, and has a say in what.

With s_j the thumbnail's class-token attention summed over what tile j shows and σ = softmax(s / τ) over the n tiles, tile
j keeps R·(1 + σ_j - 1/n) of its tokens; the thumbnail keeps R. A tile's token scores the mean of its own tile's attention
to it and the thumbnail's attention to its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..config import Config
from ..errors import InputError
from ..vision import Block
from .hired import per_tile
from .hooks import PictureFeatures
from .pruning import Budget, RankingPruner, spread
from .tower_attention import check_block, class_attention, last_block


@dataclass(frozen=True)
class GlobalCom2Options(Budget):
    """
    temperature  τ, above 0, beside attention summed to 1 over the thumbnail
    """

    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f"temperature: expected a finite number above 0, got {value!r}")


class GlobalCom2(RankingPruner):
    def __init__(self, options: GlobalCom2Options, config: Config):
        super().__init__(options)
        self.temperature, self.block = options.temperature, check_block(config, None, last_block(config))

    def look(self, index: int, block: Block, x: torch.Tensor) -> torch.Tensor | None:
        return class_attention(block, x) if index == self.block else None

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        assert picture.cues is not None
        own, small = (cue[..., 0] for cue in picture.cues)
        if not picture.layout.newlines:
            return own.flatten()
        both = own
        if own.numel():
            seen = F.interpolate(small[None, None], own.shape, mode="bilinear", align_corners=False)[0, 0]
            both = (own + seen) / 2
        return torch.cat([small.flatten(), both.flatten()])

    def allocate(self, picture: PictureFeatures, groups: torch.Tensor, total: int) -> list[int]:
        room = groups.bincount().tolist()
        if len(room) == 1:
            return [min(total, room[0])]
        assert picture.cues is not None
        small = picture.cues[1][..., 0]
        richness = per_tile(picture, small / small.sum())[1:]
        rate = 1 + (richness / self.temperature).softmax(dim=0) - 1 / len(richness)
        thumbnail, *tiles = spread(total, room, room)
        tiles = spread(total - thumbnail, room[1:], [r * n for r, n in zip(rate.tolist(), room[1:], strict=True)])
        return [thumbnail, *tiles]
