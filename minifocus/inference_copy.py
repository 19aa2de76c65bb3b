"""A copy of a network that answers while the network itself may be trained."""

from __future__ import annotations

import copy
from typing import cast

from torch import nn

from .model import LlavaNetwork


def at_inference(network: LlavaNetwork) -> LlavaNetwork:
    """A copy in evaluation mode, with the samplers of this moment: in training, Eq. 2 would change the answers.

    The copy shares parameters, buffers and hooks. The network itself is not switched, for another thread may be training it,
    or may give it another sampler.
    """
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module, deep: bool) -> nn.Module:
        if id(module) not in copies:
            own = copies[id(module)] = copy.copy(module)
            own._modules = dict(module._modules)
            if deep:
                own.training = False
                own._modules = {
                    name: None if child is None else copied(child, deep) for name, child in module._modules.items()
                }
        return copies[id(module)]

    return cast(LlavaNetwork, copied(network, any(module.training for module in network.modules())))
