"""TokenPacker (Li et al., 2024): a coarse token of every region asks the region's own patches for what it has lost.

The tower's last state, brought to a lower resolution, gives one query a region. The patches of the region, with all the hidden
states that config.json's `vision_feature_layer` lists, are its keys and values ("region-to-point injection"). An MLP follows.

The abstract says that much. The rest follows the public code (CircleRadon/TokenPacker at 298305f), which has s = 2 alone: the
states 12, 16, 22 and 23 of 24 blocks, of which the last is the query's; two-layer MLPs for keys and values; LayerNorms behind
the projections; no residual; interpolation without smoothing, so that with s = 2 a query is the mean of its region and with
s = 3 its middle patch. Two things are ours: `heads` where the code has the width / 128, and torch's own random start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..errors import InputError
from .base import LARGEST_LAYER, Ends, Grid, Projector, ProjectorOptions, windows


@dataclass(frozen=True)
class TokenPackerOptions(ProjectorOptions):
    """
    scale  s, the side of a region in patches: 2 or 3 in the paper (75 % and 89 % fewer tokens)
    heads  of the attention, a divisor of the tower's width
    """

    scale: int = 2
    heads: int = 8

    def __post_init__(self) -> None:
        scale = arguments.whole("scale", self.scale, 1, 1024)
        arguments.settle(self, scale=scale, heads=arguments.whole("heads", self.heads, 1, 1024))

    def grid(self, ends: Ends) -> Grid:
        along = windows(ends.side, self.scale, "scale")
        if ends.width % self.heads:
            raise InputError(f"heads: expected a divisor of the tower's width {ends.width}, got {self.heads}")
        if ends.states * ends.width**2 > LARGEST_LAYER:
            largest = ends.states * ends.width**2
            raise InputError(f"name: expected layers of at most {LARGEST_LAYER} numbers, got {largest}")
        return Grid(along, along, window=self.scale)

    def build(self, ends: Ends) -> TokenPacker:
        return TokenPacker(self, ends)


class TokenPacker(Projector):
    """[N, side², C · states] → [N, (side / s)², D], region after region in raster order."""

    def __init__(self, options: TokenPackerOptions, ends: Ends):
        super().__init__()
        self.options, self.side, width = options, ends.side, ends.width
        self.query = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=1e-6))
        self.key, self.value = (
            nn.Sequential(
                nn.Linear(ends.states * width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
            )
            for _ in range(2)
        )
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, ends.hidden), nn.GELU(), nn.Linear(ends.hidden, ends.hidden))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        side, s = self.side // self.options.scale, self.options.scale
        last = features[..., -self.out_proj.in_features :]
        planes = last.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # [N, C, side, side]
        coarse = F.interpolate(planes, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        regions = features.unflatten(1, (side, s, side, s)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        q = self.split_heads(self.q_proj(self.query(coarse)))[:, :, None]  # [N, regions, 1, H, d]
        k, v = (  # [N, regions, s², H, d]
            self.split_heads(self.k_proj(self.key(regions))),
            self.split_heads(self.v_proj(self.value(regions))),
        )
        attention = ((q * k).sum(dim=-1, keepdim=True) * q.shape[-1] ** -0.5).softmax(dim=2)
        return self.mlp(self.out_proj((attention * v).sum(dim=2).flatten(2)))

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[..., C] → [..., H, C / H]."""
        return projected.unflatten(-1, (self.options.heads, -1))
