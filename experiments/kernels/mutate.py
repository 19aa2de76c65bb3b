"""Break the CUDA kernels on purpose, one line at a time, and see whether the property tests notice.

    python -m experiments.kernels.mutate --out experiments/results/mutants.json
    python -m experiments.kernels.mutate --only region.cu      # the mutants of one file

Two kinds of mutants: every barrier and memory-ordering call deleted, and the lines of BREAKS changed. Each is made in a copy
of the sources, and the emulated tests of the operators that it concerns are run on it (tests/ops/test_operators.py), until the
first failure. A mutant that survives is a line that does not matter, or a gap in the tests.

Exit status: 0 every mutant was noticed, 1 one survived, 2 usage or a mutant that does not apply any more.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from subprocess import PIPE

from examples.command_line import call, expect_file, expect_numbers, working, write_text

from ..record import ROOT, environment

TESTS = {  # the operators that a file's lines are part of, as pytest's -k takes them
    "region.cu": "test_region_pool or test_region_route or look_back",
    "region_backward.cu": "test_region_pool_backward",
    "regions.h": "test_region_pool or test_region_route",
    "vectors.h": "test_region_pool or test_region_route",
    "importance.h": "test_importance",
    "importance.cu": "test_importance",
    "importance_tensor_cores.cu": "test_importance or do_not_exist",
    "select.cu": "test_select_top_p",
    "gpu.h": "test_select_top_p or test_region_route",
    "gather.cu": "test_gather_tokens",
}
BREAKS = [  # file, line, what it becomes
    ("gpu.h", "if (shared_bytes > 40 * 1024) {", "if (shared_bytes > 48 * 1024) {"),
    ("regions.h", "region.width = min(window, pictures.width[p] - region.left);", "region.width = window;"),
    ("regions.h", "pictures.first_region[middle] <= number", "pictures.first_region[middle] < number"),
    (
        "vectors.h",
        "const bool taken = b > a || (b != b && a == a);",
        "const bool taken = b >= a || (b != b && a == a);",
    ),
    ("vectors.h", "const bool taken = b > a || (b != b && a == a);", "const bool taken = b > a;"),
    ("region.cu", "before += tokens;", "before = tokens;"),
    ("region.cu", "const int nearest = sums ? __ffs(sums) - 1 : 31;", "const int nearest = 31;"),
    ("region.cu", "cudaMemsetAsync(args.source, 0xff,", "cudaMemsetAsync(args.source, 0,"),
    ("region.cu", "const bool kept = column < k.cached;", "const bool kept = column <= k.cached;"),
    ("region.cu", "for (along += share.tokens;", "for (along += 1;"),
    (
        "region_backward.cu",
        "pooled.v[j] = value.v[j];\n              winner[j] = cell;",
        "pooled.v[j] = value.v[j];\n              winner[j] = 0;",
    ),
    (
        "importance.cu",
        "if (8 * part + 2 * c + i < keys && product != -INFINITY) added",
        "if (product != -INFINITY) added",
    ),
    ("importance.cu", "sum[row] * expf(largest[row] - above)", "sum[row]"),
    ("importance.cu", "if (text >= item.num_text) continue;", ""),
    (
        "importance.cu",
        "const float right = to_float(k.v[first_key + 8 * part + 2 * c + 1][channel]);",
        "const float right = left;",
    ),
    ("importance_tensor_cores.cu", "b[upper_channels], 4 * (2 * c + 1) + o)", "b[upper_channels], 4 * (2 * c) + o)"),
    ("importance_tensor_cores.cu", "if (row < rows && channel < dim) word", "if (row < rows) word"),
    ("importance_tensor_cores.cu", "if (row < rows && channel < dim) word", "if (channel < dim) word"),
    (
        "importance_tensor_cores.cu",
        "+ i < num_keys ? product * arguments.scale",
        "+ i < num_keys + 1 ? product * arguments.scale",
    ),
    ("importance_tensor_cores.cu", "if (exists[i / 2]) keep_first_max", "keep_first_max"),
    ("importance_tensor_cores.cu", "if (keys_of != head / group)", "if (keys_of < 0)"),
    ("importance_tensor_cores.cu", "const int kv_head = head / int(arguments.group)", "const int kv_head = 0"),
    ("select.cu", "(is_tie && tie < ties)", "(is_tie && tie <= ties)"),
    ("select.cu", "own_bits == digit ? group.steps[j] : 0.", "own_bits >= digit ? group.steps[j] : 0."),
    ("select.cu", "ties_before += exchange.all.x;", ""),
    ("select.cu", "__float_as_uint(score == 0.f ? 0.f : score)", "__float_as_uint(score)"),
    ("select.cu", "ldexp(1., 52 - bits)", "ldexp(1., 12 - bits)"),
    ("gather.cu", "if (row >= 0) value[j]", "if (row > 0) value[j]"),
]
ORDERING = re.compile(r"__syncthreads\(\);|__syncwarp\(\);|__syncthreads_or\((?=\w)")


def mutants() -> list[tuple[str, str, str, int, str]]:
    """File, what is done, its text, the place in it, and what the text becomes."""
    found = []
    for file in sorted(TESTS):
        text = (ROOT / "csrc/cuda" / file).read_text()
        for match in ORDERING.finditer(text):
            line = text[: match.start()].count("\n") + 1
            becomes = "(" if match[0].endswith("(") else ";"
            found.append((file, f"line {line}: {match[0].rstrip(';(')} deleted", match[0], match.start(), becomes))
    for file, old, new in BREAKS:
        text = (ROOT / "csrc/cuda" / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file}: {old!r} is there {text.count(old)} times, not once")
        found.append((file, f"{old!r} becomes {new!r}", old, text.index(old), new))
    return found


def copy_sources(to: Path) -> Path:
    for folder in ("csrc", "tests", "minifocus"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def try_out(mutant: tuple[str, str, str, int, str], copies: Queue[Path]) -> dict[str, str]:
    """The mutant's tests in one of the copies, which is as it was afterwards."""
    file, what, old, place, new = mutant
    copy, start = copies.get(), time.monotonic()
    target = copy / "csrc/cuda" / file
    original = target.read_text()
    target.write_text(original[:place] + new + original[place + len(old) :])
    chosen = f"(emulated or look_back or tensor_cores or do_not_exist) and ({TESTS[file]})"
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
        chosen,
    ]
    done = call(command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, stdout=PIPE, stderr=PIPE)
    target.write_text(original)
    copies.put(copy)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{file}: {what}: pytest did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))]
    said = next((line for line in lines if "Error" in line or "assert" in line), lines[0] if lines else "")
    outcome = "noticed" if done.returncode else "SURVIVED"
    said = said.removeprefix("E").strip()[:200]
    print(f"{outcome:9} {file} {what} ({time.monotonic() - start:.0f} s) {said[:100]}", flush=True)
    return {"file": file, "mutant": what, "outcome": outcome, "said": said}


@command_line.guarded
def main() -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--only", choices=sorted(TESTS), help="the mutants of this file")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at a time")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "jobs", 1000)
    expect_file(arguments.out, "out")
    report = environment(Path(__file__), "torch", "hypothesis")
    wanted = [mutant for mutant in mutants() if arguments.only in (None, mutant[0])]
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as scratch, working(ThreadPoolExecutor(arguments.jobs)) as pool:
        for job in range(arguments.jobs):
            copies.put(copy_sources(Path(scratch) / str(job)))
        results = list(pool.map(lambda mutant: try_out(mutant, copies), wanted))
    survived = sum(result["outcome"] == "SURVIVED" for result in results)
    if arguments.out:
        report |= {"survived": survived, "mutants": results}
        write_text(arguments.out, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"{len(results)} mutants, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    command_line.run(main)
