"""Which implementation serves each kind of device: the compiled operators of csrc/, or the reference in plain PyTorch.

The compiled halves are `_cpu.abi3.so` and `_cuda.abi3.so` (backend "native"). `reference.py` (backend "reference") serves
every device that has no compiled half. MINIFOCUS_BACKEND=native or =reference forces one. Unset, native is taken where it is
there, and one logged line says why where it is not.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..arguments import shown
from . import checks

_log = logging.getLogger("minifocus")
_library = torch.library.Library("minifocus", "FRAGMENT")  # what it holds goes when it does


def load(schemas: Iterable[str], reference: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Declare torch.ops.minifocus.*, give it the reference's kernels, and load the compiled ones; → the backend of each
    kind of device."""
    wanted = os.environ.get("MINIFOCUS_BACKEND", "")
    if wanted not in ("", "native", "reference"):
        raise RuntimeError(f"MINIFOCUS_BACKEND: expected native or reference, got {shown(wanted)}")
    for schema in schemas:
        _library.define(schema)
    for name, kernel in reference.items():
        _library.impl(name, kernel, "CompositeExplicitAutograd")
    backends = {"cpu": "reference", "cuda": "reference"}
    halves = ["cpu"] + (["cuda"] if torch.version.cuda else [])  # a torch without CUDA cannot load the other
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
    return backends


def _not_built(half: str) -> str:
    """Why, in the words of csrc/build.py, which wrote it down when minifocus was installed."""
    record = Path(__file__).with_name("_build.txt")
    lines = record.read_text().splitlines() if record.exists() else []
    return next((line for line in lines if line.startswith(f"{half}: not built")), f"_{half}.abi3.so is not there")


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the arguments of reference.py's, as torch calls a registered operator.

    Pools, flat in a schema, become pairs. Index tensors are copied: they are checked in one pass and used in others, between
    which another thread may write to them.
    """
    names = list(inspect.signature(function).parameters)

    def own(name: str, value: Any) -> Any:
        if name == "pools":
            return _pairs(value)
        return value.clone() if isinstance(value, torch.Tensor) and value.dtype == torch.int64 else value

    def call(*arguments: Any, **named: Any) -> Any:
        return function(*map(own, names, arguments), **{name: own(name, value) for name, value in named.items()})

    return call


def flat(pools: list[tuple[int, int]]) -> list[int]:
    """Pools as a schema's int[] has them: [height, width, height, width, …]. `kernel` does the opposite."""
    try:
        numbers = [side for height, width in pools for side in (height, width)]
    except (TypeError, ValueError):
        raise RuntimeError(f"pools: expected pairs of numbers, got {shown(pools)}") from None
    for side in numbers:
        checks.no_tensor("pools", side)
    return numbers


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    paired = len(numbers) % 2 == 0
    checks.expect(
        paired, f"pools: expected from 1 to {checks.MAX_BRANCHES} pairs of numbers, got {len(numbers)} numbers"
    )
    return list(zip(numbers[::2], numbers[1::2], strict=True))
