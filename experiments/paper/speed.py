"""Samples per second of several arms, with one clock: every arm in turn answers the same questions."""

from __future__ import annotations

import shlex
import time
from itertools import islice
from statistics import fmean, median
from typing import Any

import minifocus
from examples.sampler_options import read_options
from minifocus import cards

from ..flops import decoder_flops, vision_flops
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
    """
    asked = cards.questions("test", (rounds + 1) * BATCH, FIRST_SCENE, dense=True)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    flops: dict[str, list[int]] = {name: [] for name in models}
    for number in range(rounds + 1):
        images, questions, _, _ = zip(*islice(asked, BATCH), strict=True)
        for name, model in models.items():
            begun = time.perf_counter()
            answers = model.generate_batch(images, questions, max_new_tokens=16)
            between = time.perf_counter()
            one = number % BATCH
            model.generate(images[one], questions[one], max_new_tokens=16)
            if number:  # the first round warms up
                seconds[name].append((between - begun, time.perf_counter() - between))
                for image, answer in zip(images, answers, strict=True):
                    tiles = model.num_tiles((image.height, image.width))
                    flops[name].append(
                        decoder_flops(model.config, answer.layer_tokens) + vision_flops(model.config, tiles)
                    )
    reference = next(iter(seconds.values()))
    return {
        name: {
            "samples_per_second": BATCH / median(batch for batch, _ in own),
            "times_as_fast": median(a[0] / b[0] for a, b in zip(reference, own, strict=True)),
            "samples_per_second_alone": 1 / median(alone for _, alone in own),
            "times_as_fast_alone": median(a[1] / b[1] for a, b in zip(reference, own, strict=True)),
            "gflops": fmean(flops[name]) / 1e9,
        }
        for name, own in seconds.items()
    }


def measure_speed(names: list[str], recipe: Recipe) -> dict[str, Any]:
    """Of the named arms, as ratios to "control"; none without it."""
    if "control" not in names:
        return {}
    ordered = sorted(names, key=lambda name: name != "control")
    return time_models({name: load(name, recipe) for name in ordered}, 25 if recipe.count > 100 else 1)
