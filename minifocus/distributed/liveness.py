"""Whether the other processes of a run live. Each says so every second; one that falls silent ends the run, by name.

torchrun ends the processes of its own machine when one of them dies. Those of other machines, and those that another launcher
started, would wait for the dead one until their collective's time-out. Here they end within `SILENT` seconds, or within
`CONNECTION` where a broken connection gives the death away. Who is still there is told through the store by which the
processes met, so that it is the same with gloo and NCCL.
"""

from __future__ import annotations

import atexit
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn, cast

from torch.distributed.distributed_c10d import Store

EVERY = 1.0  # seconds from one sign of life to the next
# Without a sign for so many seconds, a process is taken for dead. Some of what is done in C++ lets no other thread of Python
# run, such as writing a file of 5 GB.
SILENT = 90.0
CONNECTION = 5.0  # the same, once a connection has broken
_GRACE = 3.0  # seconds in which the others of a run end by themselves when one has ended with an error

_LEFT, _FAILED = "left", "failed"


class Watch(threading.Thread):
    """This process' signs of life, and a look at the others'. It begins when `beat` has been called by all."""

    def __init__(self, store: Store, rank: int, count: int):
        super().__init__(name="liveness", daemon=True)
        self.store: Store = cast(Any, store).clone()  # a client of its own: the other may be waiting for an answer
        self.rank, self.keys = rank, [f"life of {other}" for other in range(count)]
        self.name_of = [f"process {other}" for other in range(count)]
        self.heard = [("", time.monotonic()) for _ in range(count)]
        self.number, self.over = 0, threading.Event()
        self.looks = threading.Lock()
        atexit.register(self.stop)  # a thread that is in C++ when Python ends would make it abort

    def beat(self) -> None:
        """Give a sign of life."""
        self.number += 1
        self.store.set(self.keys[self.rank], f"{os.getpid()} {self.number} {platform.node()}")

    def silent(self) -> dict[int, float]:
        """The others that have not left, and for how many seconds nothing new has been heard of each."""
        now = time.monotonic()
        for other, sent in enumerate(self.store.multi_get(self.keys)):
            value = sent.decode(errors="replace")
            if value != self.heard[other][0]:
                self.heard[other] = value, now
                if value not in (_LEFT, _FAILED):
                    pid, _, node = value.split(" ", 2)
                    self.name_of[other] = f"process {other} (pid {pid} on {node})"
        others = ((other, *one) for other, one in enumerate(self.heard) if other != self.rank)
        return {other: now - when for other, value, when in others if value != _LEFT}

    def run(self) -> None:
        before = time.monotonic()
        while not self.over.wait(EVERY):
            with self.looks:
                try:
                    self.beat()
                    silence = self.silent()
                except RuntimeError:
                    if not self.over.is_set():
                        self.end(f"{self.name_of[0]}, by which the processes find each other, cannot be reached")
                    return
                now = time.monotonic()
                if now - before > 10 * EVERY:  # this process itself stood still for a while: others may have, too
                    self.heard = [(value, now) for value, _ in self.heard]
                before = now
                for other, seconds in silence.items():
                    failed = self.heard[other][0] == _FAILED
                    if seconds > (_GRACE if failed else SILENT) and not self.over.is_set():
                        self.end(self.verdict(other, seconds))

    def verdict(self, other: int, seconds: float) -> str:
        if self.heard[other][0] == _FAILED:
            return f"{self.name_of[other]} has ended with an error of its own, and the run with it"
        return f"{self.name_of[other]} has died or cannot be reached: nothing was heard of it for {seconds:.0f} s"

    def find_lost(self) -> str | None:
        """After a broken connection: who is lost, in words; None if all others go on giving signs of life."""
        deadline = time.monotonic() + CONNECTION
        try:
            while time.monotonic() < deadline:
                with self.looks:
                    silence = self.silent()
                    for other, seconds in sorted(silence.items(), key=lambda one: -one[1]):
                        if seconds > 3 * EVERY or self.heard[other][0] == _FAILED:
                            return self.verdict(other, seconds)
                time.sleep(EVERY / 5)
        except RuntimeError:
            return f"{self.name_of[0]}, by which the processes find each other, has died or cannot be reached"
        return None

    def end(self, reason: str) -> NoReturn:
        """End this process at once, whatever it waits for."""
        if self.first_to_tell():
            print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def first_to_tell(self) -> bool:
        """Whether no process has said yet why the run ends. The first says it, so that there is one error and not one of each."""
        try:
            return self.store.add("told", 1) == 1
        except RuntimeError:  # nobody is left to ask
            return True

    def stop(self, failed: bool = True) -> None:
        """Give no more signs of life. `failed`: this process leaves with an error, and the others cannot go on."""
        if self.over.is_set():
            return
        self.over.set()
        if self.is_alive():
            self.join(10)
        with suppress(RuntimeError):  # the store has gone before
            self.store.set(self.keys[self.rank], _FAILED if failed else _LEFT)
        atexit.unregister(self.stop)

    def wait_for_others(self) -> None:
        """Until all others have left: of the process that keeps the store, before it ends."""
        deadline = time.monotonic() + SILENT
        while self.silent() and time.monotonic() < deadline:
            time.sleep(0.02)
