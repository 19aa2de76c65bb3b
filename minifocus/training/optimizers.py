"""The optimisers: which one takes which parameter, and at which learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .muon import Muon
from .settings import Settings

# Embeddings and heads, whose rows stand for themselves, what samplers learn, and halves of LoRA's products: no matrices between
# hidden states.
_NOT_FOR_MUON = ("embed", "lm_head", "heads.", "before_llm.", ".lora_")


def make_optimizers(
    module: nn.Module, lr_of: Callable[[str], float], settings: Settings
) -> list[torch.optim.Optimizer]:
    """Optimisers of the parameters whose learning rate, found by name, is above 0. The others are frozen."""
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        lr = lr_of(name)
        parameter.requires_grad_(lr > 0)
        if lr > 0:
            muon = settings.muon and parameter.dim() == 2 and not any(part in name for part in _NOT_FOR_MUON)
            decays = parameter.dim() > 1 and "before_llm." not in name
            groups.setdefault((muon, lr, settings.weight_decay if decays else 0.0), []).append(parameter)
    if not groups:
        raise InputError("learning rates: expected at least one above 0, got none: nothing would be trained")

    def of_kind(wanted: bool) -> list[dict[str, Any]]:
        return [
            {"params": own, "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for (muon, lr, decay), own in groups.items()
            if muon == wanted
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if of_kind(True):
        optimizers.append(Muon(of_kind(True)))
    if of_kind(False):
        # One parameter at a time: on a GPU, torch would by default have one more copy of all of them for the time of a step.
        optimizers.append(torch.optim.AdamW(of_kind(False), betas=settings.betas, foreach=False))
    return optimizers
