"""What csrc/build.py makes, in the hands of another compiler's settings."""

from __future__ import annotations

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
