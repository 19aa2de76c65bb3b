"""Baselines that look at nothing: "random" tokens, and a "uniform" grid. Any method has to beat them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .. import arguments
from ..samplers.hooks import PictureFeatures
from .pruning import Pruner, PruningOptions, RankingPruner, views


@dataclass(frozen=True)
class RandomOptions(PruningOptions):
    """
    seed  of the choice, which depends on it and on the size of the picture's map alone: a batch chooses as single calls do
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.settle(self, seed=arguments.whole("seed", self.seed, 0))


class Random(RankingPruner):
    """Each token has the same chance to stay."""

    def __init__(self, options: RandomOptions):
        super().__init__(options)
        self.seed = options.seed

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        count, (height, width) = len(views(picture)), picture.map.shape[:2]
        drawn = np.random.default_rng([self.seed, height, width]).random(count)
        return torch.from_numpy(drawn).to(picture.map.device)


class Uniform(Pruner):
    """Rows at equal distances, and in each of them cells at equal distances, as square a grid as the budget allows."""

    def groups(self, picture: PictureFeatures) -> torch.Tensor:
        """A grid needs a rectangle: the thumbnail and the map have one each."""
        return views(picture).clamp(max=1)

    def choose(self, picture: PictureFeatures, total: int) -> torch.Tensor:
        groups = self.groups(picture)
        sides = (picture.thumbnail.shape, picture.map.shape) if picture.layout.newlines else (picture.map.shape,)
        kept = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
        for group, count in enumerate(self.allocate(picture, groups, total)):
            height, width = sides[group][:2]
            kept[groups == group] = stride_grid(height, width, count).flatten().to(kept.device)
        return kept


def stride_grid(height: int, width: int, count: int) -> torch.Tensor:
    """bool [height, width] with `count` True, spread evenly."""
    kept = torch.zeros(height, width, dtype=torch.bool)
    if count:
        wanted = round(math.sqrt(count * height / width))
        rows = min(max(wanted, -(-count // width), 1), height, count)
        for i in range(rows):
            own = (i + 1) * count // rows - i * count // rows
            columns = ((torch.arange(own, dtype=torch.float32) + 0.5) * width / max(own, 1)).long()
            kept[int((i + 0.5) * height / rows), columns] = True
    return kept
