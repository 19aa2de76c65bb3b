"""What the compiler makes of every CUDA kernel: registers, static shared memory, stack and spills, as ptxas reports them.

    python -m experiments.kernels.ptxas [--out experiments/results/ptxas.json]

Needs nvcc, but no GPU and no torch. A kernel that spills, or that has a stack frame, keeps in memory what belongs in
registers; tests/tools/test_ptxas.py allows neither, and holds the recorded file to the sources.
"""

from __future__ import annotations

from pathlib import Path

from examples import command_line

if __name__ == "__main__":
    command_line.begin()


import json
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from subprocess import PIPE
from typing import Any

from csrc.build import NVCC_OPTIONS, ROOT, find_compiler, find_nvcc, version
from examples.command_line import call, expect_file, working, write_text

ARCHITECTURES = ("sm_80", "sm_90")
NUMBERS = {
    "registers": r"Used (\d+) registers",
    "static_shared_bytes": r"(\d+) bytes smem",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}


def ptxas(nvcc: str, source: Path, architecture: str) -> str:
    """What ptxas says while compiling one file for one GPU."""
    compiler = find_compiler()
    host = ["-ccbin", compiler] if compiler else []
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *host, *NVCC_OPTIONS.split(), "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        done = call([*command, "-o", f"{folder}/cubin", str(source)], stdout=PIPE, stderr=PIPE)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def demangle(names: Iterable[str]) -> list[str]:
    """C++ names without parameters, return types and this project's namespaces: region_kernel<float, 4, true>."""
    done = call(["c++filt", "--no-params", *names], stdout=PIPE)
    return [
        re.sub(r"^void |minifocus::cuda::|\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()
    ]


def kernels(said: str, **labels: str) -> list[dict[str, Any]]:
    """The kernels in what ptxas said; the worst of each number where a kernel calls functions that are not inlined."""
    _, *parts = re.split(r"Compiling entry function '(\S+)' for '\S+'", said)
    found = []
    for name, part in zip(demangle(parts[::2]) if parts else [], parts[1::2], strict=True):
        numbers = {key: [int(number) for number in re.findall(pattern, part)] for key, pattern in NUMBERS.items()}
        # ptxas says nothing of shared memory, and only of that, where there is none.
        assert all(values or key == "static_shared_bytes" for key, values in numbers.items()), part
        found.append({"kernel": name, **labels, **{key: max(values, default=0) for key, values in numbers.items()}})
    return found


def report() -> dict[str, Any]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc was not found")
    jobs = list(product(sorted((ROOT / "csrc/cuda").glob("*.cu")), ARCHITECTURES))
    with working(ThreadPoolExecutor()) as pool:
        said = pool.map(lambda job: ptxas(nvcc, *job), jobs)
    rows = [row for (file, gpu), text in zip(jobs, said, strict=True) for row in kernels(text, file=file.name, gpu=gpu)]
    rows.sort(key=lambda row: (row["file"], row["kernel"], row["gpu"]))
    return {"nvcc": version(nvcc), "kernels": rows}


def table(rows: list[dict[str, Any]]) -> str:
    cells = [[key.replace("_", " ") for key in rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report to FILE too")
    arguments = parser.parse_args()
    expect_file(arguments.out, "out")
    result = report()
    print(result["nvcc"], table(result["kernels"]), sep="\n")
    if arguments.out:
        rows = ",\n".join(json.dumps(row) for row in result["kernels"])
        write_text(arguments.out, f'{{"nvcc": {json.dumps(result["nvcc"])}, "kernels": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    command_line.run(main)
