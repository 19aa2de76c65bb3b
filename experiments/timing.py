"""Times side by side: in a round each runs once, one after the other, so that a change in the machine's speed falls on all.

Another busy process does not fall on all alike. With two threads, the one that is kept from its core is waited for at the end of
every product, several milliseconds however short the product. So a round in which a run was disturbed (`clocks.Spent`) is run
again. There are as many such repeats as rounds; after that a disturbed round is kept, and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Generic, TypeVar

from .clocks import Spent

Name = TypeVar("Name")
Result = TypeVar("Result")


def columns(spent: Sequence[Spent]) -> dict[str, Any]:
    """For a record: what every round took, in seconds. A GPU's own clock knows nothing of processors."""
    names = (
        {"rounds": "wall", "processor": "processor", "waiting": "waiting"} if spent[0].threads else {"rounds": "wall"}
    )
    seconds = {key: [round(getattr(one, name), 7) for one in spent] for key, name in names.items()}
    return seconds | {"threads": spent[0].threads}


@dataclass(frozen=True)
class Rounds(Generic[Name, Result]):
    """What every run gave in each round, by its name; how many of these rounds were disturbed, and how many were run again."""

    results: dict[Name, list[Result]]
    disturbed: int
    repeated: int

    def note(self) -> dict[str, int]:
        """For a record."""
        count = len(next(iter(self.results.values())))
        return {"rounds": count, "disturbed": self.disturbed, "repeated": self.repeated}


def interleaved(
    runs: Mapping[Name, Callable[[int], Result]],
    spent: Callable[[Result], Iterable[Spent]],
    rounds: int,
    warm_up: int = 0,
    title: str | None = None,
) -> Rounds[Name, Result]:
    """Rounds of all runs. Runs are given the number of the round; `spent` finds in what one gives what its phases took.

    `warm_up` rounds come first, and what they give is left out. With a `title`, standard error is told of every round.
    """
    results: dict[Name, list[Result]] = {name: [] for name in runs}
    number = disturbed = repeated = 0
    again = ""
    while number < warm_up + rounds:
        if title is not None:
            print(f"{title} {number + 1} of {warm_up + rounds}{again}", file=sys.stderr, flush=True)
        found = {name: run(number) for name, run in runs.items()}
        if number >= warm_up:
            if any(one.disturbed for result in found.values() for one in spent(result)):
                if repeated < rounds:
                    repeated, again = repeated + 1, ", again: disturbed"
                    continue
                disturbed += 1
            for name, result in found.items():
                results[name].append(result)
        number, again = number + 1, ""
    return Rounds(results, disturbed, repeated)


def remark(*notes: Mapping[str, int]) -> str:
    """A sentence for a page about the rounds of these notes; none without a note, as of a record from before there were any."""
    if not notes:
        return ""
    rounds, disturbed, repeated = (sum(note[key] for note in notes) for key in ("rounds", "disturbed", "repeated"))
    again = f" ({repeated} were run again)" if repeated else ""
    return (
        f"{disturbed or 'None'} of {rounds} rounds {'was' if disturbed < 2 else 'were'} disturbed by other work{again}."
    )


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median over rounds of these ÷ those: the machine's speed of a round is in both."""
    return median(a / b for a, b in zip(these, those, strict=True))
