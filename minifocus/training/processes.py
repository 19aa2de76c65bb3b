"""The processes that share a run: one for each GPU, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..errors import InputError
from ..files.locks import hold


@dataclass(frozen=True)
class Process:
    """One process of a run. torchrun's environment says which."""

    rank: int
    count: int

    @staticmethod
    def join(device: torch.device, even_alone: bool = False) -> Process:
        """Join the process group, if there are other processes. `even_alone`: torchrun may have started this one only."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 - even_alone and not dist.is_initialized():
            # Imported with a group there, as DistributedDataParallel would, it keeps that group's threads alive beyond
            # `leave`, and now and then Python aborts at its end.
            import torch._dynamo  # noqa: F401

            # The others wait while the first validates or saves, on slow disks for longer than the 10 minutes that NCCL
            # allows by itself. One that dies needs no limit: torchrun ends the others.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        return Process.current()

    @staticmethod
    def current() -> Process:
        return Process(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Process(0, 1)

    def sum(self, value: int, device: torch.device) -> int:
        if self.count == 1:
            return value
        total = torch.tensor(value, device=device)
        dist.all_reduce(total)
        return int(total)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], object]) -> None:
        """The first process does `work` while the others wait. An InputError is raised in all, so that none waits for ever."""
        refused: InputError | None = None
        if self.rank == 0:
            try:
                work()
            except InputError as error:
                refused = error
        told = self.gather(refused)[0]
        if isinstance(told, InputError):
            raise told

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Within it, no other run writes into `folder`: the first process holds the lock for all (see `locks.hold`)."""
        with ExitStack() as held:
            self.first(lambda: held.enter_context(hold(folder)))
            yield

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process has a share, gathered on the CPU, by all of them at once; any other as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
