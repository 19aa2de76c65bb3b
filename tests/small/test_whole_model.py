"""The whole folders in transformers and here: the same inputs for photographs, the same logits, the same words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from test_methods_on_photographs import first_layers

import minifocus

Load = Callable[..., minifocus.Llava]
Oracle = Callable[..., Any]
QUESTIONS = ["What animal is this?", "Describe the picture in one sentence.", "Is it day or night? Say why."]


def conversation(question: str, pictures: int) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def processor(small: Path) -> Callable[[str], Any]:
    from transformers import AutoProcessor

    return lambda name: AutoProcessor.from_pretrained(small / name, backend="pil")


def batch_of(processor: Any, rows: list[tuple[list[Image.Image], str]]) -> Any:
    texts = [
        processor.apply_chat_template(conversation(question, len(pictures)), add_generation_prompt=True)
        for pictures, question in rows
    ]
    pictures = [picture for own, _ in rows for picture in own]
    return processor(images=pictures, text=texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("name", ["llava", "llava336", "next"])
def test_inputs_are_those_of_transformers_processor(
    load: Load, processor: Callable[[str], Any], photographs: list[Image.Image], name: str
) -> None:
    """Template, tokens, and pixels bit for bit."""
    model = load(name)
    for photograph, question in zip(photographs, QUESTIONS, strict=False):
        expected = batch_of(processor(name), [([photograph], question)])
        own = model.processor(photograph, question)
        assert torch.equal(own.input_ids, expected["input_ids"][0])
        assert torch.equal(own.tiles[0].reshape(expected["pixel_values"][0].shape), expected["pixel_values"][0])


@pytest.mark.parametrize("name", ["llava", "llava336", "next"])
@torch.inference_mode()
def test_logits(
    load: Load, oracle: Oracle, processor: Callable[[str], Any], photographs: list[Image.Image], name: str
) -> None:
    """In float32, of up to 75: equal, and in a batch within 9e-5, where sums are added up in another order.

    The decoder is the same in all three: the longer rows pass through its first layers alone.
    """
    rows = [([photographs[2]], QUESTIONS[0])]
    if name == "llava":  # a batch of rows of different lengths, one without a picture
        rows.append(([], "What is the capital of France?"))
    inputs = batch_of(processor(name), rows)
    theirs, ours = oracle(name), load(name)
    with nullcontext() if name == "llava" else first_layers(ours, theirs.model.language_model):
        expected, got = theirs(**inputs).logits, ours(**inputs)
    present = inputs["attention_mask"].bool()
    assert 10 < expected[present].abs().max() < 100  # the tolerance is for logits of this size
    assert (got - expected)[present].abs().max() < 2e-4


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_in_transformers(
    load: Load, oracle: Oracle, processor: Callable[[str], Any], photographs: list[Image.Image]
) -> None:
    """Rounding is not the same where operations are fused differently, but it is no more than theirs."""
    inputs = batch_of(processor("llava"), [([photographs[2]], QUESTIONS[0])])
    exact = load("llava")(**inputs)
    half = inputs.to(torch.bfloat16)
    expected, got = oracle("llava", torch.bfloat16)(**half).logits, load("llava", "bfloat16")(**half)
    theirs, ours = ((logits.float() - exact).norm() / exact.norm() for logits in (expected, got))
    assert got.dtype == expected.dtype == torch.bfloat16
    assert ours < 1.25 * theirs < 0.1


@pytest.mark.parametrize("name", ["llava", "next"])
@torch.inference_mode()
def test_greedy_words(
    load: Load, oracle: Oracle, processor: Callable[[str], Any], photographs: list[Image.Image], name: str
) -> None:
    """They mean nothing of the picture, as the projector is random, and are the same."""
    hf, photograph = processor(name), ImageOps.fit(photographs[2], (224, 224))
    inputs = batch_of(hf, [([photograph], QUESTIONS[0])])
    expected = oracle(name).generate(**inputs, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
    answer = load(name).generate(photograph, QUESTIONS[0], max_new_tokens=10)
    assert answer.token_ids == expected.tolist()[: len(answer.token_ids)]
    assert answer.text == hf.decode(expected, skip_special_tokens=True).strip()
