"""What a selector learns, and what it takes: the balance loss, small steps, Eq. 2's factor.

python benchmarks/selector.py              # from the stages that `make weights` left in runs/tiny

A selector that starts from nothing is trained beside a frozen model that reads all tokens, under different settings, and
then asked what scale it gives to regions with text, with other things, and with nothing. To
benchmarks/results/selector.json.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import ROOT, environment, last_line

SETTINGS = {
    "as the weights here": [],
    "no balance loss": ["--alpha", "0"],
    "balance loss / 10": ["--alpha", "0.01"],
    "balance loss x 5": ["--alpha", "0.5"],
    "weights' steps x 100": ["--lr-selector", "1e-3"],
    "Eq. 2 straight-through": ["--straight-through"],
    "no lean to 1x1 at first": ["--selector-bias", "0"],
}


def scales_after(number: int, runs: Path, steps: int, count: int) -> dict[str, Any]:
    """What benchmarks/where.py says of a selector trained with a setting."""
    out = runs / "selector" / str(number)
    last_line(
        [
            *("examples/train.py", "--model", f"{runs}/full/model", "--out", str(out), "--sampler", "vision"),
            *("--fresh", "selector", "--freeze", "llm,projector", "--steps", str(steps)),
            *("--batch", "6", "--micro-batch", "6", "--first-scene", "40000000", *list(SETTINGS.values())[number]),
        ],
        threads=1,
    )
    look = ["benchmarks/where.py", "--model", f"{out}/model", "--sampler", "vision", "--line", "--count", str(count)]
    found: dict[str, Any] = json.loads(last_line(look, threads=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--count", type=int, default=200, help="scenes to look at")
    parser.add_argument("--jobs", type=int, default=2, help="settings at a time, each by one thread")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/selector.json", help="file to write")
    arguments = parser.parse_args()
    record = environment(Path(__file__), "torch", "numpy")
    runs = arguments.runs.resolve()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [
            pool.submit(scales_after, number, runs, arguments.steps, arguments.count) for number in range(len(SETTINGS))
        ]
        found = [one.result() for one in waiting]
    results = {
        name: {"options": options, "scales": one["scales"], "tokens": one["tokens_kept"]}
        for (name, options), one in zip(SETTINGS.items(), found, strict=True)
    }
    record |= {"steps": arguments.steps, "regions": found[0]["regions"], "settings": results}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
