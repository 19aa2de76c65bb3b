"""Samples per second of several arms, with one clock: every arm in turn answers each question, alone."""

from __future__ import annotations

import shlex
import sys
from statistics import fmean, median
from typing import Any

from arms import ARMS, ROOT, SEEDS, Recipe, model_of

import minifocus
from minifocus import cards

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
from flops import decoder_flops, vision_flops  # noqa: E402
from sampler_options import read_options  # noqa: E402

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


def time_models(models: dict[str, minifocus.Llava], count: int) -> dict[str, dict[str, Any]]:
    """Name → samples per second (of the median time), the median ratio of times to the first model's, and GFLOPs."""
    asked = list(cards.questions("test", count + 1, FIRST_SCENE, dense=True))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    flops: dict[str, list[int]] = {name: [] for name in models}
    for number, (image, question, _, _) in enumerate(asked):
        for name, model in models.items():
            answer = model.generate(image, question, max_new_tokens=16)
            if number:  # the first one warms up
                seconds[name].append(answer.prefill_seconds + answer.decode_seconds)
                tiles = model.num_tiles((image.height, image.width))
                flops[name].append(decoder_flops(model.config, answer.layer_tokens) + vision_flops(model.config, tiles))
    reference = next(iter(seconds.values()))
    return {
        name: {
            "samples_per_second": 1 / median(own),
            "times_as_fast": median(a / b for a, b in zip(reference, own, strict=True)),
            "gflops": fmean(flops[name]) / 1e9,
        }
        for name, own in seconds.items()
    }


def measure_speed(names: list[str], recipe: Recipe) -> dict[str, Any]:
    return time_models({name: load(name, recipe) for name in names}, 200 if recipe.count > 100 else 4) if names else {}
