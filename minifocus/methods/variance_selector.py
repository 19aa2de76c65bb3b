"""Scales without training: a stand-in for FocusLLaVA's learned selector (`selector="variance"`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..samplers.vision_guided import pool_regions


class VarianceSelector(nn.Module):
    """A training-free stand-in, not the paper's: the more a region's cells differ, the finer its scale.

    Regions are ranked by the variance of their cells, averaged over channels, and each of the S scales gets an equal
    share of them: the even use of scales that the balance loss (Eq. 3) pulls towards.
    """

    def __init__(self, branches: int):
        super().__init__()
        self.branches = branches

    def forward(self, regions: torch.Tensor, exists: torch.Tensor, thumbnail: torch.Tensor) -> torch.Tensor:
        mean = pool_regions(regions, exists, "mean").float()[:, None, None]
        spread = ((regions.float() - mean) ** 2).where(exists[..., None], 0).sum(dim=(1, 2)).mean(dim=-1)
        spread = spread / exists.sum(dim=(1, 2))
        rank = spread.argsort(stable=True).argsort(stable=True)
        choice = rank * self.branches // torch.sym_max(rank.shape[0], 1)  # len() would be a constant once exported
        return F.one_hot(choice, self.branches).float()
