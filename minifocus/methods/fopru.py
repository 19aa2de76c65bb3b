"""FoPru ("fopru"; Jiang et al. 2024): keep the patches that take part most in the vision tower's attention.

A patch's significance is the mean attention that it gets from all tokens ("column"), or that it pays to patches ("row");
in one block, mean over heads. Either the most significant patches of a tile stay ("rank"), or whole rows of it ("rows").
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
from .pruning import PruningOptions, RankingPruner, cues, views
from .tower_attention import block_and_input, check_block, last_block, queries_and_keys

QUERY_BLOCK = 128  # tokens whose attention is in memory at a time


@dataclass(frozen=True)
class FoPruOptions(PruningOptions):
    """
    axis      "column" or "row" of the attention
    strategy  "rank" or "rows"
    block     of the vision tower, from 0; None: the last whose output is read
    """

    per: Literal["picture", "map", "tile"] = "tile"
    axis: Literal["column", "row"] = "column"
    strategy: Literal["rank", "rows"] = "rank"
    block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        axis = arguments.choice("axis", self.axis, ("column", "row"))
        arguments.settle(self, axis=axis, strategy=arguments.choice("strategy", self.strategy, ("rank", "rows")))


class FoPru(RankingPruner):
    def __init__(self, options: FoPruOptions, config: Config):
        super().__init__(options)
        self.axis, self.strategy = options.axis, options.strategy
        self.block = check_block(config, options.block, last_block(config))
        self.tower_blocks = (self.block,)

    def look(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        q, k = queries_and_keys(*block_and_input(tower, states, self.block), slice(None))
        received, paid = q.new_zeros(q.shape[0], k.shape[2]), []
        for part in q.split(QUERY_BLOCK, dim=2):
            attention = (part @ k.transpose(2, 3)).softmax(dim=-1).mean(dim=1)  # [N, queries, keys]
            received += attention.sum(dim=1) / k.shape[2]
            paid.append(attention[:, :, 1:].mean(dim=2))
        return [(received if self.axis == "column" else torch.cat(paid, dim=1))[:, 1:, None]]

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        """With "rows" a token has the score of its row. So rows leave one after another, and the budget cuts the last."""
        own = cues(picture)[:, 0]
        if self.strategy == "rank":
            return own
        layout, view = picture.layout, views(picture)
        side, across = picture.thumbnail.shape[:2]
        cells = torch.arange(layout.height, device=own.device).repeat_interleave(layout.width)
        leading = len(own) - len(cells)
        rows = torch.cat([torch.arange(side, device=own.device).repeat_interleave(across)[:leading], side + cells])
        row_of_view = view * (side + layout.height) + rows
        sums = own.new_zeros(int(row_of_view.max()) + 1).index_add(0, row_of_view, own)
        return sums[row_of_view] / row_of_view.bincount()[row_of_view]
