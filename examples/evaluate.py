"""Exact-match accuracy on the miniature's unseen questions, with the visual tokens that it took.

python examples/evaluate.py --sampler focus --count 1000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

import minifocus
from minifocus import cards

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "weights/tiny"), help="folder in Hugging Face's layout")
    parser.add_argument("--sampler", default="focus", choices=minifocus.samplers.names())
    parser.add_argument("--gamma", type=float, help="text-guided: share of the importance to keep (0.85)")
    parser.add_argument("--keep", type=int, help="text-guided: keep this many tokens per picture instead")
    parser.add_argument("--layer", type=int, help="text-guided: act before this layer (a quarter of the depth)")
    parser.add_argument("--selector", help="vision-guided: a selector file, or 'variance'")
    parser.add_argument("--split", default="test", choices=list(cards.SPLITS))
    parser.add_argument("--count", type=int, default=1000, help="how many questions")
    parser.add_argument("--seed", type=int, default=0, help="the split's scene to begin with")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def evaluate(
    model: minifocus.Llava, count: int, seed: int = 0, split: str = "test", batch: int = 8, bar: bool = False
) -> dict[str, Any]:
    """Ask `count` questions; an answer is right when it equals the expected text.

    Returns accuracy, families (accuracy and number of questions of each), tokens (means over questions; `equivalent` as a
    fraction) and samples_per_second (reading and answering, without drawing the pictures).
    """
    right: dict[str, list[bool]] = defaultdict(list)
    tokens: dict[str, float] = defaultdict(float)
    seconds = 0.0
    asked = cards.questions(split, count, seed)
    with tqdm(total=count, disable=None if bar else True) as progress:
        while block := list(islice(asked, batch)):
            images, questions, expected, families = zip(*block, strict=True)
            begun = time.perf_counter()
            answers = model.generate_batch(images, questions, max_new_tokens=16)
            seconds += time.perf_counter() - begun
            for answer, wanted, family in zip(answers, expected, families, strict=True):
                right[family].append(answer.text == wanted)
                for name, value in vars(answer.tokens).items():
                    tokens[name] += value / count
            progress.update(len(block))
    everything = [one for family in right.values() for one in family]
    return {
        "accuracy": sum(everything) / count,
        "interval_95": 1.96 * math.sqrt(sum(everything) / count * (1 - sum(everything) / count) / count),
        "families": {name: sum(right[name]) / len(right[name]) for name in cards.FAMILIES if right[name]},
        "questions": {name: len(right[name]) for name in cards.FAMILIES},
        "tokens": dict(tokens),
        "samples_per_second": count / seconds,
    }


def main() -> int:
    arguments = parse_arguments()
    names = ("gamma", "keep", "layer", "selector")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        if arguments.count < 1 or arguments.batch < 1 or arguments.seed < 0:
            raise minifocus.InputError("--count and --batch: expected at least 1; --seed: expected at least 0")
        model = minifocus.load(arguments.model, arguments.sampler, arguments.device, **options)
        result = evaluate(model, arguments.count, arguments.seed, arguments.split, arguments.batch, bar=True)
    except (minifocus.CheckpointError, minifocus.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"sampler": arguments.sampler, **options, "count": arguments.count, **result}))
        return 0
    print(
        f"{arguments.sampler}: {result['accuracy']:.1%} ± {result['interval_95']:.1%} of {arguments.count} answers are exact"
    )
    print("  " + ", ".join(f"{name} {value:.1%}" for name, value in result["families"].items()))
    tokens = result["tokens"]
    print(
        f"  visual tokens: {tokens['full']:.0f}, {tokens['after_vision']:.0f} after the vision-guided sampler, "
        f"{tokens['after_text']:.0f} after the text-guided one; equivalent to {tokens['equivalent']:.1%}"
    )
    print(f"  {result['samples_per_second']:.1f} questions per second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
