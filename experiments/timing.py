"""Times side by side: in a round each runs once, one after the other, so that a change in the machine's speed falls on all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

Name = TypeVar("Name")
Result = TypeVar("Result")


def interleaved(
    runs: Mapping[Name, Callable[[int], Result]], rounds: int, warm_up: int = 0, title: str | None = None
) -> dict[Name, list[Result]]:
    """What every run gives in each round, by its name. Runs are given the number of the round.

    `warm_up` rounds come first, and what they give is left out. With a `title`, standard error is told of every round.
    """
    results: dict[Name, list[Result]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        if title is not None:
            print(f"{title} {number + 1} of {warm_up + rounds}", file=sys.stderr, flush=True)
        for name, run in runs.items():
            result = run(number)
            if number >= warm_up:
                results[name].append(result)
    return results


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median over rounds of these ÷ those: the machine's speed of a round is in both."""
    return median(a / b for a, b in zip(these, those, strict=True))
