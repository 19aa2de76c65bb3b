"""A decoder that processes share, and training in shares: speed, memory and what is sent, beside one process, on a CPU.

python -m experiments.many_devices --out experiments/results/many-devices
python -m experiments.many_devices --quick          # a small model, 1 and 2 processes, one round: to try the program

Random weights, 153 M parameters, in float32; processes of one machine, by gloo, that share its cores: each of n has 1 / n of the
threads that torch would use, and at least one. So nothing can become faster: what is measured is what sharing costs, and what it
saves of memory.

    plain     minifocus.load, and examples/train.py without --shard, in one process
    1, 2, 4   minifocus.distributed.tensor_parallel.load, and examples/train.py --shard, in so many

Answers: in a round each side reads a prompt and writes so many tokens, one side after the other; all sides live through all
rounds. A round in which `plain` had too little of the processors is run again (clocks.py); of others that cannot be told, as
their processes wait for each other. Training: each run of a round is a fresh one, ended after some steps. Ratios to `plain` are
medians over rounds. What is sent is counted apart, on this model and on a smaller one, and compared with what shapes say
(communication.py). Exit status: 0 measured, 1 a side failed, or gave other tokens than `plain` or sent other amounts than
computed; 2 an argument, a file or the machine is in the way.
"""

from __future__ import annotations

from examples import command_line

if __name__ in ("__main__", "__mp_main__"):
    command_line.begin()

import argparse
import json
import math
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.command_line import Failed, Refused, expect, expect_file, expect_numbers, write_text
from minifocus.loading.weights import read_headers

from ..record import ROOT, environment
from ..timing import interleaved
from ..true_size.folder import made_folder
from ..true_size.models import QUICK, Model
from ..true_size.question import STATUS
from . import report
from .group import Group, threads_of
from .sides import Answering, Counting
from .training import BATCH, tokens_of_step, train, write_data, write_picture

PLAIN = "plain"
IMAGE = ROOT / "examples/cards.png"


def model_of(name: str, width: int, channels: int, layers: int, heads: int) -> Model:
    """A decoder of these sizes with four key heads, and a small tower."""
    sizes = {"hidden_size": width, "intermediate_size": channels, "num_hidden_layers": layers}
    return replace(QUICK, name=name, text={**QUICK.text, **sizes, "num_attention_heads": heads})


LARGE, SMALL = model_of("large", 768, 3072, 12, 12), model_of("small", 128, 256, 4, 8)


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--processes", help="of the sides beside plain, with commas between (1,2,4)")
    parser.add_argument("--rounds", type=int, help="of answers (5)")
    parser.add_argument("--runs-of-training", type=int, help="of each side (2)")
    parser.add_argument("--steps", type=int, help="of a run of training, the first of which is not counted (4)")
    parser.add_argument("--new-tokens", type=int, help="of an answer (64)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/many-devices", help="where the folders lie meanwhile")
    parser.add_argument("--quick", action="store_true", help="the small model, 1 and 2 processes, one round of each")
    parser.add_argument("--out", type=Path, help="folder for results.json and README.md")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "rounds runs_of_training", 1e4)
    expect_numbers(arguments, 2, "steps new_tokens", 1e4)
    quick = {"processes": "1,2", "rounds": 1, "runs_of_training": 1, "steps": 2, "new_tokens": 8}
    full = {"processes": "1,2,4", "rounds": 5, "runs_of_training": 2, "steps": 4, "new_tokens": 64}
    for name, value in (quick if arguments.quick else full).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    words = arguments.processes.split(",")
    expect(all(word in ("1", "2", "4") for word in words), arguments, "processes", "some of 1,2,4, with commas between")
    arguments.processes = sorted({int(word) for word in words})
    for name in ("results.json", "README.md") if arguments.out is not None else ():
        expect_file(arguments.out / name, "out")
    if not STATUS.exists():
        raise Refused("memory is measured by Linux's /proc/self/status, which is not there")
    return arguments


def measure_answers(folder: Path, picture: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each side: seconds of prompts and of tokens, ratios of their rates to plain's, and memory."""
    sides = {PLAIN: 1, **{str(count): count for count in arguments.processes}}
    groups = {
        name: Group(f"answers, {name}", count, Answering, folder, name != PLAIN, picture, arguments.new_tokens)
        for name, count in sides.items()
    }
    for group in groups.values():
        group.ask("ask")  # the first reads the weights
    rounds = interleaved(
        {name: lambda _, group=group: group.ask("ask") for name, group in groups.items()},
        lambda answers: [answers[0]["spent"]] if len(answers) == 1 else [],
        arguments.rounds,
        title="answers, round",
    )
    found: dict[str, Any] = {"watched": rounds.note(), "sides": {}}
    told = rounds.results[PLAIN][0][0]["tokens"]
    for name, group in groups.items():
        answers = rounds.results[name]
        if any(own["tokens"] != told for answer in answers for own in answer):
            raise Failed(f"answers, {name}: gave other tokens than {PLAIN}")
        seconds = {part: [max(own[part] for own in answer) for answer in answers] for part in ("prefill", "decode")}
        memory = group.ask("memory")
        found["sides"][name] = {
            "processes": sides[name],
            "threads": threads_of(sides[name]),
            "prompt": answers[0][0]["prompt"],
            "seconds": seconds,
            "memory": {key: max(own[key] for own in memory) for key in memory[0]},
        }
    for group in groups.values():
        group.close()
    return found


def measure_training(folder: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each side: seconds of a step in each run, and memory."""
    sides: dict[str, int | None] = {PLAIN: None, **{str(count): count for count in arguments.processes}}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(arguments.runs_of_training):
        print(f"training, run {number + 1} of {arguments.runs_of_training}", file=sys.stderr, flush=True)
        for name, count in sides.items():
            runs[name].append(train(folder, data, count, arguments.steps))
    found = {
        name: {
            "processes": sides[name] or 1,
            "threads": threads_of(sides[name] or 1),
            "step": [run["step"] for run in own],
            "memory": {"peak": max(run["peak"] for run in own)},
        }
        for name, own in runs.items()
    }
    return {"examples": BATCH, "tokens": tokens_of_step(folder, data), "sides": found}


def count_sent(folder: Path, picture: Path, data: Path, processes: int) -> dict[str, Any]:
    """Payloads, computed and counted, of which all processes have counted the same. Raises Failed where they differ."""
    group = Group(f"counting, {processes}", processes, Counting, folder, picture, data)
    every = [*group.ask("answers"), *({"micro-batch": one} for one in group.ask("micro_batch"))]
    group.close()
    for own in every:
        for what, payload in own.items():
            if payload["computed"] != payload["counted"]:
                raise Failed(f"counting, {processes}: {what}: computed {payload['computed']}, got {payload['counted']}")
    return {**every[0], **every[-1]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    record = environment(Path(__file__).parent, "torch", "safetensors")
    model = SMALL if arguments.quick else LARGE
    counted: list[dict[str, Any]] = []
    arguments.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.runs) as name:
        own = Path(name).resolve()
        picture = write_picture(own / "square.png", IMAGE, model.vision["image_size"])
        data = write_data(own, picture)
        with made_folder(model, own / model.name, keep=False) as folder:
            parameters = {
                part: sum(math.prod(one.shape) for name, one in read_headers(folder).items() if name.startswith(prefix))
                for part, prefix in (("all", ""), ("decoder", "language_model."))
            }
            answers = measure_answers(folder, picture, arguments)
            training = measure_training(folder, data, arguments)
            counted += counts(folder, model, picture, data, arguments)
        if not arguments.quick:
            with made_folder(SMALL, own / SMALL.name, keep=False) as folder:
                counted += counts(folder, SMALL, picture, data, arguments)
    about = {key: model.text[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    about |= {"parameters": parameters, "num_key_value_heads": model.text["num_key_value_heads"]}
    return record | {
        "model": about,
        "new_tokens": arguments.new_tokens,
        "answers": answers,
        "training": training,
        "sent": counted,
    }


def counts(
    folder: Path, model: Model, picture: Path, data: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """What groups of more than one process send, with this model."""
    found = []
    for processes in arguments.processes:
        if processes > 1:
            print(f"counting, {model.name}, {processes} processes", file=sys.stderr, flush=True)
            about = {"width": model.text["hidden_size"], "layers": model.text["num_hidden_layers"]}
            found.append({**about, "processes": processes, "what": count_sent(folder, picture, data, processes)})
    return found


@command_line.guarded
def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the folder goes
    arguments = parse_arguments()
    record = measure(arguments)
    print(report.tables(record))
    if arguments.out is not None:
        write_text(arguments.out / "results.json", json.dumps(record, indent=1) + "\n")
        write_text(arguments.out / "README.md", report.page(record))


if __name__ == "__main__":
    command_line.run(main)
