"""Build, test and measure the CUDA operators on a machine with a GPU; one JSON file says how it went.

    python scripts/gpu_check.py --out DIR

In order, each step with a time limit of its own, under 10 minutes in all: build both halves for this GPU; the tests marked
`gpu`; the benchmarks, with importance's tensor-core kernels and without; 20 steps of training in bfloat16; compute-sanitizer's
memcheck and racecheck on a few calls of every operator. DIR/gpu_check.json holds every step's result, the commit, the device
and the versions; DIR/<step>.log what it printed. A step that fails does not keep the next from running, but the build does.

Exit status: 0 all passed, 1 a step failed, 2 usage, 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from record import environment  # noqa: E402

# What the sanitizers watch: ragged and full sizes, vector and scalar paths, both kinds of products.
SANITIZED = """
import torch, minifocus.ops
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for channels in (37, 64):
        x = torch.randn(13 * 11 + 16, channels, device="cuda", dtype=dtype)
        grid, pools = torch.tensor([[13, 11], [4, 4]]), [4, 4, 2, 2, 1, 1]
        context, bias = torch.randn(2, 3, channels, device="cuda"), torch.zeros(3, device="cuda")
        tokens, _, offsets, choice = torch.ops.minifocus.region_route(x, grid, context, bias, 4, pools)
        weight = torch.rand(len(choice), device="cuda")
        torch.ops.minifocus.region_pool(x, grid, choice, 4, pools, weight)
        grad = torch.randn_like(x)
        torch.ops.minifocus.region_pool_backward(grad, x, grid, choice, offsets, 4, pools, weight)
    for dim in (24, 33):
        q = torch.randn(21, 6, dim, device="cuda", dtype=dtype)
        k = torch.randn(143, 2, dim, device="cuda", dtype=dtype)
        cu_text, cu_visual = torch.tensor([0, 4, 21]).cuda(), torch.tensor([0, 70, 143]).cuda()
        scores = torch.ops.minifocus.importance(q, k, cu_text, cu_visual, 0.3)
    index, count = torch.ops.minifocus.select_top_p(scores, cu_visual, 0.7)
    torch.ops.minifocus.gather_tokens([k, torch.arange(143).cuda()], index)
torch.cuda.synchronize()
"""


def steps(capability: tuple[int, int], out: Path) -> list[tuple[str, list[str], dict[str, str], int]]:
    """Name, command, environment, seconds."""
    python = sys.executable
    architecture = ".".join(map(str, capability))
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/test_operators.py",
        "tests/test_gpu.py",
    ]
    benchmark = [python, "benchmarks/operators.py", "--device", "cuda"]
    every = [
        (
            "build",
            [python, "scripts/build_operators.py"],
            {"MINIFOCUS_BUILD": "all", "TORCH_CUDA_ARCH_LIST": architecture},
            120,
        ),
        ("tests", pytest, {}, 150),
        ("benchmark", [*benchmark, "--out", str(out / "operators_cuda.json")], {}, 90),
        (
            "benchmark_tensor_cores",
            [*benchmark, "--out", str(out / "operators_cuda_tensor_cores.json")],
            {"MINIFOCUS_TENSOR_CORES": "1"},
            60,
        ),
    ]
    train = [python, "examples/train.py", "--device", "cuda", "--bf16", "--steps", "20", "--log-every", "1"]
    every.append(("training", [*train, "--out", tempfile.mkdtemp()], {}, 50))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", SANITIZED]
        every.append((tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MINIFOCUS_TENSOR_CORES": "1"}, 60))
    return every


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU on this machine, so nothing was run", file=sys.stderr)
        return 3
    out.mkdir(parents=True, exist_ok=True)
    report = {**environment(Path(__file__), "torch", "hypothesis"), "device": torch.cuda.get_device_name(), "steps": {}}
    report["versions"]["cuda"] = torch.version.cuda
    for name, command, extra, limit in steps(torch.cuda.get_device_capability(), out):
        start, log = time.monotonic(), out / f"{name}.log"
        settings = {**os.environ, "MINIFOCUS_BACKEND": "native", "PYTHONPATH": str(ROOT), **extra}
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"took more than {limit} s"
            except OSError as error:
                code = str(error)
        lines = log.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        report["steps"][name] = {"passed": code == 0, "exit": code, "seconds": round(time.monotonic() - start, 1)}
        if name.startswith("benchmark") and code == 0:
            report["steps"][name]["cases"] = json.loads(last)["cases"]
        else:
            report["steps"][name]["last_line"] = last
        print(f"{name}: {'passed' if code == 0 else f'FAILED ({code})'}; {last[:200]}", flush=True)
        (out / "gpu_check.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if name == "build" and code != 0:
            break
    return 0 if all(step["passed"] for step in report["steps"].values()) and len(report["steps"]) > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
