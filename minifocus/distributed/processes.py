"""The processes that share a run: one for each GPU, started by torchrun."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count as numbers
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import InputError
from ..files.locks import hold
from ..files.reading import named
from . import liveness

# A process that does not come, and a collective that does not end. Both are errors, as waiting for ever would hide them. What
# the first process does alone (`first`) may take longer.
JOINING, COLLECTIVE = timedelta(minutes=10), timedelta(minutes=30)
_DISK = 10.0  # seconds in which a new file is seen on a disk that processes share


@dataclass
class _Meeting:
    """Where the processes of a run meet: the store, and the watch over who is still there."""

    store: Store
    watch: liveness.Watch
    number: Iterator[int]  # of what they have agreed on so far, which is the same in all


_meeting: _Meeting | None = None


@dataclass(frozen=True)
class Process:
    """One process of a run. torchrun's environment says which."""

    rank: int
    count: int

    @staticmethod
    def join(device: torch.device, even_alone: bool = False) -> Process:
        """Join the process group, if there are other processes. `even_alone`: torchrun may have started this one only.

        Raises InputError where one of them does not come.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 - even_alone and not dist.is_initialized():
            # Imported with a group there, as DistributedDataParallel would, it keeps that group's threads alive beyond
            # `leave`, and now and then Python aborts at its end.
            import torch._dynamo  # noqa: F401

            _meet("nccl" if device.type == "cuda" else "gloo")
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
        """The first process does `work` while the others wait, for as long as it lives.

        An InputError is raised in all, so that none waits for ever.
        """
        if self.count == 1:
            work()
            return
        assert _meeting is not None
        key = f"first {next(_meeting.number)}"
        if self.rank:
            pause = 0.001
            while not _meeting.store.check([key]):  # no collective, whose time-out a slow disk might exceed
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            refused = _meeting.store.get(key).decode()
            if refused:
                raise InputError(refused)
            return
        try:
            work()
        except InputError as error:
            _meeting.store.set(key, str(error) or "refused")
            raise
        _meeting.store.set(key, "")

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Within it, no other run writes into `folder`: the first process holds the lock for all (see `locks.hold`).

        Raises InputError, also where it is not the same folder for all processes.
        """
        with ExitStack() as held:
            self.first(lambda: held.enter_context(hold(folder)))
            self._check_shared(folder)
            yield

    def _check_shared(self, folder: Path) -> None:
        """Refuse a folder in which a process does not see what the first one writes, or cannot write itself."""
        if self.count == 1:
            return
        mark = folder / f".unfinished-{self.gather(uuid.uuid4().hex[:8])[0]}"
        own = mark.with_name(f"{mark.name}-{self.rank}")

        def write() -> None:
            try:
                mark.touch()
            except OSError as error:
                raise InputError(f"{named(folder)}: cannot be written: {error.strerror}") from error

        self.first(write)
        reason = None
        try:
            deadline = time.monotonic() + _DISK
            while not mark.exists():
                if time.monotonic() > deadline:
                    reason = "does not see there what process 0 writes"
                    break
                time.sleep(0.1)
            else:
                own.touch()
                own.unlink()
        except OSError as error:
            reason = f"cannot write there: {error.strerror}"
        found = self.gather(reason and f"process {self.rank} on {platform.node()} {reason}")
        if self.rank == 0:
            mark.unlink(missing_ok=True)
        wrong = [one for one in found if one]
        if wrong:
            raise InputError(
                f"{named(folder)}: expected a folder on a disk that all processes share: {'; '.join(wrong[:3])}"
            )

    def leave(self, failed: bool = False) -> None:
        """Leave the others, when all is done or, if `failed`, with an error of this process."""
        global _meeting
        meeting, _meeting = _meeting, None
        if meeting is not None:
            meeting.watch.stop(failed)
            if self.rank == 0 and not failed:
                meeting.watch.wait_for_others()
        if dist.is_initialized() and not failed:  # one that failed ends, and the farewell might wait for the others
            dist.destroy_process_group()


@contextmanager
def joined(device: torch.device, even_alone: bool = False) -> Iterator[Process]:
    """Within it, this process is one of its run's (see `Process.join`).

    An error of this process ends the others. One that comes of a connection to a process that has died names that process. The
    first process with an error raises it; the others, whose errors are the same or follow from it, leave with status 1.
    """
    process = Process.join(device, even_alone)
    try:
        yield process
    except BaseException as error:
        if _meeting is None or process.count == 1:
            raise
        watch = _meeting.watch
        lost = watch.find_lost() if _of_a_connection(error) else None
        if lost is not None:
            watch.end(lost)
        first = watch.first_to_tell()
        process.leave(failed=True)
        if first:
            raise
        raise SystemExit(1) from error
    process.leave()


def _of_a_connection(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is one of the messages between processes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return True
        error = error.__cause__ or error.__context__
    return False


def _meet(backend: str) -> None:
    global _meeting
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, rank, count = next(rendezvous("env://", timeout=JOINING))
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(f"process {rank}: cannot reach the others at {place}: {str(error).splitlines()[0]}") from error
    store = PrefixStore("minifocus", store)
    watch = liveness.Watch(store, rank, count)
    watch.beat()
    try:
        store.wait(watch.keys, JOINING)
    except RuntimeError as error:
        missing = [str(other) for other in range(count) if not store.check(watch.keys[other : other + 1])]
        raise InputError(
            f"process {rank}: expected {count} processes, and {', '.join(missing[:10])} did not come within {JOINING}"
        ) from error
    if count > 1:
        watch.start()
    _meeting = _Meeting(store, watch, numbers())
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=count, timeout=COLLECTIVE)


class Tasks:
    """Numbers below `total`, of which each goes to one process: whichever is free takes the next.

    All processes make one, in the same order among what they agree on.
    """

    def __init__(self, process: Process, total: int):
        self.total, self.own = total, {"taken": 0, "done": 0}
        self.store = None
        if process.count > 1:
            assert _meeting is not None
            self.store = PrefixStore(f"tasks {next(_meeting.number)}", _meeting.store)

    def __iter__(self) -> Iterator[int]:
        while (number := self._add("taken", 1)) <= self.total:
            yield number - 1

    def done(self, more: int = 0) -> int:
        """How much is done, by all processes, after `more` by this one."""
        return self._add("done", more)

    def _add(self, name: str, more: int) -> int:
        if self.store is not None:
            return self.store.add(name, more)
        self.own[name] += more
        return self.own[name]


def local_device(device: str | torch.device) -> str | torch.device:
    """Of GPUs, the one that torchrun meant this process of a machine to have; any other device as it is."""
    if str(device).partition(":")[0] == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process has a share, gathered on the CPU, by all of them at once; any other as it is."""
    # DTensor, the class of such a tensor, takes half a second to import.
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
