"""Parts of the C++ runtime for tests: compiled without torch, and meant for ctypes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from csrc.build import find_compiler

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/embedding"
OPTIONS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]


def compile_pieces(name: str, sources: Sequence[str], options: Sequence[str] = ()) -> Path:
    """A shared library of files below the repository's root, in which the headers of csrc/ are found.

    It is compiled anew when a source, a header or an option has changed.
    """
    compiler = find_compiler()
    assert compiler is not None
    read = [*(ROOT / source for source in sources), *sorted((ROOT / "csrc/runtime").rglob("*.h"))]
    digest = hashlib.sha256(repr([compiler, OPTIONS, [*options]]).encode())
    for file in read:
        digest.update(file.read_bytes())
    library = FOLDER / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}.new")
        command = [compiler, *OPTIONS, *options, "-shared", "-I", str(ROOT / "csrc"), *sources, "-o", str(unfinished)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(library)
    return library
