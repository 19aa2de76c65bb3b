"""Build, test and measure the CUDA operators on a machine with a GPU; one JSON file says how it went.

    python -m experiments.kernels.gpu_check --out DIR

Each step has a time limit of its own, and all end within 10 minutes. First both halves are built for this GPU. Then side by
side, in processes of their own: the tests of graphs, streams and the like; the models and the programs beside the CPU's; the
operators' properties; 20 steps of training in bfloat16; compute-sanitizer's memcheck and racecheck on a few calls of every
operator. Then by themselves, as they are timed: the benchmarks, with importance by the tensor cores and without.
DIR/gpu_check.json holds every step's result, the training's losses, the commit, the device and the versions;
DIR/gpu_check.log what the steps printed. A step that fails does not keep another from running, but the build does.

MINIFOCUS_COMMIT says which commit it is of, where the checkout is a copy without its .git.

Exit status: 0 all passed, 1 a step failed, 2 usage, 3 there is no GPU.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from examples.command_line import write_text

from ..record import ROOT, environment

# What the sanitizers watch: ragged and full sizes, vector and scalar paths, both kinds of products.
SANITIZED = """
import torch, minifocus.ops
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for channels in (37, 64, 1536):
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
    many = torch.rand(5000, device="cuda").to(dtype)
    torch.ops.minifocus.select_top_p(many, torch.tensor([0, 4100, 5000]).cuda(), 0.7)
torch.cuda.synchronize()
"""


RESULTS = {
    "benchmark": "operators_cuda.json",
    "benchmark_without_tensor_cores": "operators_cuda_without_tensor_cores.json",
}


def steps(capability: tuple[int, int], out: Path, scratch: Path) -> list[tuple[str, list[str], dict[str, str], int]]:
    """Name, command, environment, seconds."""
    python = sys.executable
    architecture = ".".join(map(str, capability))
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    benchmark = [python, "-m", "experiments.operators", "--device", "cuda", "--out"]
    train = [python, "examples/train.py", "--device", "cuda", "--bf16", "--steps", "20", "--log-every", "1", "--out"]
    build = {"MINIFOCUS_BUILD": "all", "TORCH_CUDA_ARCH_LIST": architecture}
    every: list[tuple[str, list[str], dict[str, str], int]] = [
        ("build", [python, "-m", "csrc.build"], build, 120),
        # Apart from each other: an error of the device fails whatever comes after it in the same process.
        ("tests", [*pytest, "tests/ops/test_gpu.py"], {}, 90),
        ("models", [*pytest, "-n", "4", "tests/model/test_on_gpu.py"], {}, 200),
        ("properties", [*pytest, "-n", "7", "tests/ops/test_operators.py"], {}, 150),
        ("benchmark", [*benchmark, str(out / RESULTS["benchmark"])], {}, 90),
        (
            "benchmark_without_tensor_cores",
            [*benchmark, str(out / RESULTS["benchmark_without_tensor_cores"])],
            {"MINIFOCUS_TENSOR_CORES": "0"},
            50,
        ),
        ("training", [*train, str(scratch / "training")], {}, 90),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Calls that fail are looked at where they are made; torch makes some that may.
    for tool, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
        command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "9", python, "-c", SANITIZED]
        every.append((tool, command, watched, 120))
    return every


RUNNING: set[subprocess.Popen[bytes]] = set()


def run(command: list[str], settings: dict[str, str], limit: int, output: BinaryIO) -> int | str:
    """Exit status, or why there is none. Whatever the command started ends with it."""
    try:
        running = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return str(error)
    RUNNING.add(running)
    try:
        return running.wait(limit)
    except subprocess.TimeoutExpired:
        return f"took more than {limit} s"
    finally:
        end(running)
        RUNNING.discard(running)


def end(process: subprocess.Popen[bytes]) -> None:
    """Of the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measured(name: str, out: Path, scratch: Path) -> dict[str, Any]:
    """What a step left behind, be it as much as it came to before it failed or was stopped in the middle of a line."""
    file = scratch / "training/log.jsonl" if name == "training" else out / RESULTS.get(name, "none")
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        if name != "training":
            return {"cases": json.loads(text)["cases"]}
        return {"losses": [json.loads(line)["loss"] for line in text.splitlines(keepends=True) if line.endswith("\n")]}
    except ValueError as error:
        return {"unreadable": f"{file.name}: {error}"}


@command_line.guarded
def main() -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU on this machine, so nothing was run", file=sys.stderr)
        return 3
    os.environ.pop("MINIFOCUS_BACKEND", None)  # the operators that it may ask for are yet to be built
    from minifocus.files.locks import hold

    with hold(out):
        return check(out)


def check(out: Path) -> int:
    """All steps, into a folder that is held; the exit status."""
    report = {**environment(Path(__file__), "torch", "hypothesis"), "device": torch.cuda.get_device_name(), "steps": {}}
    report["versions"]["cuda"] = torch.version.cuda
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common = {**os.environ, "MINIFOCUS_BACKEND": "native", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    scratch, log = Path(tempfile.mkdtemp()), out / "gpu_check.log"
    log.write_text("")
    for file in RESULTS.values():  # an earlier run's are not this one's
        (out / file).unlink(missing_ok=True)
    every = steps(torch.cuda.get_device_capability(), out, scratch)

    def take(step: tuple[str, list[str], dict[str, str], int]) -> bool:
        name, command, extra, limit = step
        start = time.monotonic()
        with tempfile.TemporaryFile() as output:
            code = run(command, {**common, **extra}, limit, output)
            output.seek(0)
            said = output.read().decode(errors="replace")
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        result = {"passed": code == 0, "exit": code, "seconds": round(time.monotonic() - start, 1)}
        report["steps"][name] = {**result, "last_line": last[:500], **measured(name, out, scratch)}
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"==== {name}: {shlex.join(command[:6])} …\n{said}\n")
        print(f"{name}: {'passed' if code == 0 else f'FAILED ({code})'}; {last[:200]}", flush=True)
        return code == 0

    def save() -> None:
        done = report["steps"]
        report["steps"] = {name: done[name] for name, *_ in every if name in done}
        write_text(out / "gpu_check.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    built = take(every[0])
    save()
    if built:
        beside = [step for step in every[1:] if step[0] not in RESULTS]
        with ThreadPoolExecutor(len(beside) or 1) as pool:
            try:
                list(pool.map(take, beside))
            except BaseException:  # Ctrl-C reaches this thread alone, and the others wait for what they started
                for process in list(RUNNING):
                    end(process)
                raise
        save()
        for step in every:
            if step[0] in RESULTS:
                take(step)
                save()
    return 0 if all(step["passed"] for step in report["steps"].values()) and len(report["steps"]) > 1 else 1


if __name__ == "__main__":
    command_line.run(main)
