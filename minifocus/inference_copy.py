"""A network as it answers, beside the same network as it is trained."""

from __future__ import annotations

import copy
from typing import cast

from torch import nn

from .model import LlavaNetwork


def at_inference(network: LlavaNetwork) -> LlavaNetwork:
    """The network with its samplers of this moment and in no training, whose Eq. 2 would change what they answer.

    It is a copy that shares parameters, buffers and hooks: nothing is switched in the network itself, which another thread
    may be training, or giving another sampler, meanwhile.
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
