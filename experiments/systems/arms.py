"""The trained models that LLaVA-STF's and AVG-LLaVA's tables compare, in miniature.

All begin from the same model of the miniature, which reads everything, and are trained on the same scenes in the same order.
An arm may go on from another, as a system's stages do.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paper.arms import Recipe, once, run

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Arm:
    """
    training  arguments of examples/train.py; none: the model of `start` as it is
    asked     arguments of examples/evaluate.py
    start     the stage of the miniature, "full", or the arm that it goes on from
    steps     as a share of the run's
    """

    training: tuple[str, ...] = ()
    asked: tuple[str, ...] = ("--sampler", "none")
    start: str = "full"
    steps: float = 1.0


def projector(name: str, layers: str, *options: str, start: str = "pooling") -> tuple[str, ...]:
    """Training with another projector. Wide matrices of a large window are slow to orthogonalise: AdamW for all of them."""
    flags = [part for option in options for part in ("--projector-option", option)]
    own = ("--projector", name, "--vision-layers", layers, *flags, "--projector-start", start)
    return ("--sampler", "none", *own)


def stf(*options: str, mbtf: bool = True, start: str = "pooling") -> tuple[str, ...]:
    """Where it begins as average pooling it is without the last GELUs, behind which there are no negative values."""
    layers = "1,2,3,4" if mbtf else "4"
    gelu = () if start == "random" else ("last_gelu=false",)
    return projector("stf", layers, f"mbtf={str(mbtf).lower()}", *gelu, *options, start=start)


POOLED = ("--sampler", "avgpool", "--option", "window=2", "--option", "thumbnail=compress")
CODE, ADAMW = "fusion=concatenation", ("--optimizer", "adamw", "--lr-projector", "5e-4", "--lr-llm", "5e-4")


def aligned(*training: str) -> tuple[str, ...]:
    return ("--stage", "align", *training)


LLAVA_STF: dict[str, Arm] = {
    "control": Arm(("--sampler", "none")),
    "avgpool": Arm(POOLED, POOLED),
    # Table 3, in the public code's form and begun as average pooling
    "mbtf": Arm(stf("window=1", "fusion=average")),
    "stf": Arm(stf(CODE, mbtf=False)),
    "both": Arm(stf(CODE)),
    # Table 5
    "average": Arm(stf("fusion=average")),
    "convolution": Arm(stf("fusion=convolution")),
    # The paper's form from random values, in two stages as it has them
    "fresh-stf-align": Arm(aligned(*stf(mbtf=False, start="random")), steps=0.25),
    "fresh-stf": Arm(("--sampler", "none"), start="fresh-stf-align"),
    "fresh-both-align": Arm(aligned(*stf(start="random")), steps=0.25),
    "fresh-both": Arm(("--sampler", "none"), start="fresh-both-align"),
    # Table 4: from random values, as tokens that are parts of a window's vector are no means of anything
    **{
        name: arm
        for k, e in ((2, 1), (2, 2), (4, 4), (4, 8))
        for name, arm in {
            f"k{k}-e{e}-align": Arm(
                (*aligned(*stf(CODE, f"window={k}", f"tokens={e}", "last_gelu=false", start="random")), *ADAMW[:2]),
                steps=0.25,
            ),
            f"k{k}-e{e}": Arm(("--sampler", "none", *ADAMW), start=f"k{k}-e{e}-align"),
        }.items()
    },
    # TokenPacker, from random values
    "tokenpacker-align": Arm(aligned(*projector("tokenpacker", "2,3,4", "scale=2", start="random")), steps=0.25),
    "tokenpacker": Arm(("--sampler", "none"), start="tokenpacker-align"),
}


def routed(*training: str, start: str = "granularities") -> Arm:
    return Arm(
        ("--stage", "router", "--examples", "304", "--max-turns", "4", *training), ("--sampler", "avg-llava"), start
    )


def forced(granularity: str, start: str = "granularities") -> Arm:
    return Arm((), ("--sampler", "avg-llava", "--option", f"granularity={granularity}"), start)


THREE = ("--option", "granularities=[4,16,64]")
AVG_LLAVA: dict[str, Arm] = {
    "control": Arm(("--sampler", "none")),
    "granularities": Arm(("--stage", "granularities"), ("--sampler", "avg-llava", "--option", "granularity=finest")),
    **{f"forced-{tokens}": forced(str(tokens)) for tokens in (4, 8, 16, 32, 64)},
    "router": routed(),
    # Table 4
    "image": routed("--option", "text=nothing"),
    "three-granularities": Arm(
        ("--stage", "granularities", *THREE), ("--sampler", "avg-llava", "--option", "granularity=finest")
    ),
    "three": routed(*THREE, start="three-granularities"),
    "answers": Arm(
        (
            *("--stage", "instruct", "--sampler", "avg-llava", "--fresh", "router", "--lr-router", "1e-3"),
            *("--freeze", "llm,projector", "--max-turns", "1", "--optimizer", "adamw"),
        ),
        ("--sampler", "avg-llava"),
        "granularities",
    ),
    "no-ranking": routed("--rank-weight", "0", "--choice-weight", "1"),
    "no-choice": routed("--choice-weight", "0"),
    # ours
    "price-0.1": routed("--token-price", "0.1"),
    "price-0.03": routed("--token-price", "0.03"),
    # the sweep of the filtered words
    **{f"words-{k}": routed("--option", f"filtered_text={k}") for k in (4, 8, 16)},
}
SYSTEMS: dict[str, dict[str, Arm]] = {"llava-stf": LLAVA_STF, "avg-llava": AVG_LLAVA}

_locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)
_made: set[Path] = set()


def model_of(arms: dict[str, Arm], name: str, seed: int, recipe: Recipe) -> Path:
    """The folder of an arm's trained model, which is made where it is not there."""
    arm = arms[name]
    start = model_of(arms, arm.start, seed, recipe) if arm.start in arms else recipe.stages[arm.start]
    if not arm.training:
        return start
    out = recipe.runs / f"{name}-{seed}"
    steps = max(1, round(arm.steps * recipe.steps))
    command = [
        *("examples/train.py", "--model", str(start), "--out", str(out), "--seed", str(seed)),
        *("--steps", str(steps), "--batch", str(recipe.batch), "--micro-batch", str(min(recipe.batch, 6))),
        *("--first-scene", str(50_000_000 + 1_000_000 * seed), *arm.training),
    ]
    if arm.training[:2] == (
        "--stage",
        "router",
    ):  # its micro-batches have to divide the examples, about which a model is asked once
        command[command.index("--batch") + 1], command[command.index("--micro-batch") + 1] = "8", "4"
        command += ["--feedback", str(recipe.runs / f"feedback-{arm.start}-{seed}")]
    with _locks[out]:
        if out not in _made:
            run(command, out)  # does nothing where it was run before, and says so where that was another command
            _made.add(out)
    return out / "model"


def answers_of(arms: dict[str, Arm], name: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What examples/evaluate.py says of an arm."""
    command = ["examples/evaluate.py", *arms[name].asked, "--dense", "--json", "--count", str(recipe.count)]
    return once(command, model_of(arms, name, seed, recipe), recipe.runs / f"{name}-{seed}", "answers")


def choices_of(arms: dict[str, Arm], name: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What choices.py says of an arm with a router."""
    command = ["-m", "experiments.systems.choices", "--line", "--count", str(max(2, recipe.count // 5))]
    return once(command, model_of(arms, name, seed, recipe), recipe.runs / f"{name}-{seed}", "choices")
