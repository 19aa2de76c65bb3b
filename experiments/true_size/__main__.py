"""A model of 7 or 8 billion parameters on this machine: what loading and answering take in time and in memory.

python -m experiments.true_size --out runs/vicuna      # random weights in the shapes of llava-v1.6-vicuna-7b, 14 GB
python -m experiments.true_size --model llama3-llava-next-8b --dtype int8
python -m experiments.true_size --folder DIR           # a checkpoint of yours
python -m experiments.true_size --quick                # 0.4 GB and one round, to try the program

The folder is written below --runs, after a look at how much room the disk has, and deleted at the end, also after an error
or Ctrl-C; --keep leaves it. Then every sampler is asked about a picture of every size. Each question has a process of its own
(question.py), so that its peak of memory is its own, and in a round each is asked once, so that a change in the machine's
speed falls on all. A run that was stopped goes on with the questions that are left, when it is started again with the same
arguments at the same commit.

With --out, a folder, the figures go to its results.json and the tables to its README.md. Random weights say nothing about
answers, and the share of the tokens that samplers keep is not that of a trained model. Exit status: 0 measured, 1 a question
failed, 2 an argument, a file or the machine is in the way.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch

import minifocus
from examples.command_line import Failed, Refused, expect, expect_file, expect_numbers, option, write_text
from minifocus.files.locks import hold
from minifocus.files.reading import FOLDER, kind
from minifocus.inputs.open_image import open_image
from minifocus.loading.config import load_config
from minifocus.loading.weights import read_headers

from ..clocks import Spent
from ..record import ROOT, device_name, environment
from .folder import TINY, made_folder
from .models import MODELS, QUICK, Model
from .question import STATUS, add_arguments
from .report import page, tables

SAMPLERS = ("none", "text", "vision", "focus")
HEEDED = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_")  # variables of the environment that change what is measured
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # names that other programs have for dtypes


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), help="whose shapes the folder has; default: the first")
    parser.add_argument("--layers", type=int, help="of its decoder, at most; default: all")
    parser.add_argument("--folder", type=Path, help="a model's folder that is there, instead")
    add_arguments(parser)
    parser.add_argument("--samplers", help=f"with commas between, beside none; default: {','.join(SAMPLERS)}")
    parser.add_argument("--sides", help="of the pictures, in pixels; default: one tile's and two tiles'")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/true-size", help="where weights and unfinished runs lie"
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder that was made")
    parser.add_argument("--quick", action="store_true", help="a small model, two samplers, one picture and one round")
    parser.add_argument("--out", type=Path, help="folder for results.json and README.md")
    arguments = parser.parse_args()
    for name in ("model", "layers", "quick", "keep"):
        if arguments.folder is not None and getattr(arguments, name):
            parser.error(f"{option(name)}: is of a folder that is made, not to be combined with --folder")
    if arguments.quick and arguments.model:
        parser.error("--quick: has a model of its own, not to be combined with --model")
    expect_numbers(arguments, 1, "layers new_tokens rounds", 1e5)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.dtype = SHORT.get(arguments.dtype, arguments.dtype)
    known = minifocus.methods.names()
    given = (arguments.samplers or ("focus" if arguments.quick else ",".join(SAMPLERS))).split(",")
    if unknown := set(given) - set(known):
        parser.error(f"--samplers: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    arguments.samplers = ["none", *dict.fromkeys(name for name in given if name != "none")]
    if arguments.sides is not None:
        sides = arguments.sides.split(",")
        fits = all(side.isdecimal() and 0 < int(side) <= 1e5 for side in sides)
        expect(fits, arguments, "sides", "numbers of pixels with commas between")
        arguments.sides = [int(side) for side in sides]
    for name in ("results.json", "README.md") if arguments.out is not None else ():
        expect_file(arguments.out / name, "out")
    if not STATUS.exists():
        raise Refused("memory is measured by Linux's /proc/self/status, which is not there")
    # What load would refuse, it refuses now, and not after 14 GB were written.
    minifocus.load(TINY, "none", arguments.device, arguments.dtype)
    open_image(arguments.image)
    return arguments


def model_of(arguments: argparse.Namespace) -> Model:
    return (QUICK if arguments.quick else MODELS[arguments.model or next(iter(MODELS))]).with_layers(arguments.layers)


@contextlib.contextmanager
def model_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder that is given, or one that is made for as long as it is used."""
    if arguments.folder is not None:
        yield arguments.folder.resolve()
        return
    model = model_of(arguments)
    with made_folder(model, arguments.runs.resolve() / model.name, arguments.keep, arguments.device) as folder:
        yield folder


def describe(folder: Path, made: bool) -> dict[str, Any]:
    """What the record says of the model."""
    config, stored = load_config(folder), read_headers(folder)
    return {
        "name": folder.name,
        "random": made,
        "parameters": sum(math.prod(tensor.shape) for tensor in stored.values()),
        "bytes": sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()}),
        "layers": config.text.num_hidden_layers,
        "width": config.text.hidden_size,
        "tile": config.vision.image_size,
    }


def ask(folder: Path, sampler: str, side: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What question.py prints."""
    command = ["-m", "experiments.true_size.question", str(folder), "--sampler", sampler, "--side", str(side)]
    command += ["--device", arguments.device, "--new-tokens", str(arguments.new_tokens)]
    command += ["--image", str(arguments.image.resolve())]
    command += ["--dtype", arguments.dtype] if arguments.dtype is not None else []
    done = command_line.call([sys.executable, *command], cwd=ROOT, stdout=PIPE)
    if done.returncode == command_line.REFUSED:  # of which it has told
        raise SystemExit(done.returncode)
    if done.returncode:
        raise Failed(f"{shlex.join(command[1:5])}: ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Unfinished:
    """The answers so far of a run with these settings, in a file that goes once the run has ended."""

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings, self.answers = file, settings, dict[str, Any]()
        if file.is_file():
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
                same, answers = known["settings"] == settings, dict(known["answers"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Refused(f"{file}: expected an unfinished run: {type(error).__name__}; delete it") from error
            if not same:
                raise Refused(f"{file}: is an unfinished run at another commit or with other arguments: delete it")
            self.answers = answers
            print(f"{file}: goes on after {len(answers)} questions", file=sys.stderr)

    def asked(
        self, folder: Path, sampler: str, side: int, arguments: argparse.Namespace, number: int
    ) -> dict[str, Any]:
        """The answer of a round, from the file if it is there."""
        key = f"{sampler}, {side}, {number}"
        if key not in self.answers:
            self.answers[key] = ask(folder, sampler, side, arguments)
            print(f"{sampler}, {side}²", file=sys.stderr, flush=True)
            write_text(self.file, json.dumps({"settings": self.settings, "answers": self.answers}) + "\n")
        found: dict[str, Any] = self.answers[key]
        return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    record = environment(Path(__file__).parent, "torch", "safetensors", "tokenizers")
    heeded = [f"{name}={shlex.quote(os.environ[name])}" for name in HEEDED if name in os.environ]
    record["command"] = " ".join([*heeded, record["command"]])
    name = arguments.folder.resolve().name if arguments.folder is not None else model_of(arguments).name
    settings = {key: record[key] for key in ("command", "commit", "dirty")}
    with hold(arguments.runs):
        unfinished = Unfinished(arguments.runs / f"unfinished-{name}-{arguments.dtype or 'own'}.json", settings)
        with model_folder(arguments) as folder:
            model = describe(folder, arguments.folder is None)
            tile = model["tile"]
            sides = arguments.sides or ([tile] if arguments.quick else [tile, 2 * tile])
            runs = {
                (side, sampler): partial(unfinished.asked, folder, sampler, side, arguments)
                for side in sides
                for sampler in arguments.samplers
            }
            answers: dict[tuple[int, str], list[dict[str, Any]]] = {name: [] for name in runs}
            for number in range(arguments.rounds):  # interleaved, and not run again: a round takes minutes
                for name, run in runs.items():
                    answers[name].append(run(number))
        unfinished.file.unlink()
    questions = [{"side": side, "sampler": sampler, "rounds": own} for (side, sampler), own in answers.items()]
    asked = {"dtype": arguments.dtype, "device": device_name(arguments.device), "new_tokens": arguments.new_tokens}
    disturbed = sum(any(map(was_disturbed, of_round)) for of_round in zip(*answers.values(), strict=True))
    watched = {"rounds": arguments.rounds, "disturbed": disturbed, "repeated": 0}
    return record | {"model": model, **asked, "questions": questions, "watched": watched}


def was_disturbed(answer: dict[str, Any]) -> bool:
    """Whether other work had the processors while the prompt was read."""
    first = answer["seconds"]["first_token"]
    on_gpu = "first_question" in answer["seconds"]
    threads = 1 if on_gpu else answer["threads"]  # a GPU is waited for by one
    return Spent(first["wall"], first["processor"], threads=threads).disturbed


@command_line.guarded
def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the folder goes
    torch.set_num_threads(1)  # of this process, which only writes: two would wait for each other at every step
    arguments = parse_arguments()
    if arguments.folder is not None and kind(arguments.folder) != FOLDER:
        raise Refused(f"--folder: expected a folder, found {kind(arguments.folder)}")
    record = measure(arguments)
    print(tables(record))
    if arguments.out is not None:
        write_text(arguments.out / "results.json", json.dumps(record, indent=1) + "\n")
        write_text(arguments.out / "README.md", page(record))


if __name__ == "__main__":
    command_line.run(main)
