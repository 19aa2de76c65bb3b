"""Every method and sampler on photographs, with the statistics of a trained tower and decoder.

The projector is random, so nothing is said here of what the decoder attends to. What the tower attends to is real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import minifocus
from minifocus import methods

Load = Callable[..., minifocus.Llava]
Sampled = Callable[..., minifocus.Llava]
Original = Callable[[torch.Tensor], dict[str, torch.Tensor]]
QUESTION = "What is this?"
OPTIONS: dict[str, dict[str, Any]] = {
    "focus": {"selector": "variance"},
    "vision": {"selector": "variance"},
    "avg-llava": {"granularity": "coarsest"},
}
LAYERS = 8  # of the decoder's 30, where a method has done its part before the first
INSIDE = ("focus", "text", "fastv", "pyramiddrop", "feather", "aim")
BEFORE = [name for name in methods.names() if name not in INSIDE and name != "none"]


@pytest.fixture
def sampled(load: Load) -> Iterator[Sampled]:
    """A folder's model with a method, which it has no longer after the test."""
    used = []

    def model(name: str, method: str, **options: Any) -> minifocus.Llava:
        used.append(load(name))
        used[-1].set_sampler(method, **OPTIONS.get(method, {}), **options)
        return used[-1]

    yield model
    for one in used:
        one.set_sampler("none")


@contextmanager
def first_layers(model: minifocus.Llava, *decoders: Any) -> Iterator[None]:
    """Within it, the decoder ends after `LAYERS`, and so do `decoders`."""
    every = model.language_model.model, *decoders
    config, layers = model.config, [decoder.layers for decoder in every]
    try:
        model.config = replace(config, text=replace(config.text, num_hidden_layers=LAYERS))
        for decoder in every:
            decoder.layers = decoder.layers[:LAYERS]
        yield
    finally:
        model.config = config
        for decoder, own in zip(every, layers, strict=True):
            decoder.layers = own


@pytest.mark.parametrize("method", [name for name in methods.names() if name != "none"])
def test_every_method_answers(sampled: Sampled, photographs: list[Image.Image], method: str) -> None:
    """Beside a row that is shorter and has no picture; and, one method of each kind, alone as well."""
    model = sampled("llava", method)
    with first_layers(model) if method in BEFORE else nullcontext():
        answers_with(model, photographs[2], method)


def answers_with(model: minifocus.Llava, photograph: Image.Image, method: str) -> None:
    questions = [QUESTION, "What is the capital of France?"]
    answer, text = model.generate_batch([photograph, None], questions, max_new_tokens=3)
    (trace,) = answer.pictures
    assert not text.pictures and len(trace.entered.unique()) == len(trace.entered)
    assert set(trace.kept.tolist()) <= set(trace.entered.tolist())
    assert 0 < answer.tokens.equivalent < 0.7 and answer.tokens.full == 256
    assert (answer.tokens.after_vision, answer.tokens.after_text) == (len(trace.entered), len(trace.kept))
    assert all(later <= earlier for earlier, later in pairwise(answer.layer_tokens))
    if method in ("focus", "hired", "fastv", "aim"):
        alone = model.generate(photograph, QUESTION, max_new_tokens=3)
        assert alone.token_ids == answer.token_ids and alone.tokens == answer.tokens
        assert alone.pictures[0].kept.equal(trace.kept)


@pytest.mark.parametrize("method", BEFORE)
@torch.inference_mode()
def test_what_is_kept_is_read_as_in_transformers(
    sampled: Sampled, oracle: Callable[..., Any], photographs: list[Image.Image], method: str
) -> None:
    """The decoder of transformers, given the words' embeddings and the tokens that the method left, has the same logits."""
    model, decoder = sampled("llava", method), oracle("llava")
    given = model.processor(photographs[0], QUESTION)
    (picture,) = model.encode_pictures(given.tiles, given.sizes, model.before_llm)
    assert model.before_llm is not None
    words = decoder.get_input_embeddings()(given.input_ids)
    visual = model.before_llm(picture, words[given.instruction]).tokens
    begin, end = (given.input_ids == model.config.image_token_id).nonzero().flatten()[[0, -1]].tolist()
    embeddings = torch.cat([words[:begin], visual, words[end + 1 :]])[None]
    with first_layers(model, decoder.model.language_model):
        logits, rows = model.logits(given.input_ids[None], given.tiles, given.sizes, None, given.instruction[None])
        states = decoder.model.language_model(inputs_embeds=embeddings, position_ids=rows.positions)[0]
    expected = decoder.lm_head(states)
    assert visual.isfinite().all() and logits.shape == expected.shape
    assert (logits - expected).abs().max() < 2e-4  # as without a method: see test_whole_model.py


@pytest.mark.parametrize("method", [*BEFORE, "focus"])
@torch.inference_mode()
def test_every_method_on_the_tiles_of_llava_next(sampled: Sampled, photographs: list[Image.Image], method: str) -> None:
    """A wide photograph in a thumbnail and two tiles: every place at most once, every token finite."""
    model = sampled("next", method)
    given = model.processor(photographs[2].resize((300, 150)), QUESTION)
    (picture,) = model.encode_pictures(given.tiles, given.sizes, model.before_llm)
    assert model.before_llm is not None and picture.layout.newlines and len(given.tiles[0]) == 3
    visual = model.before_llm(picture, torch.zeros(0, model.config.text.hidden_size))
    assert visual.tokens.isfinite().all() and len(visual.source.unique()) == len(visual.source)
    assert 0 < len(visual.source) < picture.layout.num_tokens


# ---- what the tower attends to ----

# Importance for each token that is kept, over the average: chance is 1. Measured on the five photographs, in the means: 1.47,
# 1.41, 1.77, 1.50, 1.22 and 1.79; and 1.10 of prumerge+, three quarters of whose tokens are spread evenly.
BY_THE_TOWER = {"fastervlm": 1.2, "vtc-cls": 1.2, "hired": 1.2, "globalcom2": 1.2, "fopru": 1.1, "prumerge": 1.2}
BY_THE_TOWER |= {"prumerge+": 1.03}


@torch.inference_mode()
def test_methods_that_follow_the_tower_s_attention_keep_what_is_salient(
    load: Load, sampled: Sampled, original: Original, photographs: list[Image.Image]
) -> None:
    """Saliency is what the package that the tower comes from was trained to say, with layers of its own on top."""
    squares = [ImageOps.fit(photograph, (224, 224)) for photograph in photographs]
    tiles = [load("llava").image_processor(square)[0].flatten(0, -4) for square in squares]
    saliency = original(torch.cat(tiles))["importance"].flatten(1)

    def gain(method: str, **options: Any) -> float:
        model = sampled("llava", method, **options)
        assert model.before_llm is not None
        pictures = model.encode_pictures(tiles, [(224, 224)] * len(tiles), model.before_llm)
        sources = [model.before_llm(picture, torch.zeros(0, 576)).source for picture in pictures]
        return fmean(float(own[source].mean() / own.mean()) for own, source in zip(saliency, sources, strict=True))

    for method, least in BY_THE_TOWER.items():
        assert gain(method) > least, method
    assert fmean(gain("random", seed=seed) for seed in range(4)) == pytest.approx(1, abs=0.08)
