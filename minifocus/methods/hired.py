"""HiRED ("hired"; Arif et al. 2024): the first block says which tiles hold something, the last block which tokens.

The thumbnail takes a share of the budget. The rest goes to the tiles in proportion to the attention that the class token
of the thumbnail pays, in the tower's first block, to the part of the thumbnail that each tile shows. Inside a view the
tokens stay that its own class token looks at in the last block that is read.

The public code does not sum that attention: it marks the thumbnail's best tokens, as large a share of them as the tiles
have of the budget, and counts those in each of as many equal runs of its raster order as there are tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import arguments
from ..loading.config import Config
from ..samplers.hooks import PictureFeatures
from ..vision import VisionTower
from .pruning import Budget, RankingPruner, cues, looked_at, spread, views
from .tower_attention import block_and_input, check_block, class_attention, last_block


@dataclass(frozen=True)
class HiREDOptions(Budget):
    """
    ratio      0.2 in the paper's main results
    thumbnail  its share of the budget
    """

    ratio: float = 0.2
    thumbnail: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.settle(self, thumbnail=arguments.share("thumbnail", self.thumbnail))


class HiRED(RankingPruner):
    def __init__(self, options: HiREDOptions, config: Config):
        super().__init__(options)
        self.share, self.block = options.thumbnail, check_block(config, None, last_block(config))
        self.tower_blocks = (0, self.block)

    def look(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """Two cues, which may be of the same block."""
        return [class_attention(*block_and_input(tower, states, block)) for block in (0, self.block)]

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        return cues(picture)[:, 1]

    def allocate(self, picture: PictureFeatures, groups: torch.Tensor, total: int) -> list[int]:
        room = groups.bincount().tolist()
        if len(room) == 1:
            return [min(total, room[0])]
        weights = per_tile(picture, looked_at(picture)[1][..., 1]).tolist()
        thumbnail, *tiles = room
        own = min(round(self.share * total), thumbnail)
        of_tiles = spread(total - own, tiles, weights[1:])
        return [min(total - sum(of_tiles), thumbnail), *of_tiles]


def per_tile(picture: PictureFeatures, thumbnail: torch.Tensor) -> torch.Tensor:
    """Sum a map of the thumbnail [g, g] over the part that each tile shows: [1 + tiles], of which the first is 0."""
    height, width = picture.map.shape[:2]
    shown = views(picture)[picture.layout.leading :].view(height, width)
    rows, cols = (
        ((torch.arange(side, dtype=torch.float32, device=thumbnail.device) + 0.5) * size / side).long()
        for side, size in zip(thumbnail.shape, (height, width), strict=True)
    )
    tile = shown[rows[:, None], cols]
    return thumbnail.new_zeros(int(shown.max()) + 1).index_add(0, tile.flatten(), thumbnail.flatten())
