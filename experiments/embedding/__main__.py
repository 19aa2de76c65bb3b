"""The C++ runtime beside Python's minifocus and transformers: the same answers, and what it takes to give them.

python -m experiments.embedding --out experiments/results/embedding.json
python -m experiments.embedding --quick        # few questions and one round, to try the program

weights/tiny is exported as examples/export.py does it, and csrc/runtime is built as docs/embedding.md does. What is measured:

same        of the test split's questions, every third about a picture squeezed into an odd shape, how many get the token ids
            and the token counts that Python gives, for every sampler
start       a whole process: start, load weights/tiny, answer one question. Seconds, and the most memory (VmHWM)
decode      seconds per token of the answers to the same questions, one process each that lives through all rounds
disk        bytes of all files needed: the package or the model; the libraries or the Python packages

One thread each, as the model is small. Figures are medians over interleaved rounds, ratios medians of each round's ratio. Exit
status: 0 measured, 1 an answer differs or a process failed, 2 usage.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import Any

import torch
from PIL import Image

import minifocus
from examples.command_line import Failed, expect_file, expect_numbers, write_text
from minifocus import cards
from minifocus.export.package import export

from ..clocks import Spent, read
from ..end_to_end import OURS_COLD, THEIRS_COLD
from ..record import ROOT, environment
from ..timing import columns, interleaved, ratio
from .binding import Model, png

TINY, PICTURE, QUESTION = ROOT / "weights/tiny", ROOT / "examples/cards.png", "What number is on the red card?"
SAMPLERS = ("none", "text", "vision", "focus")
BARS = {"start": 0.25, "memory": 0.6, "decode": 0.35}  # ratios to Python's minifocus: at most
PYTHON = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "sentencepiece", "jinja2", "tqdm")
PEAK = """
import os, sys
nowhere = os.open(os.devnull, os.O_RDWR)
moves = [(os.POSIX_SPAWN_DUP2, nowhere, 1), (os.POSIX_SPAWN_DUP2, nowhere, 2)]
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=moves)
print(os.wait4(process, 0)[2].ru_maxrss)
"""
ODD = ((37, 410), (611, 90), (113, 112), (1, 300))


def build(folder: Path) -> None:
    for command in (
        ["cmake", "-G", "Ninja", "-S", "csrc/runtime", "-B", str(folder), f"-DTORCH={Path(torch.__file__).parent}"],
        ["cmake", "--build", str(folder)],
    ):
        if command_line.call(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise Failed(f"{' '.join(command)} failed")


def questions(count: int) -> list[tuple[Image.Image, str]]:
    asked = []
    for number, (image, question, _, _) in enumerate(cards.questions("test", count, 800_000)):
        asked.append((image.resize(ODD[number // 3 % 4]) if number % 3 == 0 else image, question))
    return asked


def same_answers(embedded: Model, asked: list[tuple[Image.Image, str]]) -> dict[str, Any]:
    """By sampler: how many questions get Python's token ids and counts."""
    found: dict[str, Any] = {"count": len(asked)}
    for sampler in SAMPLERS:
        model = minifocus.load(TINY, sampler, dtype="float32")
        found[sampler] = 0
        for image, question in asked:
            own, theirs = embedded.ask(png(image), question, sampler=sampler), model.generate(image, question)
            counts = (theirs.tokens.full, theirs.tokens.after_vision, theirs.tokens.after_text)
            found[sampler] += (own.token_ids, own.counts) == (theirs.token_ids, counts)
    return found


def start(commands: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    answers: dict[str, str] = {}

    def run(name: str) -> Spent:
        begun = read(children=True)
        done = command_line.call(commands[name], cwd=ROOT, stdout=PIPE, stderr=PIPE, env=one_thread())
        spent = Spent.since(begun)
        if done.returncode:
            raise Failed(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
        answers[name] = done.stdout.strip()
        return spent

    timed = interleaved(
        {name: lambda _, name=name: run(name) for name in commands}, lambda one: [one], rounds, 1, "start"
    )
    walls = {name: [one.wall for one in own] for name, own in timed.results.items()}
    peaks = {name: [peak(command) for _ in range(3)] for name, command in commands.items()}
    return {
        name: {
            "seconds": median(walls[name]),
            "ratio_to_python": ratio(walls[name], walls["python"]),
            "memory": median(peaks[name]),
            "memory_ratio_to_python": median(peaks[name]) / median(peaks["python"]),
            "answer": answers[name],
            **columns(own),
        }
        for name, own in timed.results.items()
    } | {"rounds": timed.note()}


def peak(command: list[str]) -> int:
    """The most memory that a process had. A process that is started counts its parent's too, so that this one's is small."""
    done = command_line.call([sys.executable, "-S", "-c", PEAK, *command], cwd=ROOT, stdout=PIPE, env=one_thread())
    return int(done.stdout) * 1024


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def decode(embedded: Model, asked: list[tuple[Image.Image, str]], rounds: int) -> dict[str, Any]:
    """Seconds per token that was decoded, all questions of a round together."""
    model = minifocus.load(TINY, "focus", dtype="float32")
    content = [(png(image), question) for image, question in asked]
    torch.set_num_threads(1)
    embedded.c.minifocus_set_num_threads(1)

    def cpp() -> list[tuple[float, int]]:
        answers = [embedded.ask(*one) for one in content]
        return [(one.seconds[1], len(one.token_ids)) for one in answers]

    def python() -> list[tuple[float, int]]:
        answers = [model.generate(*one) for one in asked]
        return [(one.decode_seconds, len(one.token_ids)) for one in answers]

    def run(side: Any) -> tuple[Spent, float]:
        begun, given = read(), side()
        return Spent.since(begun), sum(one[0] for one in given) / sum(one[1] for one in given)

    sides = {"python": python, "c++": cpp}
    timed = interleaved(
        {name: lambda _, side=side: run(side) for name, side in sides.items()},
        lambda one: [one[0]],
        rounds,
        1,
        "decode",
    )
    tokens = {name: [one[1] for one in own] for name, own in timed.results.items()}
    whole = {name: [one[0].wall for one in own] for name, own in timed.results.items()}
    return {
        name: {
            "seconds_per_token": median(own),
            "ratio_to_python": ratio(own, tokens["python"]),
            "questions_ratio_to_python": ratio(whole[name], whole["python"]),
            "rounds": own,
        }
        for name, own in tokens.items()
    } | {"rounds": timed.note()}


def size_of(*paths: Path) -> int:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def on_disk(package: Path, build_folder: Path) -> dict[str, int]:
    program = build_folder / "answer"
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    libraries = {Path(one) for one in re.findall(r"=> (/\S+)", linked)}
    of_torch = [one for one in libraries if "torch" in one.parts]
    python = size_of(ROOT / "minifocus") + sum(
        size_of(*(Path(str(distribution(name).locate_file(file))) for file in distribution(name).files or ()))
        for name in PYTHON
    )
    return {
        "package": size_of(package),
        "program": size_of(program, build_folder / "libminifocus.so"),
        "libraries_of_torch": size_of(*(one.resolve() for one in of_torch)),
        "other_libraries": size_of(*(one.resolve() for one in libraries if one not in of_torch)),
        "model": size_of(*(file for file in TINY.iterdir() if file.name != "router.safetensors")),
        "python_packages": python,
    }


def judge(report: dict[str, Any]) -> dict[str, Any]:
    reached = {
        "start": report["start"]["c++"]["ratio_to_python"],
        "memory": report["start"]["c++"]["memory_ratio_to_python"],
        "decode": report["decode"]["c++"]["ratio_to_python"],
    }
    bars = {
        name: {"at most": BARS[name], "reached": value, "met": value <= BARS[name]} for name, value in reached.items()
    }
    same = min(report["same"][sampler] for sampler in SAMPLERS)
    return bars | {
        "same": {"at least": report["same"]["count"], "reached": same, "met": same == report["same"]["count"]}
    }


@command_line.guarded
def main() -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--count", type=int, default=500, help="questions that every sampler is compared on")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--build", type=Path, default=ROOT / "build/runtime", help="where csrc/runtime is built")
    parser.add_argument("--package", type=Path, help="of weights/tiny with focus in float32; default: a new one")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="file to write all figures to, as JSON")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "count rounds")
    expect_file(arguments.out, "out")
    count, rounds = (6, 1) if arguments.quick else (arguments.count, arguments.rounds)
    build(arguments.build)
    with tempfile.TemporaryDirectory() as scratch:
        package = arguments.package or Path(scratch) / "package"
        if arguments.package is None:
            export(minifocus.load(TINY, "focus", dtype="float32"), "focus", package, [PICTURE])
        embedded = Model(arguments.build / "libminifocus.so", package)
        asked = questions(count)
        report: dict[str, Any] = environment(Path(__file__).parent, "torch", "transformers") | {
            "same": same_answers(embedded, asked)
        }
        cold = [str(TINY), str(PICTURE), QUESTION, "32"]
        commands = {
            "c++": [str(arguments.build / "answer"), str(package), str(PICTURE), QUESTION],
            "python": [sys.executable, "-c", OURS_COLD, *cold],
            "transformers": [sys.executable, "-c", THEIRS_COLD, *cold],
        }
        report["start"] = start(commands, rounds)
        report["decode"] = decode(embedded, asked[: 6 if arguments.quick else 64], rounds)
        report["disk"] = on_disk(package, arguments.build)
    report["bars"] = judge(report)
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["bars"]["same"]["met"] else 1


if __name__ == "__main__":
    command_line.run(main)
