"""The memory of a run: what a GPU has no room for is refused."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import InputError


def check_memory(task: nn.Module, device: torch.device, bf16: bool) -> None:
    """Refuse at once, with InputError, a run whose gradients and optimiser states a GPU has no room for."""
    if device.type != "cuda":
        return
    sharded = isinstance(task, FSDPModule)
    own = [(p.to_local() if isinstance(p, DTensor) else p, p.requires_grad) for p in task.parameters()]
    trained = sum(p.numel() * p.element_size() for p, learns in own if learns)
    # Autocast's copies are kept for the backward pass. Those of a layer that is gathered go with it.
    copies = 2 * sum(p.numel() for p, _ in own if p.dtype != torch.bfloat16) if bf16 and not sharded else 0
    needed, (free, _) = 3 * trained + copies, torch.cuda.mem_get_info(device)  # a gradient and two moments
    if needed > free:
        raise InputError(
            f"device: expected at least {needed / 1e9:.1f} GB free beside the weights for gradients, AdamW's moments and "
            f"bfloat16 copies, activations not counted, got {free / 1e9:.1f} GB on {device}: "
            + ("take more processes" if sharded else "have processes share these, too (--shard)")
            + ", freeze the largest part, or have it learn with LoRA"
        )


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in GB that a GPU has had in use at once, for the log; nothing of a CPU."""
    return {"gpu_memory": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}
