"""The settings of a run, and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arguments import number, whole

MOST_EXAMPLES = 2**20  # of a step, which are all in memory
MOST = 1e6  # of a rate or factor: beyond it float32 soon has no numbers


@dataclass(frozen=True)
class Settings:
    """
    steps           optimiser steps of the whole run
    batch           examples per step, over all processes
    micro_batch     examples per forward pass of one process; batch / micro_batch is shared out among the processes
    warmup_steps    over which the learning rates rise; they then fall by a cosine to `final_lr` of their peak
    max_grad_norm   gradients are scaled down to this norm
    muon            matrices between hidden states by Muon, the rest by AdamW; else all by AdamW
    betas           AdamW's
    weight_decay    of all but vectors (norms, biases) and what a sampler learns
    bf16            forward and backward in bfloat16 where PyTorch's autocast does so; weights stay in their dtype
    save_every      steps between checkpoints
    log_every       steps between lines of the log
    """

    steps: int
    batch: int
    micro_batch: int
    warmup_steps: int = 0
    final_lr: float = 0.0
    max_grad_norm: float = 1.0
    muon: bool = False
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    bf16: bool = False
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every"):
            whole(name, getattr(self, name), 1)
        whole("batch", self.batch, 1, MOST_EXAMPLES)
        whole("micro_batch", self.micro_batch, 1, MOST_EXAMPLES)
        whole("warmup_steps", self.warmup_steps, 0)
        for name in ("final_lr", "weight_decay"):
            number(name, getattr(self, name), 0, MOST)

    def lr_factor(self, step: int) -> float:
        """The learning rates of step 0, 1, … as a share of their peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        through = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * through))
