"""The samplers' operators: one call path for every backend.

`torch.ops.minifocus.*` are implemented by the compiled halves `_cpu.abi3.so` and `_cuda.abi3.so` (backend "native"), and by
`reference.py` (backend "reference") on every device that has no compiled half; `backend.py` says which is taken.

So that nothing waits for a GPU, the registered operators return outputs with room for all that they might keep: on a GPU,
tokens and their source have a row for each cell, of which the first offsets[-1] count; select_top_p's index has a place for each
score, those of an item's kept ones first and then -1. The functions below have the arguments and results of their namesakes
in `reference.py`: they cut the outputs to size, which does wait.

To add an operator:
  1. here: its schema (schemas.inc), its meaning (reference.py), what it demands of its arguments (checks.py), its entry in
     `backend.REFERENCE`, its fake kernel and gradient (torch_integration.py), and the function to call, below;
  2. in csrc/: its struct (operators.h), its declaration (launchers.h), its checks and outputs (torch_glue.h), and its
     implementations (cpu/ and cuda/);
  3. in minifocus/testing.py: how its inputs are drawn and its outputs checked. tests/ops applies this to every implementation.
     The emulator (tests/emulator) runs its kernel as it is.
"""

from __future__ import annotations

import torch

from . import (
    checks,
    torch_integration,  # noqa: F401 (it registers with torch)
)
from .backend import BACKENDS, flat
from .reference import Pool

__all__ = ["BACKENDS", "gather_tokens", "importance", "region_pool", "region_route", "select_top_p"]


def _cut(rows: torch.Tensor, count: int) -> torch.Tensor:
    # For torch.compile and torch.export, which cannot know. At other times the first check would import all of sympy.
    if torch.compiler.is_compiling() or not isinstance(count, int):
        torch._check(count >= 0)
        torch._check(count <= rows.shape[0])
    return rows.narrow(0, 0, count)


def region_pool(
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    choice: torch.Tensor,
    window: int,
    pools: list[Pool],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.region_pool`; differentiable in x and weight."""
    checks.no_tensor("window", window)
    tokens, source, offsets = torch.ops.minifocus.region_pool(x, grid_hw, choice, window, flat(pools), weight)
    count = offsets[-1].item()
    return _cut(tokens, count), _cut(source, count), offsets


def region_route(
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    context: torch.Tensor,
    bias: torch.Tensor,
    window: int,
    pools: list[Pool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.region_route`; differentiable in x, with the scales as they were chosen."""
    checks.no_tensor("window", window)
    tokens, source, offsets, choice = torch.ops.minifocus.region_route(x, grid_hw, context, bias, window, flat(pools))
    count = offsets[-1].item()
    return _cut(tokens, count), _cut(source, count), offsets, choice


def importance(
    q: torch.Tensor, k: torch.Tensor, cu_text: torch.Tensor, cu_visual: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `reference.importance`. Here it has no gradient: asked for one, it raises."""
    checks.no_tensor("scale", scale)
    return torch.ops.minifocus.importance(q, k, cu_text, cu_visual, scale)


def select_top_p(
    scores: torch.Tensor, cu_visual: torch.Tensor, gamma: float = 0.0, keep: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.select_top_p`."""
    checks.no_tensor("gamma", gamma)
    checks.no_tensor("keep", keep)
    index, count = torch.ops.minifocus.select_top_p(scores, cu_visual, gamma, keep)
    return index[index >= 0], count


def gather_tokens(columns: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    """See `reference.gather_tokens`; differentiable in the columns of floating-point numbers."""
    return torch.ops.minifocus.gather_tokens(columns, index)
