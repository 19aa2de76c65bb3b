"""The embedded model's accuracy, with and without its samplers, and where they look.

python benchmarks/accuracy.py --out benchmarks/results/accuracy.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import ROOT, environment, last_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "weights/tiny")
    parser.add_argument("--count", type=int, default=1000, help="questions about the test split's scenes as they come")
    parser.add_argument("--dense-count", type=int, default=4000, help="questions about dense scenes")
    parser.add_argument("--out", type=Path, required=True, help="file to write all figures to, as JSON")
    arguments = parser.parse_args()
    record = environment(Path(__file__), "torch", "numpy", "pillow")
    results: dict[str, Any] = {}
    for name, options in (
        ("mixed", ["--count", str(arguments.count)]),
        ("dense", ["--dense", "--count", str(arguments.dense_count)]),
    ):
        ask = ["examples/evaluate.py", "--model", str(arguments.model), "--json", *options]
        results[name] = {sampler: json.loads(last_line([*ask, "--sampler", sampler])) for sampler in ("none", "focus")}
    look = [
        "benchmarks/where.py",
        "--model",
        str(arguments.model),
        "--line",
        "--count",
        str(arguments.dense_count // 8),
    ]
    record |= {"results": results, "where": json.loads(last_line(look))}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
