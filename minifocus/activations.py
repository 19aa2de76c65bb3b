"""Activation functions by their config.json names.

Those of the models of the field write over x where nothing learns, as a prompt's inner layer is tens of megabytes large and new
memory takes as long to come by as the function takes. x is the caller's own: what a linear layer has just given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's x·σ(1.702x). It is not GELU: to confuse the two moves logits of scale 4 by 0.04."""
    return times((1.702 * x).sigmoid_(), x)


def silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x, inplace=not x.requires_grad)


def times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x · y, which takes the place of x where nothing learns."""
    return x * y if x.requires_grad or y.requires_grad else x.mul_(y)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": silu,
    "swish": silu,
}
