"""Does FocusLLaVA answer as well as the model that reads everything? Trained arms, equal steps, several seeds.

python benchmarks/arms.py                  # from the stages that `make weights` left in runs/tiny

Every arm starts from the same model, takes the same number of steps on the same scenes in the same order, and is asked
the same unseen questions about dense scenes:

    control   all visual tokens
    focus     both samplers
    single    both samplers from the start of instruction tuning, as in the paper (one stage, of as many steps as the two)

An arm that is there already is not trained again. Results go to benchmarks/results/arms.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import environment

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = {"control": "none", "focus": "focus", "single": "focus"}


def run(command: list[str]) -> str:
    """The last line that a command printed."""
    print("$", " ".join(["python", *command]), flush=True)
    shared = os.environ | ({"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {})
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=shared, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: it ended with {done.returncode}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def train(arm: str, seed: int, runs: Path, steps: int, earlier: int, processes: int) -> Path:
    """Train an arm unless it is there; returns its model's folder."""
    out = runs / "arms" / f"{arm}-{seed}"
    start, count = ("warmup", earlier + steps) if arm == "single" else ("full", steps)
    if not (out / "model" / "model.safetensors").exists():
        shared = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        run(
            [
                *(shared if processes > 1 else []),
                *("examples/train.py", "--model", f"{runs / start}/model", "--out", str(out), "--seed", str(seed)),
                *("--sampler", SAMPLERS[arm], "--steps", str(count), "--batch", "12", "--micro-batch", "6"),
                *("--first-scene", str(30_000_000 + 1_000_000 * seed)),
            ]
        )
    return out / "model"


def ask(model: Path, sampler: str, count: int) -> dict[str, Any]:
    """Its answers to unseen questions about dense scenes, from its folder if they were asked before."""
    file = model.parent / f"answers-{sampler}-{count}.json"
    if not file.exists():
        command = ["examples/evaluate.py", "--model", str(model), "--sampler", sampler, "--dense", "--json"]
        file.write_text(run([*command, "--count", str(count)]) + "\n", encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/tiny")
    parser.add_argument("--arms", default="control,focus,single", help="with commas between")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4000, help="questions")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/arms.json", help="file to write")
    arguments = parser.parse_args()
    runs = arguments.runs.resolve()
    lines = [json.loads(line) for line in (runs / "full/log.jsonl").read_text(encoding="utf-8").splitlines()]
    earlier = lines[-1]["step"]
    arms: dict[str, Any] = {}
    for arm in arguments.arms.split(","):
        found = []
        for seed in range(1, arguments.seeds + 1):
            model = train(arm, seed, runs, arguments.steps, earlier, arguments.processes)
            found.append({"seed": seed, **ask(model, SAMPLERS[arm], arguments.count)})
            if arm == "focus":
                found[-1]["where"] = json.loads(run(["benchmarks/where.py", "--model", str(model), "--line"]))
        accuracies = [one["accuracy"] for one in found]
        arms[arm] = {
            "steps": arguments.steps + (earlier if arm == "single" else 0),
            "accuracy": statistics.mean(accuracies),
            "spread": max(accuracies) - min(accuracies),
            "families": {f: statistics.mean(one["families"][f] for one in found) for f in found[0]["families"]},
            "equivalent": statistics.mean(one["tokens"]["equivalent"] for one in found),
            "seeds": found,
        }
        print(
            f"{arm}: {arms[arm]['accuracy']:.2%}, spread {arms[arm]['spread']:.2%}, {arms[arm]['equivalent']:.1%} tokens"
        )
    record = {**environment(Path(__file__), "torch", "numpy"), "earlier_steps": earlier, "arms": arms}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
