"""Processes of one group, started from here and asked together."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from examples.command_line import Failed
from minifocus.distributed.processes import Process


def threads_of(count: int) -> int:
    """Of each of so many processes, which share those that torch would use here in one."""
    return max(1, torch.get_num_threads() // count)


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun would tell each of so many processes."""
    with socket.create_server(("localhost", 0)) as free:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    place["OMP_NUM_THREADS"] = str(threads_of(count))
    return [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Group:
    """So many processes, each with an object that `make` makes of `arguments`. None is busy until it is asked."""

    def __init__(self, name: str, count: int, make: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.name, self.ends, self.processes = name, [], []
        for environment in environments(count):
            end, far_end = context.Pipe()
            process = context.Process(target=serve, args=(far_end, environment, make, arguments), daemon=True)
            process.start()
            far_end.close()  # so that the pipe ends with the process
            self.ends.append(end)
            self.processes.append(process)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What the method gives in each process, in the order of their ranks."""
        for end in self.ends:
            with suppress(BrokenPipeError):  # what ended it comes out below
                end.send((method, arguments))
        return [self._answer(rank) for rank in range(len(self.ends))]

    def _answer(self, rank: int) -> Any:
        try:
            return self.ends[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join()
            status = self.processes[rank].exitcode
            raise Failed(f"{self.name}: process {rank} ended with status {status}") from None

    def close(self) -> None:
        for end in self.ends:  # all of them first: the processes wait for each other to leave
            with suppress(BrokenPipeError):
                end.send(None)
        for process in self.processes:
            process.join()


def serve(connection: Any, environment: dict[str, str], make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """A process of the group: calls its object's methods as it is asked to, until it is sent None."""
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    own = make(*arguments)
    with suppress(EOFError):  # whoever asks has gone
        while (call := connection.recv()) is not None:
            method, given = call
            connection.send(getattr(own, method)(*given))
    Process.current().leave()
