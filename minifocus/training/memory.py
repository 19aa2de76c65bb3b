"""Memory of a run: whether a GPU has enough, and how a CPU's is kept."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from ..errors import InputError


def check_memory(task: nn.Module, device: torch.device, bf16: bool) -> None:
    """Whether a GPU has room for what every process keeps beside the weights: rather than run out of it after minutes."""
    if device.type != "cuda":
        return
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    copies = 2 * sum(p.numel() for p in task.parameters()) if bf16 else 0  # autocast's, which the backward pass needs
    needed, (free, _) = 3 * trained + copies, torch.cuda.mem_get_info(device)  # a gradient and two moments
    if needed > free:
        raise InputError(
            f"device: expected at least {needed / 1e9:.1f} GB free beside the weights for gradients, AdamW's moments and "
            f"bfloat16 copies, activations not counted, got {free / 1e9:.1f} GB on {device}: processes share the examples, "
            "not these. Freeze the largest part"
        )


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed: the arrays of a step on a CPU are the same again in the next.

    By default each large one is a new mapping, whose pages the system has to clear. Nothing happens where the C library
    is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    mallopt(trim_threshold, largest)
    mallopt(mmap_threshold, largest)
