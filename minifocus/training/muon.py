"""Muon (Jordan et al., 2024) in float32: torch.optim.Muon works in bfloat16, which takes a CPU four times a whole step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of Newton–Schulz' quintic, chosen for speed: singular values end in 0.7 … 1.2


def orthogonalise(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """[N, m, n] → for each matrix USVᵀ about UVᵀ."""
    a, b, c = COEFFICIENTS
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal; for matrices between hidden states, not for embeddings or heads.

    `lr` is in AdamW's measure: an update's entries have a root mean square of 0.2 · lr, whatever the matrix' shape.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            momentum = group["momentum"]
            alike: dict[tuple[torch.Size, int], list[torch.Tensor]] = {}
            for number, parameter in enumerate(group["params"]):
                # Those of which a process has a share are whole for the while of their step, one at a time.
                alike.setdefault((parameter.shape, number * isinstance(parameter, DTensor)), []).append(parameter)
            for (shape, _), every in alike.items():
                parameters = [parameter for parameter in every if parameter.grad is not None]
                if not parameters:
                    continue
                updates = []
                for parameter in parameters:
                    gradient = parameter.grad
                    assert gradient is not None
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    average.lerp_(gradient, 1 - momentum)
                    updates.append(gradient.lerp(average, momentum))
                step = orthogonalise(torch.stack([_whole(update) for update in updates])) * (
                    -0.2 * group["lr"] * max(shape) ** 0.5
                )
                for parameter, update in zip(parameters, step, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(_share(update, parameter))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _share(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a matrix that every process has whole, its share, where it has but a share of the parameter."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
