"""Questions that several processes may answer together, for generate.py and evaluate.py: what they share."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from command_line import Refused, expect_file, expect_numbers, option
from sampler_options import sampler_options

import minifocus
from minifocus.answer_file import AnswerFile
from minifocus.batch_inference import Lines, answer_all
from minifocus.distributed.processes import Process, local_device
from minifocus.inputs.questions import Question, read_questions
from minifocus.training.model_digest import digest_of_model

LISTED = 3  # of the questions that could not be asked, so many are named at the end


def answer_together(
    process: Process,
    questions: Iterable[Question],
    count: int,
    batch: int,
    load: Callable[[], minifocus.Llava],
    out: Path | None,
    identity: dict[str, Any],
    options: Callable[[minifocus.Llava], dict[str, Any]],
    skip_unusable: bool = False,
) -> tuple[Lines, int, float]:
    """Have all processes answer `count` questions, into the file `out` if there is one, where some may be answered already.

    The model is loaded if there is anything to ask. Returns the lines in order, which the first process alone has, how many
    questions were asked, and the seconds of the process that took longest.
    """
    file = None if out is None else AnswerFile(out, count, process)
    lines: dict[int, dict[str, Any]] = {}
    with nullcontext() if file is None else file.written_by(identity):
        numbers = list(range(count)) if file is None else file.unanswered()
        seconds = 0.0

        def keep(own: list[int], answers: Lines) -> None:
            lines.update(zip(own, answers, strict=True))

        if numbers:
            model = load()
            write = keep if file is None else file.write
            given = options(model)
            seconds = answer_all(model, questions, numbers, write, process, batch, skip_unusable=skip_unusable, **given)
        if file is not None:
            file.finish()
            lines = file.lines
        else:
            lines = {number: line for own in process.gather(lines) for number, line in own.items()}
    return [lines[number] for number in sorted(lines)], len(numbers), max(process.gather(seconds))


def made_with(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What the answers depend on: the model and the file's content, the sampler, and the options of these `names`."""
    given = {name: getattr(arguments, name) for name in ("sampler", "dtype", "template", *names)}
    return {"model": digest_of_model(Path(arguments.model)), **given, "options": sampler_options(arguments)}


def digest(file: str) -> str:
    """Of a file that could be read."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------- generate.py --file


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a file of questions, answered by one process or, under torchrun, by several")
    group.add_argument("--file", help="JSON lines with image, question and id: see minifocus/inputs/questions.py")
    group.add_argument("--out", help="JSON lines, in the same order; a run that was killed goes on")
    group.add_argument("--images", help="the folder that --file names pictures from; default: its own")
    group.add_argument("--images-anywhere", action="store_true", help="take pictures that --file names elsewhere, too")
    group.add_argument("--batch-size", type=int, help="questions at once in each process; default: 8")


def check(arguments: argparse.Namespace) -> None:
    """Check what argparse does not."""
    expect_numbers(arguments, 1, "batch_size")
    if arguments.file is None:
        for name in ("out", "images", "images_anywhere", "batch_size"):
            if getattr(arguments, name) not in (None, False):
                raise Refused(f"{option(name)} is of no use without --file")
        return
    for name in ("image", "prompt", "figure", "json", "tensor_parallel"):
        if getattr(arguments, name) not in (None, False):
            raise Refused(f"{option(name)} is for a question of the command line: not to be combined with --file")
    if not arguments.out:
        raise Refused("--out: expected the name of a file for the answers, beside --file")
    if Path(arguments.out).resolve() == Path(arguments.file).resolve():
        raise Refused("--out: expected another file than --file")
    expect_file(arguments.out, "out")


def run(
    process: Process,
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], minifocus.Llava],
    given: dict[str, Any],
) -> str | None:
    """Answer --file into --out. `given`: the options of generation, which are part of what the answers depend on.

    Returns what is wrong with the questions that could not be asked, when all others are answered; None if nothing is.
    """
    questions = read_questions(arguments.file, arguments.images, images_anywhere=arguments.images_anywhere)
    identity = {"file": digest(arguments.file), **made_with(arguments, given)}
    arguments.device = local_device(arguments.device)
    lines, asked, seconds = answer_together(
        process,
        questions,
        len(questions),
        arguments.batch_size or 8,
        lambda: load(arguments),
        Path(arguments.out),
        identity,
        lambda model: given,
        skip_unusable=True,
    )
    if process.rank:
        return None
    before = f" ({len(lines) - asked} of them before)" if asked < len(lines) else ""
    errors = [line["error"] for line in lines if "error" in line]
    answered = f"{len(lines) - len(errors)} of {len(lines)} questions answered{before}"
    print(f"{answered}, in {seconds:.1f} s; see {arguments.out}")
    if not errors:
        return None
    more = f" (and {len(errors) - LISTED} more)" if len(errors) > LISTED else ""
    return f"{len(errors)} of {len(lines)} questions could not be asked: {'; '.join(errors[:LISTED])}{more}"
