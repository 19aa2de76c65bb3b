"""What the CUDA compiler makes of the kernels: everything in registers, and as the repository records it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "experiments/results/ptxas.json"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("ptxas") / "ptxas.json"
    command = [sys.executable, "-m", "experiments.kernels.ptxas", "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr.strip() == "nvcc was not found":
        pytest.skip("nvcc was not found; without it the CUDA kernels cannot be compiled")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_kernels_neither_spill_nor_use_a_stack(report: dict[str, Any]) -> None:
    assert report["kernels"]
    memory = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
    assert [kernel for kernel in report["kernels"] if any(kernel[key] for key in memory)] == []


def test_room_is_left_for_what_a_kernel_has_beside_its_dynamic_shared_memory(report: dict[str, Any]) -> None:
    """gpu::launch asks for all that a block may have, less 2 KB: with more variables of its own, a kernel would not start."""
    dynamic = {f.name for f in (ROOT / "csrc/cuda").glob("*.cu") if "DYN_SHARED" in f.read_text()}
    rows = [row for row in report["kernels"] if Path(row["file"]).name in dynamic]
    assert dynamic and rows and max(row["static_shared_bytes"] for row in rows) <= 2048


def test_record_is_of_these_kernels(report: dict[str, Any]) -> None:
    """The same kernels whichever nvcc made the record, and the same numbers where it was this one."""
    record = json.loads(RECORD.read_text())
    if record["nvcc"] == report["nvcc"]:
        assert record == report
    names = [[(row["file"], row["kernel"], row["gpu"]) for row in each["kernels"]] for each in (record, report)]
    assert names[0] == names[1]
