"""Similarity to the thumbnail ("similarity"; FocusLLaVA §6): the paper compares its learned selector with this.

A token's score is the mean inner product of its feature X_i with those of the thumbnail X_g. The paper keeps the highest.
What covers most of a picture covers most of its thumbnail too, so that this keeps what is common; with `flip` it keeps
what is rare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import arguments
from ..ops.checks import wide
from ..samplers.hooks import PictureFeatures
from .pruning import PruningOptions, RankingPruner


@dataclass(frozen=True)
class SimilarityOptions(PruningOptions):
    """
    flip  keep the tokens least like the thumbnail
    """

    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.settle(self, flip=arguments.flag("flip", self.flip))


class Similarity(RankingPruner):
    def __init__(self, options: SimilarityOptions):
        super().__init__(options)
        self.sign = -1 if options.flip else 1

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        """The mean of inner products is the inner product with the mean."""
        x = picture.map.flatten(0, 1)
        if picture.layout.newlines:
            x = torch.cat([picture.leading, x])
        x = x.to(wide(x.dtype))
        return self.sign * (x @ picture.thumbnail.flatten(0, 1).to(x.dtype).mean(dim=0))
