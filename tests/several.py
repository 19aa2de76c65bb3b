"""Processes of one run, as torchrun would start them, but forked after the imports, which take longer than most runs here.

As a program: `several.py COUNT FOLDER MODULE ARGUMENT…` runs examples/MODULE.py or the file MODULE; FOLDER has what each said.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Several:
    """`count` processes that run a script. Used with `with`, which ends them."""

    def __init__(self, count: int, module: str | Path, *arguments: Any, folders: tuple[Path, ...] = ()):
        """`folders`: in which each of them begins."""
        self.said = tempfile.TemporaryDirectory()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FOLDERS": json.dumps([str(one) for one in folders])}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as `command_line.begin` sets it before the imports
        self.program = subprocess.Popen(
            [sys.executable, __file__, *map(str, (count, self.said.name, module, *arguments))],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.count = count

    def __enter__(self) -> Several:
        assert self.program.stdout is not None
        self.pids = json.loads(self.program.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        if self.program.poll() is None:
            os.killpg(self.program.pid, signal.SIGKILL)
        self.program.communicate()
        self.said.cleanup()

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit statuses, when all have ended; a signal's number is negative."""
        return json.loads(self.program.communicate(timeout=seconds)[0])

    def out(self, rank: int) -> str:
        return (Path(self.said.name) / f"out-{rank}").read_text()

    def err(self, rank: int) -> str:
        return (Path(self.said.name) / f"err-{rank}").read_text()

    def running(self) -> bool:
        return self.program.poll() is None

    def all_said(self) -> list[str]:
        return [self.err(rank) for rank in range(self.count)]


def main(count: int, folder: Path, name: str, *arguments: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch._dynamo  # noqa: F401
    from example_scripts import example

    module = example(name)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    folders, pids = json.loads(os.environ["FOLDERS"]), []
    for rank in range(count):
        for stream in ("out", "err"):
            (folder / f"{stream}-{rank}").touch()
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            for descriptor, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{stream}-{rank}", os.O_WRONLY), descriptor)
            if folders:
                os.chdir(folders[rank])
            sys.argv = [name, *arguments]
            module.command_line.run(module.main)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
