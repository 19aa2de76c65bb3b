"""The two-layer MLP that carries vision features into the language model's embedding space (paper §3.1)."""

from __future__ import annotations

import torch
from torch import nn

from .activations import ACTIVATIONS
from .config import Config


class Projector(nn.Module):
    """[..., vision_hidden × feature layers] → [..., text_hidden]."""

    def __init__(self, config: Config):
        super().__init__()
        features = config.vision.hidden_size * len(config.feature_layers)
        hidden = config.text.hidden_size
        self.linear_1 = nn.Linear(features, hidden, bias=config.projector_bias)
        self.linear_2 = nn.Linear(hidden, hidden, bias=config.projector_bias)
        self.act = ACTIVATIONS[config.projector_act]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))
