"""What processes do together, and one that is stopped in the middle: a script for test_faults.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch

from minifocus.distributed import liveness, processes
from minifocus.distributed.processes import Tasks, joined
from minifocus.errors import InputError

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples import command_line


@command_line.guarded
def main() -> None:
    with (
        mock.patch.object(processes, "COLLECTIVE", timedelta(seconds=3)),
        mock.patch.object(processes, "_DISK", 0.5),
        mock.patch.object(liveness, "SILENT", 8.0),
        joined(torch.device("cpu")) as process,
    ):
        process.first(lambda: time.sleep(5))  # longer than a collective may take
        try:
            with process.alone(Path("run")):
                pass
        except InputError as error:
            print(error)
        with process.alone(Path(sys.argv[1])):
            print("shared")
        tasks = Tasks(process, 20)
        own = []
        for number in tasks:
            own.append(number)
            tasks.done(2)
            time.sleep(0.02 if process.rank else 0.002)
        every = process.gather(own)
        print(sorted([*every[0], *every[1]]) == list(range(20)), len(every[0]) > len(every[1]) > 0, tasks.done())
        sys.stdout.flush()
        if process.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        process.first(lambda: time.sleep(600))


if __name__ == "__main__":
    command_line.run(main)
