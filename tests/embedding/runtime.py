"""The C++ runtime for tests: built, and packages of small models for it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch._inductor.config
from PIL import Image

import minifocus
from minifocus.export.package import export

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/runtime"
PACKAGES = ROOT / "build/packages"
PAGE = ROOT / "docs/embedding.md"
# What calls the kernels, of which most of an export's time is, is not optimised, and compiled without std::regex.
QUICK = Path(__file__).with_name("quick")
FAST = {"AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0", "CPLUS_INCLUDE_PATH": str(QUICK)}
COMMANDS = PAGE.read_text(encoding="utf-8").partition("```bash\n")[2].partition("```")[0].splitlines()


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """A second process waits for the first one's work, and finds it done."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    with (PACKAGES / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: str, **environment: str) -> str:
    """What a line of docs/embedding.md prints."""
    variables = {**os.environ, **environment}
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def built() -> Path:
    """The runtime's build folder, up to date, as docs/embedding.md builds it."""
    with _alone("runtime"):
        for command in COMMANDS:
            if command.startswith("cmake"):
                _run(command)
    return BUILD


def said(package: Path) -> list[str]:
    """What the page's commands after the export print, of the package at this place."""
    (export_line,) = (place for place, command in enumerate(COMMANDS) if "export.py" in command)
    return [_run(command.replace("runs/package", str(package))) for command in COMMANDS[export_line + 1 :]]


def tiny_package() -> Path:
    """weights/tiny with both samplers in float32, as the page exports it."""
    (command,) = (command for command in COMMANDS if "export.py" in command)
    return _kept("tiny", lambda target: _run(command.replace("runs/package", str(target)), **FAST))


def packaged(name: str, load: Callable[[], minifocus.Llava], sampler: str) -> Path:
    """The package of what `load` gives."""
    pictures = [ROOT / "examples/cards.png", Image.new("RGB", (50, 301), "red")]
    level = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # the variable was read when torch was imported
    with torch._inductor.config.patch(level), patch.dict(os.environ, FAST):
        return _kept(name, lambda target: export(load(), sampler, target, pictures))


def _kept(name: str, make: Callable[[Path], object]) -> Path:
    """What `make` wrote, until some file of minifocus or of weights/tiny changes."""
    digest = hashlib.sha256(repr((torch.__version__, torch.backends.cpu.get_cpu_capability())).encode())
    own = [Path(__file__), QUICK / "regex", PAGE]
    for file in sorted([*(ROOT / "minifocus").rglob("*.py"), *(ROOT / "weights/tiny").iterdir(), *own]):
        digest.update(file.read_bytes())
    target = PACKAGES / f"{name}-{digest.hexdigest()[:16]}"
    with _alone(name):
        if not target.exists():
            make(target)
    return target
