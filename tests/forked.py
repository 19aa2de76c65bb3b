"""Programs in Python that tests start, forked after the imports that they share, which take longer than most of them run.

A process of each test session, this file as a program, imports torch and the package once. Whatever it is asked for, it forks:
a program begins as `python ARGUMENT…` would, but for these imports. Where a test is about them, or about variables of the
environment that they read, it starts an interpreter of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent


@cache
def _server() -> socket.socket:
    """Where the process that forks is asked. It ends when this one does."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as `command_line.begin` sets it before the imports
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


class Forked:
    """Processes that run `python ARGUMENT…` (a script, or -m and a module), one for each of `environments`.

    Each has this process's environment with its own changes, and begins in its own of the folders, by default in the current
    one. Used with `with`, which ends them.
    """

    def __init__(
        self, arguments: Sequence[Any], environments: Sequence[Mapping[str, str]], folders: Sequence[Path] = ()
    ):
        self.said = tempfile.TemporaryDirectory()
        self.count = len(environments)
        request = {
            "arguments": [os.fsdecode(one) if isinstance(one, bytes | Path) else str(one) for one in arguments],
            "environments": [{**os.environ, **own} for own in environments],
            "folders": [str(one) for one in folders] or [str(Path.cwd())] * self.count,
            "said": self.said.name,
        }
        file = Path(self.said.name) / "request.json"
        file.write_text(json.dumps(request))
        read, write = os.pipe()
        try:
            socket.send_fds(_server(), [f"{file}\n".encode()], [write])
        finally:
            os.close(write)
        self._told = os.fdopen(read)
        self._group: int = json.loads(self._told.readline())
        self.pids: list[int] = json.loads(self._told.readline())
        self._ended = False

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running():
            os.killpg(self._group, signal.SIGKILL)
        self._told.close()
        self.said.cleanup()

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit statuses, when all have ended; a signal's number is negative. Raises TimeoutError."""
        if not select.select([self._told], [], [], seconds)[0]:
            raise TimeoutError(f"{seconds} seconds: {self.all_said()}")
        self._ended = True
        return json.loads(self._told.readline())

    def running(self) -> bool:
        return not self._ended and not select.select([self._told], [], [], 0)[0]

    def out(self, number: int = 0) -> str:
        return (Path(self.said.name) / f"out-{number}").read_text()

    def err(self, number: int = 0) -> str:
        return (Path(self.said.name) / f"err-{number}").read_text()

    def all_said(self) -> list[str]:
        return [self.err(number) for number in range(self.count)]


def python(
    *arguments: Any, cwd: Path = ROOT, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENT…`, when it has ended, with what it wrote."""
    with Forked(arguments, [environment or {}], [cwd]) as one:
        (status,) = one.wait(timeout)
        return subprocess.CompletedProcess([sys.executable, *map(str, arguments)], status, one.out(), one.err())


def last_line(command: Sequence[Any], *_: object) -> str:
    """What a program that must succeed says last: for commands that start others, in the place of what starts them."""
    done = python(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------ the other side


def serve(requests: socket.socket) -> tuple[list[str], str] | None:
    """Fork whatever is asked for. Returns in the processes that are to run a program, with its arguments and folder, or at the
    end."""

    # Each takes a second or so: figures, torch's optimisers, and tensors that several processes share.
    for name in ("matplotlib.pyplot", "torch._dynamo", "torch.distributed.tensor", "minifocus.training.loop"):
        importlib.import_module(name)

    gc.collect()
    gc.freeze()  # at its end a process would else look at all that was imported: half a second
    while True:
        content, descriptors, _, _ = socket.recv_fds(requests, 4096, 1)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not content:
            return None
        (answers,) = descriptors
        if not os.fork():
            requests.close()
            os.setsid()
            return keep(json.loads(Path(content.decode().strip()).read_text()), answers)
        os.close(answers)


def keep(request: dict[str, Any], answers: int) -> tuple[list[str], str]:
    """Start the processes of a request, a group, and tell their ids and, when all have ended, their statuses."""
    said, pids = Path(request["said"]), []
    os.write(answers, f"{os.getpid()}\n".encode())
    for number, (environment, folder) in enumerate(zip(request["environments"], request["folders"], strict=True)):
        outputs = [os.open(said / f"{stream}-{number}", os.O_WRONLY | os.O_CREAT) for stream in ("out", "err")]
        pid = os.fork()
        if not pid:
            os.close(answers)
            for descriptor, output in enumerate(outputs, 1):
                os.dup2(output, descriptor)
                os.close(output)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            return request["arguments"], folder
        for output in outputs:
            os.close(output)
        pids.append(pid)
    statuses: list[int] = []
    with contextlib.suppress(BrokenPipeError):  # of a test that has ended
        os.write(answers, f"{json.dumps(pids)}\n".encode())
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.write(answers, f"{json.dumps(statuses)}\n".encode())
    os._exit(0)


def main() -> None:
    sys.path.pop(0)  # this file's folder
    sys.path.insert(0, str(ROOT))
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        asked = serve(requests)
    if asked is None:
        return
    (first, *rest), folder = asked
    try:
        if first == "-m":
            sys.path[0], sys.argv = folder, rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as leaving:
        end(leaving.code)
    except Exception:
        traceback.print_exc()
        end(1)
    end(0)


def end(code: object) -> NoReturn:
    """Leave as an interpreter does, but for taking apart all that was imported, which takes longer than most programs here."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    main()
