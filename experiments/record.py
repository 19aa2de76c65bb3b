"""What every recorded figure comes with: the command, the commit, the versions and the machine that gave it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT, CPUINFO = Path(__file__).resolve().parent.parent, Path("/proc/cpuinfo")
MATRIX_FLAGS = re.compile(r"avx2|avx512f|avx512_(bf16|fp16|vnni)|avx_vnni|amx_")  # of x86, as Linux names them


def git(*arguments: str) -> str | None:
    """What a git command of this repository printed; None where it failed, as it does outside of one or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The first 12 digits of the checkout's commit, with a + where files differ from it."""
    found = git("rev-parse", "--short=12", "--verify", "--quiet", "HEAD")
    return "none" if found is None else found + ("+" if git("status", "--porcelain") else "")


def environment(script: Path, *packages: str) -> dict[str, Any]:
    """Of `script`, run as it was now; the versions of `packages` besides those of Python and minifocus.

    MINIFOCUS_COMMIT says the commit of a copy, which has no .git, or one of its own.
    """

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    copy_of = os.environ.get("MINIFOCUS_COMMIT")
    changes = git("status", "--porcelain")
    return {
        "command": shlex.join(["python", *invoked(script), *sys.argv[1:]]),
        "commit": copy_of or git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": None if copy_of or changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in (*packages, "minifocus")},
        },
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """The processor, what of it products of matrices can use, and how many processes it had to run over the last minute."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return {
        "cpu": fields.get("model name") or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in fields.get("flags", "").split() if MATRIX_FLAGS.match(flag)],
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def device_name(device: str) -> str:
    """ "cpu", or the name of the GPU."""
    if device == "cpu":
        return device
    import torch  # only here: some programs measure what others import

    return torch.cuda.get_device_name(device)


def invoked(script: Path) -> list[str]:
    """How a program of this package is started: as a module, from the repository's root."""
    return ["-m", relative(script).removesuffix(".py").replace("/", ".")]


def relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def last_line(command: list[str]) -> str:
    """The last line that one of the repository's scripts printed."""
    print("$", shlex.join(["python", *command]), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode in (2, 130):  # a mistake of the user's, of which it has told, or interrupted
        raise SystemExit(done.returncode)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command[:2])} ended with {done.returncode}")
    return done.stdout.strip().splitlines()[-1]
