"""GlobalCom² ("globalcom2"; Liu et al. 2025): the thumbnail decides how much of each tile stays, and helps to decide what.

Scores are the class token's logits, mean over heads, in the tower's last block. With s_j the thumbnail's summed over what
tile j shows and σ = softmax(s / τ) over the n tiles, tile j keeps R·(1 + σ_j - 1/n) of its tokens; the thumbnail keeps R.
A tile's tokens are ranked by the sum of its own scores and the thumbnail's at their places, each as a vector of length 1
over the tile.

The public code cuts the thumbnail into equal parts where s_j is summed; here the padding that the map has lost counts. It
rounds every tile's number down; here they add up to the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import arguments
from ..loading.config import Config
from ..samplers.hooks import PictureFeatures
from ..vision import VisionTower
from .hired import per_tile
from .pruning import Budget, RankingPruner, cues, looked_at, spread, views
from .tower_attention import block_and_input, check_block, queries_and_keys, reachable_block


@dataclass(frozen=True)
class GlobalCom2Options(Budget):
    """
    temperature  τ, above 0, beside sums of logits
    """

    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        temperature = arguments.number("temperature", self.temperature, 0, above=True)
        arguments.settle(self, temperature=temperature)


class GlobalCom2(RankingPruner):
    def __init__(self, options: GlobalCom2Options, config: Config):
        super().__init__(options)
        self.temperature, self.block = options.temperature, check_block(config, None, reachable_block(config))
        self.tower_blocks = (self.block,)

    def look(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        q, k = queries_and_keys(*block_and_input(tower, states, self.block), slice(0, 1))
        return [(q @ k.transpose(2, 3)).mean(dim=1)[:, 0, 1:, None]]

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        own, view = cues(picture)[:, 0], views(picture)
        if not picture.layout.newlines or not picture.map.numel():
            return own
        small = looked_at(picture)[1][..., 1]
        size = picture.map.shape[:2]
        seen = F.interpolate(small[None, None], size, mode="bilinear", align_corners=False).flatten()
        return unit(own, view) + unit(torch.cat([small.flatten(), seen]), view)

    def allocate(self, picture: PictureFeatures, groups: torch.Tensor, total: int) -> list[int]:
        room = groups.bincount().tolist()
        if len(room) == 1:
            return [min(total, room[0])]
        richness = per_tile(picture, looked_at(picture)[1][..., 1])[1:]
        rate = 1 + (richness / self.temperature).softmax(dim=0) - 1 / len(richness)
        thumbnail, *tiles = spread(total, room, room)
        tiles = spread(total - thumbnail, room[1:], [r * n for r, n in zip(rate.tolist(), room[1:], strict=True)])
        return [thumbnail, *tiles]


def unit(values: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Values [n], divided by their Euclidean length in each view [n] int64."""
    length = values.new_zeros(int(view.max()) + 1).index_add(0, view, values.square()).sqrt()
    return values / length[view].clamp(min=1e-12)
