"""The embedded model's accuracy, with and without its samplers, and where they look.

python -m experiments.accuracy --out experiments/results/accuracy.json
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
from pathlib import Path
from typing import Any

from examples.command_line import expect_file, expect_numbers, write_text

from .record import ROOT, environment, last_line


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "weights/tiny")
    parser.add_argument("--count", type=int, default=1000, help="questions about the test split's scenes as they come")
    parser.add_argument("--dense-count", type=int, default=4000, help="questions about dense scenes")
    parser.add_argument("--out", type=Path, required=True, help="file to write all figures to, as JSON")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "count dense_count")
    expect_file(arguments.out, "out")
    record = environment(Path(__file__), "torch", "numpy", "pillow")
    results: dict[str, Any] = {}
    for name, options in (
        ("mixed", ["--count", str(arguments.count)]),
        ("dense", ["--dense", "--count", str(arguments.dense_count)]),
    ):
        ask = ["examples/evaluate.py", "--model", str(arguments.model), "--json", *options]
        results[name] = {sampler: json.loads(last_line([*ask, "--sampler", sampler])) for sampler in ("none", "focus")}
    look = [
        *("-m", "experiments.scales_by_content"),
        "--model",
        str(arguments.model),
        "--line",
        "--count",
        str(max(1, arguments.dense_count // 8)),
    ]
    record |= {"results": results, "where": json.loads(last_line(look))}
    write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)
