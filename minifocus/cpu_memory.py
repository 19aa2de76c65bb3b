"""Where large arrays on a CPU come from, and where they go.

A prompt's arrays are tens of megabytes large. By default each comes from the system in pages of 4 KB that it has to clear, which
takes a tenth of a CLIP tower's time, and what the C library keeps of freed ones is more than they need at once.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of what mallopt sets
_LARGEST = 2**31 - 1
_LARGE = 2**22  # bytes


def want_huge_pages() -> None:
    """Have torch ask Linux for pages of 2 MB, which are cleared at once. Only before it has made its first tensor; a variable of
    the environment that the user has set stays."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: a training's next step needs arrays of the same sizes again."""
    _mallopt(_TRIM_THRESHOLD, _LARGEST)
    _mallopt(_MMAP_THRESHOLD, _LARGEST)


def give_back_freed_memory() -> None:
    """Have glibc give large arrays back to the system as soon as they are freed, for mapped weights need the room."""
    _mallopt(_MMAP_THRESHOLD, _LARGE)


def _mallopt(what: int, value: int) -> None:
    """Does nothing with another C library."""
    try:
        ctypes.CDLL(None).mallopt(what, value)
    except (OSError, AttributeError, TypeError):
        return
