"""Make everything in weights/tiny from nothing: ``python -m experiments.miniature.make`` (or ``make weights``).

A list of commands, each of which can be run by itself, goes on from its last checkpoint and does nothing when it is done:

1. ``files``   config.json and a tokenizer, trained on the questions
2. ``vision``  the vision tower's pretraining; it stands in for CLIP's and is frozen from here on
3. ``warmup``  projector and decoder learn to answer, with two aids: stands in for a pretrained language model and an
               aligned projector
4. ``full``    instruction tuning with all visual tokens (examples/train.py)
5. ``focus``   instruction tuning with both samplers (examples/train.py), off now and then, so that the same weights
               answer without them
6. ``router``  AVG-LLaVA's router (examples/train.py), by what these weights answer at each granularity

Checkpoints and logs go to ``runs/tiny``; weights/tiny gets the model, weights/training the logs, curves and a record.
The work is shared by processes of one thread each: one process of several threads is many times slower when something
else runs on the machine, for each of its operators waits for the slowest thread.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import os
import shutil
import sys
import time
from pathlib import Path

from examples.command_line import Failed, expect_numbers, write_text
from minifocus.files.locks import hold
from minifocus.training.plot_log import draw_curve

from ..record import ROOT, environment

BATCH = 12  # conversations per step
STEPS = {"vision": 4000, "warmup": 1800, "full": 600, "focus": 650, "router": 400}
SCENES = 14_000  # of the vision tower's pretraining
# Eq. 10's weights, coarse to fine: most regions have text or nothing that is asked about, so the scale between may be used
# less than even use would have it.
SCALE_WEIGHTS = "0.6,1.6,0.8"
SELECTOR_RATES = ("--lr-selector", "1e-5", "--lr-selector-bias", "3e-3")
TOKEN_PRICE = "0.05"  # of the router; without one it chooses the finest granularity for nearly every question
FEEDBACK = 600  # scenes that the router learns from


def commands(runs: Path, steps: dict[str, int], scenes: int, validate: int) -> dict[str, list[str]]:
    """Stage → script and arguments."""
    train = ["examples/train.py", "--batch", str(BATCH), "--micro-batch", "6", "--validate", str(validate)]
    return {
        "files": ["-m", "experiments.miniature.files", f"{runs}/files"],
        "vision": [
            *("-m", "experiments.miniature.vision", "--model", f"{runs}/files", "--out", f"{runs}/vision"),
            *("--steps", str(steps["vision"]), "--scenes", str(scenes)),
        ],
        "warmup": [
            *(
                "-m",
                "experiments.miniature.warmup",
                "--model",
                f"{runs}/files",
                "--tower",
                f"{runs}/vision/tower.safetensors",
            ),
            *("--out", f"{runs}/warmup", "--steps", str(steps["warmup"])),
        ],
        "full": [
            *(*train, "--model", f"{runs}/warmup/model", "--out", f"{runs}/full", "--steps", str(steps["full"])),
            *("--sampler", "none", "--first-scene", "10000000", "--final-lr", "0.3"),
            *("--lr-llm", "1.5e-3", "--lr-projector", "1.5e-3"),
        ],
        "focus": [
            *(*train, "--model", f"{runs}/full/model", "--out", f"{runs}/focus", "--steps", str(steps["focus"])),
            *("--sampler", "focus", "--scale-weights", SCALE_WEIGHTS, *SELECTOR_RATES),
            *("--sampler-dropout", "0.25", "--first-scene", "20000000"),
        ],
        "router": [
            *("examples/train.py", "--stage", "router", "--model", f"{runs}/focus/model", "--out", f"{runs}/router"),
            *("--batch", str(BATCH), "--micro-batch", "6", "--steps", str(steps["router"]), "--max-turns", "4"),
            *("--examples", str(min(FEEDBACK, scenes // BATCH * BATCH)), "--token-price", TOKEN_PRICE),
            *("--first-scene", "40000000"),
        ],
    }


def run(stage: str, command: list[str], processes: int) -> float:
    """One stage; returns its seconds."""
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    whole = [sys.executable, *(shared if processes > 1 and stage != "files" else []), *command]
    print("$", " ".join(["python", *whole[1:]]), flush=True)
    begun = time.perf_counter()
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    done = command_line.call(whole, cwd=ROOT, env=environment)
    if done.returncode:
        raise Failed(f"stage {stage!r} ended with {done.returncode}; started again, it goes on from its checkpoint")
    return time.perf_counter() - begun


def run_stages(
    runs: Path,
    steps: dict[str, int],
    processes: int = 2,
    scenes: int = SCENES,
    validate: int = 400,
    until: str = "router",
) -> dict[str, float]:
    """All stages up to `until`, each from where an earlier run left it; returns the seconds of all runs they took.

    Raises InputError where another process makes them, and Failed where a stage fails.
    """
    times = runs / "seconds.json"
    with hold(runs):
        seconds: dict[str, float] = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
        for stage, command in commands(runs, steps, scenes, validate).items():
            seconds[stage] = round(seconds.get(stage, 0) + run(stage, command, processes), 1)
            write_text(times, json.dumps(seconds))
            if stage == until:
                break
    return seconds


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "weights/tiny", help="model folder to write")
    parser.add_argument(
        "--record", type=Path, default=ROOT / "weights/training", help="folder for logs, curves and record"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/tiny", help="checkpoints, to go on from")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two steps of each stage, to try the script out")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "processes", 1000)

    record = environment(Path(__file__), "torch", "numpy", "sentencepiece")
    runs = arguments.runs.resolve()
    steps = dict.fromkeys(STEPS, 2) if arguments.quick else STEPS
    with hold(arguments.output), hold(arguments.record):
        seconds = run_stages(runs, steps, arguments.processes, *((16, 8) if arguments.quick else (SCENES, 400)))
        for file in (*(runs / "focus/model").iterdir(), runs / "router/model/router.safetensors"):
            shutil.copyfile(file, arguments.output / file.name)
        for stage in STEPS:
            shutil.copyfile(runs / stage / "log.jsonl", arguments.record / f"{stage}.jsonl")
            draw_curve(arguments.record / f"{stage}.jsonl", arguments.record / f"{stage}.png")
        record |= {"steps": steps, "seconds": seconds}
        write_text(arguments.record / "record.json", json.dumps(record, indent=2) + "\n")
    print(f"{sum(seconds.values()) / 60:.1f} minutes; the model is in {arguments.output}")


if __name__ == "__main__":
    command_line.run(main)
