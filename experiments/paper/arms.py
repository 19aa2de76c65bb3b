"""The trained models that the paper's tables compare, in miniature: what each is, how it is trained, what it is asked.

All arms begin from the same two stages of `make weights`, take the same number of steps on the same scenes in the same
order, and are asked the same unseen questions about dense scenes. An arm and a seed have a folder; what is in it is not
made again, and a run that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

from examples.command_line import Failed, call, write_text

from ..miniature import make as miniature
from ..record import ROOT, commit

SEEDS = (1, 2, 3)


def selector(
    weights: str = miniature.SCALE_WEIGHTS, alpha: str = "0.1", printed: bool = False, cosines: bool = False
) -> tuple[str, ...]:
    """How a selector is trained here. The balance loss weighs the scales as for the embedded model (Eq. 10), and the steps of
    the selector's weights are a third of the paper's: with 1e-5 one seed of two gave up the finest scale before the answers'
    loss had a say (notes.md). Eq. 2's factor acts by its gradient alone: as printed it makes tokens smaller in training than
    they are when it is over. Cosines are a hundredth of the products of features that they stand for, so steps are larger."""
    factor = ("--printed-factor",) if printed else ()
    norm = ("--option", "score_norm=cosine") if cosines else ()
    return (
        "--scale-weights",
        weights,
        "--alpha",
        alpha,
        "--lr-selector",
        "3e-4" if cosines else "3e-6",
        *factor,
        *norm,
    )


def bias_rate(steps: int) -> str:
    """Of a selector's bias: as far in all, whatever the steps, as 650 of 3e-3 (notes.md)."""
    return f"{min(1.95 / steps, 0.01):.1e}"


@dataclass(frozen=True)
class Arm:
    """
    training  arguments of examples/train.py; none: the model of `base` as it is
    asked     arguments of examples/evaluate.py
    start     the stage that training begins from: "full" or "warmup"; from the latter with that stage's steps on top
    """

    asked: tuple[str, ...]
    training: tuple[str, ...] = ()
    start: str = "full"
    base: str = ""


def trained(sampler: str, *options: str, own: tuple[str, ...] = (), start: str = "full") -> Arm:
    """Trained behind a sampler and asked behind the same; `own` are options of the sampler's selector."""
    return Arm(("--sampler", sampler, *options), ("--sampler", sampler, *options, *own), start)


def scale_weights(branches: int) -> str:
    """The embedded model's weights for another number of scales: its own for the coarsest and the finest, and the rest shared
    by those between. They sum to the number of scales, also where there are two."""
    first, *_, last = map(float, miniature.SCALE_WEIGHTS.split(","))
    if branches == 2:
        return f"{2 * first / (first + last)},{2 * last / (first + last)}"
    between = [(branches - first - last) / (branches - 2)] * (branches - 2)
    return ",".join(map(str, [first, *between, last]))


ARMS: dict[str, Arm] = {
    "control": trained("none"),
    "vision": trained("vision", own=selector()),
    "text": trained("text"),
    "focus": trained("focus", own=selector()),
    "printed": trained("focus", own=selector(printed=True)),
    "single": trained("focus", own=selector(printed=True), start="warmup"),
    "cosine": trained("focus", own=selector(cosines=True)),
    "avgpool": trained("avgpool"),
    "random": trained("random", "--option", "ratio=0.39"),
    # Table 3
    "branches-7": trained("vision", own=(*selector(scale_weights(7)), "--branches", "7")),
    # Table 4
    **{
        f"window-{w}": trained("vision", own=(*selector(scale_weights(2 if w < 3 else 3)), "--window", str(w)))
        for w in (1, 2, 8, 12)
    },
    # Table 5
    **{f"alpha-{alpha}": trained("vision", own=selector(alpha=alpha)) for alpha in ("0", "0.01", "0.5")},
    # Table 6
    "direct": Arm(("--sampler", "text", "--gamma", "0.9"), base="control"),
    "fixed": Arm(("--sampler", "text"), ("--sampler", "text", "--layers", "0.25,0.25", "--gamma", "0.85,0.85")),
    # Table 7
    **{
        f"{'unlike' if flip else 'like'}-{share}": trained(
            "similarity", "--option", f"ratio={share / 100}", "--option", f"flip={'true' if flip else 'false'}"
        )
        for share in (80, 60, 40)
        for flip in (False, True)
    },
    # Table 8
    "weights-1-1-1": trained("vision", own=selector("1,1,1")),
    "weights-1.1-1-0.9": trained("vision", own=selector("1.1,1,0.9")),
    "weights-0.9-1-1.1": trained("vision", own=selector("0.9,1,1.1")),
}


@dataclass(frozen=True)
class Recipe:
    """
    runs    folder of the arms
    stages  "full" and "warmup" → the model's folder that arms begin from
    steps   of every arm
    batch   conversations per step
    earlier steps that stage "full" would be, of as many; they come on top where an arm begins before it
    count   questions
    jobs    commands at a time, each by one thread
    """

    runs: Path
    stages: dict[str, Path]
    steps: int
    batch: int
    earlier: int
    count: int
    jobs: int

    def record(self) -> dict[str, Any]:
        """What results have to have in common to be set side by side."""
        stages = {name: miniature.STEPS[name] for name in ("vision", "warmup", "full")}
        return {
            "steps": self.steps,
            "batch": self.batch,
            "questions": self.count,
            "scale_weights": miniature.SCALE_WEIGHTS,
            "stages": stages,
        }


class CommandFailed(Failed):
    """A command of an arm ended with an error; the text says which, and where what it said is."""


_locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)
_made: set[Path] = set()


def model_of(name: str, seed: int, recipe: Recipe) -> Path:
    """The folder of an arm's trained model."""
    arm = ARMS[name]
    if not arm.training:
        return model_of(arm.base, seed, recipe)
    out = recipe.runs / f"{name}-{seed}"
    steps = recipe.steps + (recipe.earlier if arm.start == "warmup" else 0)
    command = [
        *("examples/train.py", "--model", str(recipe.stages[arm.start]), "--out", str(out), "--seed", str(seed)),
        *("--steps", str(steps), "--batch", str(recipe.batch), "--micro-batch", str(min(recipe.batch, 6))),
        *("--first-scene", str(30_000_000 + 1_000_000 * seed), *arm.training),
    ]
    if (recipe.stages[arm.start] / "selector.safetensors").exists():  # with --quick only
        command += ["--fresh", "selector"]
    if "--lr-selector" in arm.training:
        command += ["--lr-selector-bias", bias_rate(recipe.steps)]
    with _locks[out]:
        if out not in _made:
            run(command, out)  # does nothing where it was run before, and says so where that was another command
            _made.add(out)
    return out / "model"


def answers_of(name: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What examples/evaluate.py says of an arm."""
    command = ["examples/evaluate.py", *ARMS[name].asked, "--dense", "--json", "--count", str(recipe.count)]
    return once(command, model_of(name, seed, recipe), recipe.runs / f"{name}-{seed}", "answers")


def scales_of(name: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What scales_by_content says of an arm with a selector."""
    count = str(min(recipe.count // 2, 200))
    command = ["-m", "experiments.scales_by_content", *ARMS[name].asked[:2], "--line", "--count", count]
    return once(command, model_of(name, seed, recipe), recipe.runs / f"{name}-{seed}", "where")


def once(command: list[str], model: Path, out: Path, title: str) -> dict[str, Any]:
    """The JSON object that a command prints as its last line about a model, with the commit that it was printed at; from a
    file if it was run before."""
    file = out / f"{title}.json"
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["command"] == command and "commit" in known:
            return {**known["result"], "commit": known["commit"]}
    found = {"command": command, "commit": commit(), "result": json.loads(run([*command, "--model", str(model)], out))}
    write_text(file, json.dumps(found) + "\n")
    return {**found["result"], "commit": found["commit"]}


def run(command: list[str], out: Path) -> str:
    """The last line that one of the repository's scripts printed, run by one thread; what else it says is kept in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "progress.txt"
    with log.open("a", encoding="utf-8") as progress:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = call([sys.executable, *command], cwd=ROOT, env=environment, stdout=PIPE, stderr=progress)
    if done.returncode:
        last = log.read_text(encoding="utf-8").rstrip().rsplit("\n", 1)[-1]
        raise CommandFailed(f"{command[0]} ended with {done.returncode}; see {log}: {last}")
    return done.stdout.strip().splitlines()[-1]
