"""LLaVA's projector: a two-layer MLP, one token for every patch (paper §3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import arguments
from ..activations import ACTIVATIONS
from .base import Ends, Grid, Projector, ProjectorOptions


@dataclass(frozen=True)
class MLPOptions(ProjectorOptions):
    """config.json's `projector_hidden_act` and `multimodal_projector_bias`."""

    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        activation = arguments.choice("activation", self.activation, tuple(ACTIVATIONS))
        arguments.settle(self, activation=activation, bias=arguments.flag("bias", self.bias))

    def grid(self, ends: Ends) -> Grid:
        return Grid(ends.side, ends.side)

    def build(self, ends: Ends) -> MLP:
        return MLP(ends, self.activation, self.bias)


class MLP(Projector):
    """[..., C · states] → [..., D], a kept class token like a patch."""

    def __init__(self, ends: Ends, activation: str, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(ends.states * ends.width, ends.hidden, bias=bias)
        self.linear_2 = nn.Linear(ends.hidden, ends.hidden, bias=bias)
        self.act = ACTIVATIONS[activation]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))
