"""The CPU half under AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FAULTY = """
import torch, minifocus.ops
x = torch.randn(16, 4)
torch.ops.minifocus.planted(x)
"""
PLANTED = """
#include "../tensors.h"
static torch::stable::Tensor planted(torch::stable::Tensor x) {
  static_cast<const volatile float*>(x.const_data_ptr())[x.numel()];  // one beyond the end
  return x;
}
STABLE_TORCH_LIBRARY_FRAGMENT(minifocus, library) { library.def("planted(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(minifocus, CPU, library) { library.impl("planted", TORCH_BOX(&planted)); }
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A copy of the package whose CPU half is built with the sanitizers; → the environment to run it in."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++, whose sanitizers these are")
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "minifocus", folder / "minifocus", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    planted = folder / "planted.cpp"
    planted.write_text(PLANTED)
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_folder / "include")]
    stable += [f"-I{ROOT / 'csrc/cpu'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "csrc/register.cpp", planted]
    command = [compiler, *flags, *map(str, sources), *stable, "-o", str(folder / "minifocus/ops/_cpu.abi3.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtime),  # Python itself is not built with them
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "MINIFOCUS_BACKEND": "native",
        "MINIFOCUS_HYPOTHESIS": "quick",
        "OMP_NUM_THREADS": "2",
    }


def test_the_operators_touch_only_what_is_theirs(sanitized: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_operators.py",
        "-k",
        "native",
    ]
    done = subprocess.run(command, cwd=ROOT, env=sanitized, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-300:]


def test_a_planted_fault_is_seen(sanitized: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTY], cwd=tmp_path, env=sanitized, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "planted.cpp:4" in done.stderr, done.stderr[-3000:]
