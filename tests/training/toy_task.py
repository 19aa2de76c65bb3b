"""A task whose steps can be worked out by hand, and a run of it: in one process, or as a program in several."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from minifocus.distributed.processes import Process
from minifocus.training.loop import fit
from minifocus.training.settings import Settings


class Task(torch.nn.Module):
    """The mean over a step's targets of a squared error, and the mean over its micro-batches of a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.sometimes = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.seen: list[tuple[int, int, int]] = []

    def forward(self, batch: Any, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.seen.append((batch.number, num_targets, num_batches))
        loss = ((batch.x @ self.weight - 1) ** 2).sum() / num_targets + (self.weight**4).sum() / num_batches
        if batch.number % 3 == 0:
            loss = loss + (self.sometimes - batch.number) ** 2 / num_targets
        return loss, {"number": float(batch.number)}


class Batches:
    def share(self, numbers: Iterable[int], workers: int = 0) -> Iterator[Any]:
        for number in numbers:
            x = torch.randn(1 + number % 4, 2, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            yield SimpleNamespace(number=number, x=x, num_targets=len(x))


def train(folder: Path, batch: int, **options: Any) -> Task:
    task = Task()
    optimizer = torch.optim.SGD([{"params": list(task.parameters()), "lr": 0.02, "peak_lr": 0.02}])
    settings = Settings(**{**dict(steps=3, batch=batch, micro_batch=1, max_grad_norm=1e9, log_every=1), **options})
    folder.mkdir(parents=True, exist_ok=True)
    fit(task, [optimizer], Batches(), settings, folder, torch.device("cpu"), {})
    return task


def main(folder: Path) -> None:
    process = Process.join(torch.device("cpu"))
    task = train(folder, 4)
    seen = process.gather(task.seen)
    if process.rank == 0:
        result = dict(seen=seen, weights=[p.tolist() for p in task.parameters()])
        (folder / "result.json").write_text(json.dumps(result))
    process.leave()
    # Where there is /proc: no thread is left that could get in the way of Python's end.
    sys.exit(", ".join(str(t) for t in Path("/proc/self/task").glob("*/comm") if "gloo" in t.read_text()) or 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
