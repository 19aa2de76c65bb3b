"""What a run took, and whether something else had the machine meanwhile.

Beside the wall's clock the processor time is read that all threads of the process had, and the time that they waited for a core.
A run is disturbed where it had less than SHARE of what it wanted, which is the larger of

    threads × wall       `threads` is how many compute all the time by the nature of what is timed: torch's number where nearly
                         all of it is products of large matrices, 1 for anything else (Python, files, many small tensors)
    processor + waiting  of threads that compute now and then; at most all cores × wall, as they may wait for each other

Only Linux tells how long threads wait, and of a process's own alone, not of its children's. A running thread's processor time
is as new as the last tick, some milliseconds ago: of a run that is shorter, waiting tells more.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SHARE = 0.8
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Reading(NamedTuple):
    """Of the clocks, in seconds."""

    wall: float
    processor: float
    waiting: float
    children: bool


def read(children: bool = False) -> Reading:
    """The clocks now. `children`: those of the processes that this one has started and waited for, and of theirs."""
    waiting = _waiting(children)  # before the others, as it takes longest
    return Reading(time.perf_counter(), _processor(children), waiting, children)


def _processor(children: bool) -> float:
    if not children:
        return time.process_time()
    import resource  # which Windows lacks

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _waiting(children: bool) -> float:
    """Seconds that the threads have been ready to run and were kept from it; 0 where the system does not tell."""
    nanoseconds = 0
    for file in () if children else Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9


@dataclass(frozen=True)
class Spent:
    """What a run took, in seconds, and the `threads` that it computes with. A GPU's own clock has none."""

    wall: float
    processor: float = 0.0
    waiting: float = 0.0
    threads: int = 0

    @classmethod
    def since(cls, begun: Reading, threads: int = 1, calls: int = 1) -> Spent:
        """Of one of so many `calls` from a reading until now."""
        wall, processor = time.perf_counter() - begun.wall, _processor(begun.children) - begun.processor
        waiting = max(_waiting(begun.children) - begun.waiting, 0.0)  # a thread that ends takes its own along
        return cls(wall / calls, processor / calls, waiting / calls, threads)

    @property
    def disturbed(self) -> bool:
        wanted = max(self.threads * self.wall, min(CORES * self.wall, self.processor + self.waiting))
        return self.processor < SHARE * wanted
