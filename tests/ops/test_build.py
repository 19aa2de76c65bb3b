"""What csrc/build.py makes, in the hands of another compiler's settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc import build

PROGRAM = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
rows = torch.arange(1000.0).view(100, 10)
(found,) = torch.ops.minifocus.gather_tokens([rows], torch.tensor([3, -1, 99]))
assert found.tolist() == [rows[3].tolist(), [0.0] * 10, rows[99].tolist()]
try:
    torch.ops.minifocus.gather_tokens([rows], torch.tensor([100]))
except RuntimeError as error:
    print(error)
"""


def test_the_packages_ninja_is_taken_before_one_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip builds with the package's. With two versions in turn, `make install` built everything twice."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ninja = build.find_ninja()
    assert ninja is not None
    assert subprocess.run([*ninja, "--version"], capture_output=True).returncode == 0
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    assert build.find_ninja() == ["ninja"]
    monkeypatch.setenv("PATH", "")
    assert build.find_ninja() is None


def test_a_libstdcxx_of_its_own_does_not_meet_that_of_torch(tmp_path: Path) -> None:
    """Some toolchains link it statically. Its streams, which write the error, crashed when torch's stood in for a part of it."""
    objects = sorted((build.ROOT / build.BUILD / "cpu").glob("*.o"))
    compiler = shutil.which("g++")
    if not objects or compiler is None:
        pytest.skip("needs g++ and the objects of `make install`")
    library = tmp_path / build.library("cpu")
    link = [compiler, *build.LINK_OPTIONS.split(), "-static-libstdc++", *map(str, objects)]
    link += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(link, check=True)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "index: expected from -1 to 99, got 100"), done.stderr
