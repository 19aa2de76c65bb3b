"""Exact-match accuracy on the miniature's unseen questions or on your own, with the visual tokens that it took.

python examples/evaluate.py --sampler focus --count 1000                # or --dense: the scenes where detail matters most
python examples/evaluate.py --model DIR --data questions.json --images DIR
torchrun --nproc-per-node 8 examples/evaluate.py --model DIR --data … --out answers.jsonl --device cuda    # by eight GPUs

An answer is right when it is the expected text, letter by letter, but for white space at either end: "Red" and "red." are
not "red". Each turn of a conversation is asked alone, about all of its pictures. Intervals are Wilson's at 95 %, for
questions drawn independently: several about one picture are less than that, and the true interval is wider.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import batch_questions
import torch
from command_line import Refused, expect_file, expect_numbers
from PIL import Image
from sampler_options import add_sampler_options, sampler_options

import minifocus
from minifocus import cards
from minifocus.cpu_memory import give_back_freed_memory
from minifocus.distributed.processes import Process, joined, local_device
from minifocus.evaluate import Asked, evaluate, longest_answer, summarize
from minifocus.inputs.conversations import asked_alone, read_conversations
from minifocus.inputs.prompt import TEMPLATES
from minifocus.inputs.questions import Question

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "weights/tiny"), help="folder in Hugging Face's layout")
    parser.add_argument("--template", choices=list(TEMPLATES), help="default: the model's")
    add_sampler_options(parser)
    parser.add_argument("--data", help="a file in LLaVA's JSON format, see minifocus/inputs/conversations.py")
    parser.add_argument("--images", help="the folder that --data names pictures from; default: its own")
    parser.add_argument("--images-anywhere", action="store_true", help="take pictures that --data names elsewhere, too")
    parser.add_argument("--split", choices=list(cards.SPLITS), help="of the miniature; default: test")
    parser.add_argument(
        "--dense", action="store_true", help="the miniature's dense scenes only, instead of every fourth"
    )
    parser.add_argument(
        "--count", type=int, help="at most this many questions; default: 1000 drawn ones, all of --data"
    )
    parser.add_argument("--seed", type=int, default=0, help="the split's scene, or --data's record, to begin with")
    parser.add_argument(
        "--max-new-tokens", type=int, help="default: 16, with --data 8 more than the longest expected answer takes"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", help="write each answer: JSON lines; a run that was killed goes on from there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32, bfloat16, float16, int8 or int4; default: the checkpoint's")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def questions_of(arguments: argparse.Namespace) -> tuple[Iterable[Asked], int]:
    """What is asked, and how many questions these are; of a file's, a list."""
    if arguments.data is None:
        count = 1000 if arguments.count is None else arguments.count
        return cards.questions(arguments.split or "test", count, arguments.seed, arguments.dense or None), count
    records = read_conversations(arguments.data, arguments.images, images_anywhere=arguments.images_anywhere)
    supply = (one for conversation in records[arguments.seed :] for one in asked_alone(conversation))
    asked = list(islice(supply, arguments.count))
    if not asked:
        raise minifocus.InputError(f"--seed: {arguments.data} has no record {arguments.seed}")
    return asked, len(asked)


def check(arguments: argparse.Namespace) -> None:
    """Check what argparse does not."""
    expect_numbers(arguments, 1, "count batch max_new_tokens")
    expect_numbers(arguments, 0, "seed")
    expect_file(arguments.out, "out")
    if arguments.data is not None and (arguments.split or arguments.dense):
        raise Refused("--split and --dense are of the miniature: not to be combined with --data")
    if arguments.data is None and (arguments.images is not None or arguments.images_anywhere):
        option = "--images" if arguments.images is not None else "--images-anywhere"
        raise Refused(f"{option} is of no use without --data")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    give_back_freed_memory()
    with joined(torch.device("cpu")) as process:
        arguments.device = local_device(arguments.device)
        result = evaluated(arguments, process)
    if process.rank == 0 and arguments.json:
        print(json.dumps({"sampler": arguments.sampler, **sampler_options(arguments), **result}))
    elif process.rank == 0:
        print_result(arguments.sampler, result)


def evaluated(arguments: argparse.Namespace, process: Process) -> dict[str, Any]:
    """What came of all questions; of several processes, in the first one alone."""
    questions, total = questions_of(arguments)
    options = sampler_options(arguments)

    def load() -> minifocus.Llava:
        return minifocus.load(arguments.model, arguments.sampler, arguments.device, arguments.dtype, **options)

    def of_answer(model: minifocus.Llava) -> dict[str, Any]:
        longest = arguments.max_new_tokens
        if longest is None:
            longest = 16 if arguments.data is None else longest_answer(model, questions)
        return {"template": arguments.template, "max_new_tokens": longest}

    if process.count == 1 and arguments.out is None:
        model = load()
        return evaluate(model, questions, arguments.batch, total, families=cards.FAMILIES, **of_answer(model))
    about = {"data": None if arguments.data is None else batch_questions.digest(arguments.data)}
    identity = {**about, **batch_questions.made_with(arguments, ("split", "dense", "count", "seed", "max_new_tokens"))}
    lines, asked, seconds = batch_questions.answer_together(
        process,
        (as_question(number, *one) for number, one in enumerate(questions)),
        total,
        arguments.batch,
        load,
        None if arguments.out is None else Path(arguments.out),
        identity,
        of_answer,
    )
    if process.rank:
        return {}
    answers = [(line["answer"], line["expected"], line["family"], line["visual_tokens"]) for line in lines]
    return summarize(answers, asked / seconds if asked else None, cards.FAMILIES)


def as_question(number: int, images: Any, text: str, expected: str, family: str | None) -> Question:
    pictures = [images] if isinstance(images, Image.Image) else list(images or [])
    return Question(
        f"question {number + 1}", pictures, text, {"question": text, "expected": expected, "family": family}
    )


def print_result(sampler: str, result: dict[str, Any]) -> None:
    def share(accuracy: float, interval: list[float]) -> str:
        return f"{accuracy:6.1%}  ({interval[0]:.1%} to {interval[1]:.1%})"

    print(f"{sampler}: exact answers, with 95 % intervals")
    for family, accuracy in result["families"].items():
        if family != "all" or len(result["families"]) > 1:
            print(f"  {family:10} {share(accuracy, result['intervals'][family])} of {result['questions'][family]}")
    print(f"  {'all':10} {share(result['accuracy'], result['interval_95'])} of {result['count']}")
    tokens = result["tokens"]
    print(
        f"  visual tokens: {tokens['full']:.0f}, of which {tokens['after_vision']:.0f} enter the language model and "
        f"{tokens['after_text']:.0f} reach its last layer; equivalent to {tokens['equivalent']:.1%}"
    )
    if result["samples_per_second"] is not None:
        print(f"  {result['samples_per_second']:.1f} questions per second")


@command_line.guarded
def main() -> None:
    run(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
