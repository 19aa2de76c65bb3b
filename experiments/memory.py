"""How much memory a call takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def extra_memory(run: Callable[[], Result], gpu: bool) -> tuple[Result, int | None]:
    """What `run` gives, and the largest amount of memory in use meanwhile above that before, in bytes.

    On a GPU what PyTorch has allocated; else the resident set, of Linux, and None elsewhere.
    """
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    if not _CLEAR.exists():
        return run(), None
    ctypes.CDLL(None).malloc_trim(0)  # pages that the last call left behind would hide this one's
    _CLEAR.write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = run()
    return result, max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
