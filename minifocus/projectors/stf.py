"""LLaVA-STF's projector (Tang and Shen, 2025): tokens of several blocks are fused, and then those of each window.

Multi-block token fusion (MBTF, Eq. 1, Table 1a) reads several hidden states of the tower, joined along channels, and brings
them back to the width of one. Spatial token fusion (STF, Eq. 2, Table 1b) makes a window of k×k patches one token, or E.
config.json's `vision_feature_layer` lists the states; the paper has {3, 6, …, 24} of 24 blocks.

The paper's form and the public code's differ (`fusion` and `last_gelu`). Both have the same shapes behind their names but for
the convolution, which the code lacks: its weight, flattened, is that of the code's first linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..errors import InputError
from .base import Ends, Grid, Projector, ProjectorOptions, windows

LARGEST_LAYER = 2**30  # numbers in one weight


@dataclass(frozen=True)
class STFOptions(ProjectorOptions):
    """
    window     k, the side of a window in patches: 2 in the paper
    tokens     E, tokens that a window becomes, which follow one another: 1 in the paper; below k² (Table 4)
    mbtf       whether multi-block token fusion comes first
    fusion     how a window's vectors become one (Table 5): "convolution" (STF), "concatenation" (TokenConcat, and the public
               code), or "average" (AvgPool); the last is followed by LLaVA's MLP
    last_gelu  a GELU behind the last layer of MBTF and of STF, as in Table 1; the public code has none
    """

    window: int = 2
    tokens: int = 1
    mbtf: bool = True
    fusion: Literal["convolution", "concatenation", "average"] = "convolution"
    last_gelu: bool = True

    def __post_init__(self) -> None:
        window = arguments.whole("window", self.window, 1, 1024)
        fusion = arguments.choice("fusion", self.fusion, ("convolution", "concatenation", "average"))
        arguments.settle(
            self,
            window=window,
            tokens=arguments.whole("tokens", self.tokens, 1, 1 if fusion == "average" else max(1, window**2 - 1)),
            mbtf=arguments.flag("mbtf", self.mbtf),
            fusion=fusion,
            last_gelu=arguments.flag("last_gelu", self.last_gelu),
        )

    def grid(self, ends: Ends) -> Grid:
        along = windows(ends.side, self.window)
        channels = self.window**2 * self.channels(ends)
        if channels % self.tokens:
            raise InputError(f"tokens: expected a divisor of the window's {channels} channels, got {self.tokens}")
        if 4 * channels**2 > LARGEST_LAYER and self.fusion != "average":
            raise InputError(f"window: expected layers of at most {LARGEST_LAYER} numbers, got {4 * channels**2}")
        return Grid(along, along * self.tokens, self.tokens)

    def channels(self, ends: Ends) -> int:
        """Of a patch, as it enters STF."""
        return ends.width * (1 if self.mbtf else ends.states)

    def build(self, ends: Ends) -> STF:
        return STF(self, ends)


class STF(Projector):
    """[N, side², C · states] → [N, (side / k)² · E, D]: window after window in raster order, a window's E tokens together."""

    def __init__(self, options: STFOptions, ends: Ends):
        super().__init__()
        self.options, self.side = options, ends.side
        width, k = ends.width, options.window
        if options.mbtf:
            self.mbtf = nn.Sequential(
                nn.Linear(ends.states * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), self.last()
            )
        channels = options.channels(ends)
        if options.fusion == "average":
            self.stf = nn.Sequential(nn.Linear(channels, ends.hidden), nn.GELU(), nn.Linear(ends.hidden, ends.hidden))
            return
        joined = k * k * channels
        if options.fusion == "convolution":
            self.convolution = nn.Conv2d(channels, joined, kernel_size=k, stride=k)
        token = joined // options.tokens
        self.stf = nn.Sequential(nn.Linear(token, 4 * token), nn.GELU(), nn.Linear(4 * token, ends.hidden), self.last())

    def last(self) -> nn.Module:
        return nn.GELU() if self.options.last_gelu else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        k, tokens = self.options.window, self.options.tokens
        if self.options.mbtf:
            features = self.mbtf(features)
        planes = features.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # [N, C, side, side]
        if self.options.fusion == "average":
            return self.stf(F.avg_pool2d(planes, k).flatten(2).transpose(1, 2))
        if self.options.fusion == "convolution":
            fused = F.gelu(self.convolution(planes)).flatten(2)
        else:  # a window's vector has all cells of its first channel, then of its second: what a convolution's weight is for
            fused = F.pixel_unshuffle(planes, k).flatten(2)
        fused = fused.transpose(1, 2)  # [N, windows, k² · C]
        return self.stf(fused.unflatten(2, (tokens, -1)).flatten(1, 2))
