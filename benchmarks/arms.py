"""Does FocusLLaVA answer as well as the model that reads everything? Trained arms, equal steps, several seeds.

python benchmarks/arms.py                  # from the stages that `make weights` left in runs/tiny

Every arm starts from the same model, takes the same number of steps on the same scenes in the same order, and is asked
the same unseen questions about dense scenes:

    control   all visual tokens
    focus     both samplers
    single    both samplers from the start of instruction tuning, as in the paper (one stage, of as many steps as the two)

Arms are trained side by side, each by one process of one thread; one that is there already is not trained again. The
results so far go to benchmarks/results/arms.json whenever an arm is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from record import environment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "weights"))
from make_tiny import FOCUS  # noqa: E402

SAMPLERS = {"control": ("--sampler", "none"), "focus": FOCUS, "single": FOCUS}


def run(command: list[str], log: Path | None = None) -> str:
    """The last line that a command printed. What it says of its progress goes to `log`, or to the terminal."""
    print("$", " ".join(["python", *command]), flush=True)
    environ = os.environ | ({"OMP_NUM_THREADS": "1"} if log else {})
    with (log or Path(os.devnull)).open("a", encoding="utf-8") as progress:
        stderr = progress if log else None
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    if done.returncode:
        raise SystemExit(f"error: {command[0]} ended with {done.returncode}" + (f", see {log}" if log else ""))
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def once(file: Path, command: list[str], log: Path) -> dict[str, Any]:
    """The JSON object that a command prints as its last line, from `file` if it was run before."""
    if not file.exists():
        file.write_text(run(command, log) + "\n", encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def result_of(arm: str, seed: int, runs: Path, steps: int, earlier: int, count: int) -> dict[str, Any]:
    """Train an arm unless that was done, ask it `count` questions about dense scenes, and look where it looks."""
    out = runs / "arms" / f"{arm}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    start = "warmup" if arm == "single" else "full"
    if not (out / "model/model.safetensors").exists():
        command = [
            *("examples/train.py", "--model", f"{runs / start}/model", "--out", str(out), "--seed", str(seed)),
            *("--steps", str(steps + (earlier if arm == "single" else 0)), "--batch", "12", "--micro-batch", "6"),
            *("--first-scene", str(30_000_000 + 1_000_000 * seed), *SAMPLERS[arm]),
        ]
        run(command, out / "progress.txt")
    model, sampler = str(out / "model"), SAMPLERS[arm][1]
    asked = ["examples/evaluate.py", "--model", model, "--sampler", sampler, "--dense", "--json", "--count", str(count)]
    found = {"seed": seed, **once(out / f"answers-{count}.json", asked, out / "progress.txt")}
    if sampler == "focus":
        found["where"] = once(
            out / "where.json", ["benchmarks/where.py", "--model", model, "--line"], out / "progress.txt"
        )
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's seeds together; `spread` is the range of their accuracies."""
    accuracies = [one["accuracy"] for one in found]
    return {
        "accuracy": statistics.mean(accuracies),
        "spread": max(accuracies) - min(accuracies),
        "families": {f: statistics.mean(one["families"][f] for one in found) for f in found[0]["families"]},
        "equivalent": statistics.mean(one["tokens"]["equivalent"] for one in found),
        "seeds": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/tiny")
    parser.add_argument("--arms", default="control,focus,single", help="with commas between")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4000, help="questions")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/arms.json", help="file to write")
    arguments = parser.parse_args()
    record = environment(Path(__file__), "torch", "numpy")
    runs = arguments.runs.resolve()
    lines = [json.loads(line) for line in (runs / "full/log.jsonl").read_text(encoding="utf-8").splitlines()]
    earlier = lines[-1]["step"]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms.split(",")}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = {
            pool.submit(result_of, arm, seed, runs, arguments.steps, earlier, arguments.count): arm
            for arm in found
            for seed in range(1, arguments.seeds + 1)
        }
        for done in as_completed(waiting):
            arm = waiting[done]
            found[arm] = sorted([*found[arm], done.result()], key=lambda one: one["seed"])
            arms = {
                name: {"steps": arguments.steps + (earlier if name == "single" else 0), **summary(own)}
                for name, own in found.items()
                if own
            }
            print(
                f"{arm}: {arms[arm]['accuracy']:.2%} ± {arms[arm]['spread']:.2%}, {arms[arm]['equivalent']:.1%} tokens"
            )
            result = {**record, "earlier_steps": earlier, "arms": arms}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
