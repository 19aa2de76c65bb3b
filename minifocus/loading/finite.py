"""Whether weights hold NaN or infinity. Of those that are mapped into memory a thread tells, while a model is made for them.

To read all weights once is most of what loading takes, and the rest is Python on one core. An operation of torch ends when all
of its threads have, which takes milliseconds where the machine has other work, however small the tensor. So tensors that are
neighbours in memory, as those of a file are, are looked at in one operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

PIECE = 2**30  # bytes of one operation: after each the check can end, and progress is told


def is_finite(value: torch.Tensor) -> bool:
    """Whether all values of a floating-point tensor are finite, on its own device and without a copy.

    A sum is only finite if all its terms are, and summing is the fastest pass over memory. A sum that is not finite may have
    overflowed, so the extremes are then looked at: NaN is both of them.
    """
    if value.sum().isfinite():
        return True
    least, largest = value.aminmax()
    return bool(least.isfinite() & largest.isfinite())


@contextmanager
def checking(tensors: Iterable[torch.Tensor]) -> Iterator[Callable[[Callable[[int], None]], bool]]:
    """A thread checks contiguous tensors on the CPU for as long as the block runs; nobody may write into them meanwhile.

    Gives a function that waits for it and returns whether all values are finite. It calls what it is given with the number
    of bytes that were checked since its last call. When the block ends the thread does, too, at the end of its operation.
    """
    kept = list(tensors)
    pool = ThreadPoolExecutor(1, "minifocus-check")
    try:
        jobs = [(piece[1], pool.submit(_piece_is_finite, kept, *piece)) for piece in _pieces(kept)]

        def finish(checked: Callable[[int], None]) -> bool:
            for size, job in jobs:
                if not job.result():
                    return False
                checked(size)
            return True

        yield finish
    finally:
        pool.shutdown(cancel_futures=True)


def _piece_is_finite(kept: Sequence[torch.Tensor], start: int, size: int, dtype: torch.dtype) -> bool:
    """Of the memory at an address; `kept` are the tensors whose it is, which must not go before this has ended."""
    return is_finite(torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=dtype))


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int, torch.dtype]]:
    """Address, bytes and dtype of the memory of all tensors: neighbours joined, then cut into pieces of at most PIECE."""
    joined: list[tuple[int, int, torch.dtype]] = []
    for value in sorted((value for value in tensors if value.nbytes), key=lambda value: value.data_ptr()):
        start, size, dtype = joined[-1] if joined else (0, 0, value.dtype)
        if start + size == value.data_ptr() and dtype == value.dtype:
            joined[-1] = (start, size + value.nbytes, dtype)
        else:
            joined.append((value.data_ptr(), value.nbytes, value.dtype))
    for start, size, dtype in joined:
        for done in range(0, size, PIECE):
            yield start + done, min(PIECE, size - done), dtype
