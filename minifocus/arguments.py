"""Checks of a caller's arguments. Each returns the value as a plain Python one, or raises InputError.

numpy's scalars count as numbers, like Python's own. Booleans, strings, arrays and tensors do not, not even of one element.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import InputError

LARGEST = 2**63 - 1  # the largest whole number that torch takes

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100


def shown(value: object) -> str:
    """`value` as an error message shows it, cut to about a line. An array is shown by its type and shape."""
    try:
        if isinstance(value, int) and abs(value) > LARGEST:  # Python refuses to write out very long ones
            return f"a whole number of {value.bit_length()} bits"
        if isinstance(value, np.ndarray | torch.Tensor) and value.ndim:
            return f"{type(value).__name__} of {value.dtype} {reprlib.repr(list(value.shape))}"
        text = _brief.repr(value)
    except Exception:  # the value's own __repr__ may raise anything
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:150]} … {text[-45:]}"


def brief(text: str) -> str:
    """A name, or a library's words, as an error message shows it. Of a very long text, only the beginning and the end."""
    return text if len(text) <= 500 else f"{text[:150]} … {text[-45:]}"


def whole(name: str, value: object, low: int, high: int = LARGEST) -> int:
    """A whole number from `low` to `high`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    wanted = f"a 64-bit whole number of at least {low}" if high == LARGEST else f"a whole number from {low} to {high}"
    raise InputError(f"{name}: expected {wanted}, got {shown(value)}")


def whole_of(name: str, value: object, allowed: Sequence[int]) -> int:
    """One of some whole numbers."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) in allowed:
        return int(value)
    raise InputError(f"{name}: expected {_listed(allowed)}, got {shown(value)}")


def sequence(name: str, value: object, expected: str) -> Sequence[Any]:
    """A list or tuple, or an array's elements along its first axis."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    raise InputError(f"{name}: expected {expected}, got {shown(value)}")


def whole_numbers(name: str, value: object, low: int, high: int = LARGEST) -> tuple[int, ...]:
    """A list of whole numbers, as a tuple."""
    return tuple(whole(name, one, low, high) for one in sequence(name, value, "a list of whole numbers"))


def number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number of at least `low` (with `above`: more than that) and at most `high`."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except (OverflowError, ValueError):  # a whole number that no float can hold
            found = math.nan
        if math.isfinite(found) and (low < found if above else low <= found) and found <= high:
            return found
    wanted = f"above {low:g}" if above else f"of at least {low:g}"
    kind, wanted = ("a finite number", wanted) if high == math.inf else ("a number", f"{wanted} and at most {high:g}")
    raise InputError(f"{name}: expected {kind} {wanted}, got {shown(value)}")


def share(name: str, value: object) -> float:
    """A number above 0 and at most 1."""
    return number(name, value, 0, 1, above=True)


def flag(name: str, value: object) -> bool:
    """True or False, numpy's among them."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InputError(f"{name}: expected True or False, got {shown(value)}")


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """One of some names."""
    if isinstance(value, str) and value in allowed:
        return str(value)
    raise InputError(f"{name}: expected {_listed(allowed)}, got {shown(value)}")


def _listed(names: Sequence[object]) -> str:
    quoted = [repr(name) for name in names]
    return " or ".join(quoted) if len(quoted) < 3 else f"one of {', '.join(quoted)}"


def path(name: str, value: object) -> Path:
    """A path. It need not exist. An empty one is refused, as Path would take it for the working directory."""
    if isinstance(value, str | os.PathLike) and value != "":
        return Path(value)
    raise InputError(f"{name}: expected a path, got {shown(value)}")


def tensor(name: str, value: object) -> torch.Tensor:
    """A tensor."""
    if isinstance(value, torch.Tensor):
        return value
    raise InputError(f"{name}: expected a tensor, got {shown(value)}")


def settle(options: Any, **checked: object) -> None:
    """Replace fields of a frozen dataclass by their checked values, from its `__post_init__`."""
    for name, value in checked.items():
        object.__setattr__(options, name, value)
