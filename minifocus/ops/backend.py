"""Choose the code that runs the operators: the compiled halves where they were built, else plain PyTorch.

MINIFOCUS_BACKEND=native or =reference forces one. Unset, it is native where that was built; where not, one logged line says why.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..arguments import shown
from . import checks, reference
from .checks import wide
from .reference import Pool

_log = logging.getLogger("minifocus")


def schemas() -> list[str]:
    """The operators' schemas. csrc/register.cpp includes the same file; Python needs it where nothing compiled is loaded."""
    lines = Path(__file__).with_name("schemas.inc").read_text(encoding="utf-8").splitlines()
    return list(ast.literal_eval("(" + "\n".join(line for line in lines if not line.startswith("//")) + ")"))


def _load() -> tuple[dict[str, str], torch.library.Library]:
    """Load the halves. Returns each device's backend, and the library that holds the reference's kernels."""
    wanted = os.environ.get("MINIFOCUS_BACKEND", "")
    if wanted not in ("", "native", "reference"):
        raise RuntimeError(f"MINIFOCUS_BACKEND: expected native or reference, got {shown(wanted)}")
    library = torch.library.Library("minifocus", "FRAGMENT")
    backends = {"cpu": "reference", "cuda": "reference"}
    # The CPU half declares the operators, so it comes first; a torch without CUDA cannot load the other.
    halves = ["cpu"] + (["cuda"] if torch.version.cuda else [])
    for half in halves if wanted != "reference" else []:
        file = Path(__file__).with_name(f"_{half}.abi3.so")
        try:
            torch.ops.load_library(file)
        except OSError as error:
            why = _not_built(half) if not file.exists() else error.__cause__ or error
            if wanted == "native":
                raise RuntimeError(f"MINIFOCUS_BACKEND=native: no compiled operators for {half}: {why}") from error
            _log.warning("operators run in plain PyTorch on %s, for want of compiled ones: %s", half, why)
            break
        backends[half] = "native"
    if backends["cpu"] == "reference":
        for schema in schemas():
            library.define(schema)
    for name, function in REFERENCE.items():
        library.impl(name, function, "CompositeExplicitAutograd")
    return backends, library


def _not_built(half: str) -> str:
    """The reason why a half is missing, as csrc/build.py wrote it down when minifocus was installed."""
    record = Path(__file__).with_name("_build.txt")
    lines = record.read_text().splitlines() if record.exists() else []
    return next((line for line in lines if line.startswith(f"{half}: not built")), f"_{half}.abi3.so is not there")


def flat(pools: list[Pool]) -> list[int]:
    """Pairs as a schema's int[] has them: height, width, height, width, …"""
    try:
        numbers = [side for height, width in pools for side in (height, width)]
    except (TypeError, ValueError):
        raise RuntimeError(f"pools: expected pairs of numbers, got {shown(pools)}") from None
    for side in numbers:
        checks.no_tensor("pools", side)
    return numbers


def _pairs(numbers: list[int]) -> list[Pool]:
    paired = len(numbers) % 2 == 0
    checks.expect(
        paired, f"pools: expected from 1 to {checks.MAX_BRANCHES} pairs of numbers, got {len(numbers)} numbers"
    )
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with arguments like reference.py's, in the form that torch calls: pools are flat there, and index tensors are
    anybody's. It gets copies of these, for it checks them first and uses them later, and another thread may write to them
    in between."""
    names = list(inspect.signature(function).parameters)

    def own(name: str, value: Any) -> Any:
        if name == "pools":
            return _pairs(value)
        return value.clone() if isinstance(value, torch.Tensor) and value.dtype == torch.int64 else value

    def call(*arguments: Any, **named: Any) -> Any:
        return function(*map(own, names, arguments), **{name: own(name, value) for name, value in named.items()})

    return call


def _region_pool_backward(
    grad_tokens: torch.Tensor,
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    choice: torch.Tensor,
    offsets: torch.Tensor,
    window: int,
    pools: list[Pool],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    own = reference.region_pool(x, grid_hw, choice, window, pools, weight)[2]
    checks.tensor("grad_tokens", grad_tokens, [x.dtype], [None, x.shape[1]], x.device)
    checks.tensor("offsets", offsets, [torch.int64], [len(choice) + 1], x.device)
    checks.expect(torch.equal(own, offsets), "offsets: expected region_pool's for this choice")
    count, rows = int(own[-1]), len(grad_tokens)
    checks.expect(rows >= count, f"grad_tokens: expected at least {count} rows, got {rows}")
    grad = grad_tokens[:count]
    grad_x, grad_weight = reference.region_pool_backward(grad, x, grid_hw, choice, window, pools, weight)
    return grad_x, x.new_empty(0, dtype=wide(x.dtype)) if grad_weight is None else grad_weight


def _select_top_p(
    scores: torch.Tensor, cu_visual: torch.Tensor, gamma: float = 0.0, keep: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    kept, count = reference.select_top_p(scores, cu_visual, gamma, keep)
    index = torch.full_like(scores, -1, dtype=torch.int64)
    for own, begin in zip(kept.split(count.tolist()), cu_visual.tolist(), strict=False):
        index[begin : begin + len(own)] = own
    return index, count


# reference.py's functions, but for the two whose registered forms have other arguments or results.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "region_pool": reference.region_pool,
    "region_pool_backward": _region_pool_backward,
    "region_route": reference.region_route,
    "importance": reference.importance,
    "select_top_p": _select_top_p,
    "gather_tokens": reference.gather_tokens,
}
REFERENCE = {name: _kernel(function) for name, function in _FUNCTIONS.items()}
BACKENDS, _library = _load()  # {"cpu": "native", "cuda": "reference"}, say
