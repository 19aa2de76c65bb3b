"""Parts of csrc/runtime compiled for a test, without torch: a shared library for ctypes, or a program.

The sources are compiled as one, which reads the standard library's headers once: this takes half the time. No two of them may
have one name of their own for two things.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "csrc/runtime"
CACHE = ROOT / "build/embedding"
COMMON = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fPIC", "-ffp-contract=off", "-I", str(ROOT / "csrc")]
SANITIZED = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.fail("no g++ to compile csrc/runtime with")
    return path


def compiled(
    sources: Sequence[Path],
    libraries: Sequence[str] = (),
    flags: Sequence[str] = ("-O2", "-shared"),
    name: str | None = None,
) -> Path:
    """The file that g++ makes of C++ sources and -l libraries, from the cache if nothing that goes into it has changed.

    `name` is the file's in the cache, the first source's by default.

    Fails the test, with g++'s message, where they do not compile.
    """
    name = name or sources[0].stem
    digest = hashlib.sha256("\0".join([*COMMON, *flags, *libraries]).encode())
    for file in [*sources, *sorted(RUNTIME.rglob("*.h")), ROOT / "csrc/cpu/simd.h"]:
        digest.update(file.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's build
        if not target.exists():
            for old in CACHE.glob(f"{name}-*"):
                old.unlink()
            every, part = target.with_suffix(".cpp"), target.with_suffix(".part")
            every.write_text("".join(f'#include "{source}"\n' for source in sources))
            arguments = [*COMMON, *flags, every, *(f"-l{library}" for library in libraries), "-o", part]
            done = subprocess.run([compiler(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
            if done.returncode:
                pytest.fail(f"g++ {' '.join(map(str, arguments))}\n{done.stderr[-4000:]}")
            part.replace(target)
    return target
