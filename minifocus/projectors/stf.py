"""LLaVA-STF's projector (Tang and Shen, 2025): tokens of several blocks are fused, and then those of each window.

Multi-block token fusion (MBTF, Eq. 1, Table 1a) reads several hidden states of the tower, joined along channels, and brings
them back to the width of one. Spatial token fusion (STF, Eq. 2, Table 1b) makes a window of k×k patches one token, or E.
config.json's `vision_feature_layer` lists the states; the paper has {3, 6, …, 24} of 24 blocks.

The paper's form and the public code's differ (`fusion` and `last_gelu`). Both have the same shapes behind their names but for
the convolution, which the code lacks: its weight, flattened, is that of the code's first linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..errors import InputError
from .base import LARGEST_LAYER, Ends, Grid, Projector, ProjectorOptions, windows
from .mlp import MLP


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
        return Grid(along, along * self.tokens, self.tokens, self.window)

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

    @torch.no_grad()
    def begin_as_pooling(self, old: Projector, states: Sequence[int]) -> None:
        """Not the paper's. Exact but for rounding, except that with fusion "average" the patches are averaged before `old`.

        GELU(x) - GELU(-x) = x carries values through a GELU. So MBTF hands on the state that `old` read; hidden units repeat
        those of `old`, cell by cell, and a later layer averages them. All other units keep their random weights, and leave
        through zeros.
        """
        options, cells = self.options, self.options.window**2
        if not isinstance(old, MLP) or old.act is not F.gelu:
            raise InputError("start: expected LLaVA's MLP with a GELU as the projector to begin as, got another one")
        if options.tokens > 1:
            raise InputError(f"start: pooling makes one token of a window: expected tokens 1, got {options.tokens}")
        if options.last_gelu and (options.mbtf or options.fusion != "average"):
            raise InputError("start: behind a GELU there are no negative values: expected last_gelu false, got true")
        if options.mbtf and len(states) > 1:
            raise InputError(
                f"start: MBTF can hand on one hidden state: expected an old projector of one, got {len(states)}"
            )
        hidden, width = old.linear_1.out_features, old.linear_1.in_features // len(states)
        lower, upper = _linears(self.stf)
        entry = self.convolution if options.fusion == "convolution" else lower
        if options.fusion != "average" and cells * hidden > len(entry.weight):
            raise InputError(
                f"start: expected at most {len(entry.weight)} hidden units of a window, got {cells * hidden}"
            )

        states = list(states)
        if options.mbtf:
            handed_on = old.linear_1.weight.new_zeros(width, _linears(self.mbtf)[0].in_features)
            handed_on[:, states[0] * width : (states[0] + 1) * width] = torch.eye(width)
            _carry(self.mbtf, handed_on, old.linear_1.weight.new_zeros(width))
            states = [0]
        # The old first layer, for the channels as they enter STF.
        channels = lower.in_features // (1 if options.fusion == "average" else cells)
        first, last = old.linear_1.weight.new_zeros(hidden, channels), old.linear_2.weight
        for own, state in zip(old.linear_1.weight.split(width, dim=1), states, strict=True):
            first[:, state * width : (state + 1) * width] = own
        first_bias, last_bias = _bias(old.linear_1), _bias(old.linear_2)
        if options.fusion == "average":
            for layer, weight, bias in ((lower, first, first_bias), (upper, last, last_bias)):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            return
        assert entry.bias is not None
        of_cells = entry.weight.view(len(entry.weight), channels, cells)
        for cell in range(cells):
            units = slice(cell * hidden, (cell + 1) * hidden)
            of_cells[units] = 0
            of_cells[units, :, cell] = first
            entry.bias[units] = first_bias
        mean = last.new_zeros(len(last), len(entry.weight))
        mean[:, : cells * hidden] = last.repeat(1, cells) / cells
        if options.fusion == "concatenation":
            upper.weight.copy_(mean)
            upper.bias.copy_(last_bias)
        else:
            _carry(self.stf, mean, last_bias)


def _bias(linear: nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _linears(layers: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    first, last = layers[0], layers[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return first, last


def _carry(layers: nn.Sequential, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Make a linear layer, a GELU and another one into one linear layer: 2n hidden units for its n outputs."""
    (first, last), n = _linears(layers), len(weight)
    first.weight[: 2 * n], first.bias[: 2 * n] = torch.cat([weight, -weight]), torch.cat([bias, -bias])
    last.weight.zero_()
    last.bias.zero_()
    last.weight[:, :n], last.weight[:, n : 2 * n] = torch.eye(n), -torch.eye(n)
