"""Exact-match accuracy on the miniature's unseen questions or on your own, with the visual tokens that it took.

python examples/evaluate.py --sampler focus --count 1000                # or --dense: the scenes where detail matters most
python examples/evaluate.py --model DIR --data questions.json --images DIR

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
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from command_line import Refused, expect_numbers
from sampler_options import add_sampler_options, sampler_options
from tqdm import tqdm

import minifocus
from minifocus import cards
from minifocus.inputs.conversations import asked_alone, read_conversations
from minifocus.inputs.processor import Images
from minifocus.inputs.prompt import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent

Asked = tuple[Images, str, str, str | None]  # images, question, answer, family


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def evaluate(
    model: minifocus.Llava,
    questions: Iterable[Asked],
    batch: int = 8,
    total: int | None = None,
    *,
    template: str | None = None,
    max_new_tokens: int = 16,
) -> dict[str, Any]:
    """Ask all `questions`, tuples (images, question, answer, family or None). `total` is for the progress bar alone.

    count, accuracy       over all questions; a fraction, as every figure here
    interval_95           [low, high], Wilson's
    families, intervals, questions
                          the same of each family: accuracy, interval, count; the only one is "all" where none is named.
                          Questions without a family, beside others with one, count in the accuracy over all only
    tokens                means over questions of `TokenCounts`
    samples_per_second    to open the pictures, read and answer; not to draw the miniature's

    Raises InputError, with the numbers of the questions, where one cannot be asked.
    """
    right: dict[str | None, list[bool]] = defaultdict(list)
    tokens: dict[str, list[float]] = defaultdict(list)
    count, seconds, supply = 0, 0.0, iter(questions)
    with tqdm(total=total, disable=None) as progress:
        while block := list(islice(supply, batch)):
            images, texts, expected, families = zip(*block, strict=True)
            begun = time.perf_counter()
            try:
                answers = model.generate_batch(images, texts, max_new_tokens=max_new_tokens, template=template)
            except minifocus.InputError as error:
                raise minifocus.InputError(f"questions {count + 1} to {count + len(block)}: {error}") from error
            seconds += time.perf_counter() - begun
            for answer, wanted, family in zip(answers, expected, families, strict=True):
                right[family].append(answer.text.strip() == wanted.strip())
                for name, value in vars(answer.tokens).items():
                    tokens[name].append(value)
            count += len(block)
            progress.update(len(block))
    if not count:
        raise minifocus.InputError("questions: expected at least one, got none")
    everything = [one for family in right.values() for one in family]
    named = {family: right[family] for family in sorted(filter(None, right), key=_place)} or {"all": everything}
    return {
        "count": count,
        "accuracy": fmean(everything),
        "interval_95": wilson(sum(everything), count),
        "families": {family: fmean(own) for family, own in named.items()},
        "intervals": {family: wilson(sum(own), len(own)) for family, own in named.items()},
        "questions": {family: len(own) for family, own in named.items()},
        "tokens": {name: fmean(values) for name, values in tokens.items()},
        "samples_per_second": count / seconds,
    }


def _place(family: str) -> int:
    """The miniature's families in the order of its tables, others after them as they came."""
    return cards.FAMILIES.index(family) if family in cards.FAMILIES else len(cards.FAMILIES)


def wilson(right: int, asked: int, z: float = 1.959964) -> list[float]:
    """[low, high] of Wilson's score interval for a share of which `right` of `asked` were seen; z: 95 %.

    Unlike p ± z·√(p(1 - p)/n), it stays within 0 … 1 and does not shrink to nothing where all answers are right.
    """
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)]  # rounding apart, always so


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


def longest_answer(model: minifocus.Llava, questions: Iterable[Asked]) -> int:
    """So many new tokens that what goes on for longer than every expected answer is wrong already."""
    if model.tokenizer is None:
        raise minifocus.InputError(f"model: {model.folder} has no tokenizer to read answers with")
    return 8 + max(len(model.tokenizer.encode(expected).ids) for _, _, expected, _ in questions)


def check(arguments: argparse.Namespace) -> None:
    """What argparse does not."""
    expect_numbers(arguments, 1, "count batch max_new_tokens")
    expect_numbers(arguments, 0, "seed")
    if arguments.data is not None and (arguments.split or arguments.dense):
        raise Refused("--split and --dense are of the miniature: not to be combined with --data")
    if arguments.data is None and (arguments.images is not None or arguments.images_anywhere):
        option = "--images" if arguments.images is not None else "--images-anywhere"
        raise Refused(f"{option} is of no use without --data")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    questions, total = questions_of(arguments)
    options = sampler_options(arguments)
    model = minifocus.load(arguments.model, arguments.sampler, arguments.device, arguments.dtype, **options)
    longest = arguments.max_new_tokens
    if longest is None:
        longest = 16 if arguments.data is None else longest_answer(model, questions)
    result = evaluate(model, questions, arguments.batch, total, template=arguments.template, max_new_tokens=longest)
    if arguments.json:
        print(json.dumps({"sampler": arguments.sampler, **options, **result}))
    else:
        print_result(arguments.sampler, result)


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
    print(f"  {result['samples_per_second']:.1f} questions per second")


@command_line.guarded
def main() -> None:
    run(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
