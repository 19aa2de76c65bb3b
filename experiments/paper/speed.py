"""Samples per second of several arms, with one clock: every arm in turn answers the same questions."""

from __future__ import annotations

import shlex
from functools import lru_cache, partial
from itertools import islice
from statistics import fmean, median
from typing import Any

import minifocus
from examples.sampler_options import read_options
from minifocus import cards

from ..clocks import Spent, read
from ..flops import decoder_flops, vision_flops
from ..timing import columns, interleaved, ratio
from .arms import ARMS, SEEDS, Recipe, model_of

BATCH = 16  # as evaluate.py answers them
FIRST_SCENE = 600_000  # place in the test split: not among the questions that accuracies are from


def load(name: str, recipe: Recipe, **options: Any) -> minifocus.Llava:
    """An arm's model of the first seed, with the sampler that it is asked with; `options` on top."""
    words = list(ARMS[name].asked)
    flags = {
        key: shlex.split(value)[0] for key, value in zip(words[::2], words[1::2], strict=True) if key != "--option"
    }
    given = [value for key, value in zip(words[::2], words[1::2], strict=True) if key == "--option"]
    own = {**read_options(given), **({"gamma": float(flags["--gamma"])} if "--gamma" in flags else {})}
    return minifocus.load(model_of(name, SEEDS[0], recipe), flags["--sampler"], **{**own, **options})


def time_models(models: dict[str, minifocus.Llava], rounds: int) -> dict[str, dict[str, Any]]:
    """
    Name → figures; every model in turn answers the 16 questions of a round as one batch, and then one of them alone.

    samples_per_second  of the batches, by their median time; `alone`: of single questions
    times_as_fast       the median over rounds of the first model's time ÷ this one's; `alone`: likewise
    gflops              mean over questions
    rounds              how many there were, and how many were disturbed or run again: the same for all models
    batches, alone      what each round's took, by the clocks
    """

    asked = cards.questions("test", (rounds + 1) * BATCH, FIRST_SCENE, dense=True)

    @lru_cache(maxsize=1)  # drawn once for all models of a round
    def questions_of(number: int) -> tuple[Any, ...]:
        return tuple(zip(*islice(asked, BATCH), strict=True))

    def answer(model: minifocus.Llava, number: int) -> tuple[Spent, Spent, float]:
        images, questions, _, _ = questions_of(number)
        begun = read()
        answers = model.generate_batch(images, questions, max_new_tokens=16)
        batch, begun = Spent.since(begun), read()
        model.generate(images[number % BATCH], questions[number % BATCH], max_new_tokens=16)
        alone = Spent.since(begun)
        tiles = [model.num_tiles((image.height, image.width)) for image in images]
        flops = fmean(
            decoder_flops(model.config, one.layer_tokens) + vision_flops(model.config, count)
            for one, count in zip(answers, tiles, strict=True)
        )
        return batch, alone, flops

    answering = {name: partial(answer, model) for name, model in models.items()}
    timed = interleaved(answering, lambda one: one[:2], rounds, warm_up=1)
    figures, first = {}, next(iter(timed.results.values()))
    first_batches, first_alone = ([one[way].wall for one in first] for way in (0, 1))
    for name, own in timed.results.items():
        batches, alone = ([one[way].wall for one in own] for way in (0, 1))
        figures[name] = {
            "samples_per_second": BATCH / median(batches),
            "times_as_fast": ratio(first_batches, batches),
            "samples_per_second_alone": 1 / median(alone),
            "times_as_fast_alone": ratio(first_alone, alone),
            "gflops": fmean(one[2] for one in own) / 1e9,
            "rounds": timed.note(),
            "batches": columns([one[0] for one in own]),
            "alone": columns([one[1] for one in own]),
        }
    return figures


def measure_speed(names: list[str], recipe: Recipe) -> dict[str, Any]:
    """Of the named arms, as ratios to "control"; none without it."""
    if "control" not in names:
        return {}
    ordered = sorted(names, key=lambda name: name != "control")
    return time_models({name: load(name, recipe) for name in ordered}, 25 if recipe.count > 100 else 1)
