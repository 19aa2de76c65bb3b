"""Exact-match accuracy on questions whose answers are known, with the visual tokens that it took.

An answer is right when it is the expected text, letter by letter, but for white space at either end: "Red" and "red." are
not "red". Intervals are Wilson's at 95 %, for questions drawn independently: several about one picture are less than that, and
the true interval is wider.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from tqdm import tqdm

from .errors import InputError
from .inputs.processor import Images
from .load import Llava

Asked = tuple[Images, str, str, str | None]  # images, question, answer, family
Answered = tuple[str, str, str | None, Mapping[str, float]]  # answer, expected, family, tokens


def evaluate(
    model: Llava,
    questions: Iterable[Asked],
    batch: int = 8,
    total: int | None = None,
    *,
    template: str | None = None,
    max_new_tokens: int = 16,
    families: Sequence[str] = (),
) -> dict[str, Any]:
    """Ask all `questions`, tuples (images, question, answer, family or None); the result is that of `summarize`.

    `total` is for the progress bar alone. Raises InputError, with the numbers of the questions, where one cannot be asked.
    """
    done: list[Answered] = []
    count, seconds, supply = 0, 0.0, iter(questions)
    with tqdm(total=total, disable=None) as progress:
        while block := list(islice(supply, batch)):
            images, texts, expected, asked_of = zip(*block, strict=True)
            begun = time.perf_counter()
            try:
                answers = model.generate_batch(images, texts, max_new_tokens=max_new_tokens, template=template)
            except InputError as error:
                raise InputError(f"questions {count + 1} to {count + len(block)}: {error}") from error
            seconds += time.perf_counter() - begun
            done += [
                (answer.text, wanted, family, vars(answer.tokens))
                for answer, wanted, family in zip(answers, expected, asked_of, strict=True)
            ]
            count += len(block)
            progress.update(len(block))
    return summarize(done, count / seconds if count else None, families)


def summarize(
    answers: Iterable[Answered], samples_per_second: float | None = None, families: Sequence[str] = ()
) -> dict[str, Any]:
    """What came of questions, tuples (answer, the expected one, family or None, the fields of `TokenCounts`).

    `families` come first in the result, in their order, and others after them as they came.

    count, accuracy       over all questions; a fraction, as every figure here
    interval_95           [low, high], Wilson's
    families, intervals, questions
                          the same of each family: accuracy, interval, count; the only one is "all" where none is named.
                          Questions without a family, beside others with one, count in the accuracy over all only
    tokens                means over questions of `TokenCounts`
    samples_per_second    to open the pictures, read and answer; not to draw the miniature's. None: nothing was asked

    Raises InputError where there is none.
    """
    right: dict[str | None, list[bool]] = defaultdict(list)
    tokens: dict[str, list[float]] = defaultdict(list)
    for text, wanted, family, counts in answers:
        right[family].append(text.strip() == wanted.strip())
        for name, value in counts.items():
            tokens[name].append(value)
    count = sum(map(len, right.values()))
    if not count:
        raise InputError("questions: expected at least one, got none")

    def place(family: str) -> int:
        return families.index(family) if family in families else len(families)

    everything = [one for family in right.values() for one in family]
    named = {family: right[family] for family in sorted(filter(None, right), key=place)} or {"all": everything}
    return {
        "count": count,
        "accuracy": fmean(everything),
        "interval_95": wilson(sum(everything), count),
        "families": {family: fmean(own) for family, own in named.items()},
        "intervals": {family: wilson(sum(own), len(own)) for family, own in named.items()},
        "questions": {family: len(own) for family, own in named.items()},
        "tokens": {name: fmean(values) for name, values in tokens.items()},
        "samples_per_second": samples_per_second,
    }


def wilson(right: int, asked: int, z: float = 1.959964) -> list[float]:
    """[low, high] of Wilson's score interval for a share of which `right` of `asked` were seen; z: 95 %.

    Unlike p ± z·√(p(1 - p)/n), it stays within 0 … 1 and does not shrink to nothing where all answers are right.
    """
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)]  # rounding apart, always so


def longest_answer(model: Llava, questions: Iterable[Asked]) -> int:
    """A number of new tokens that is enough: an answer longer than every expected one is wrong already."""
    if model.tokenizer is None:
        raise InputError(f"model: {model.folder} has no tokenizer to read answers with")
    return 8 + max(len(model.tokenizer.encode(expected).ids) for _, _, expected, _ in questions)
