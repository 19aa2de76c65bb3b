"""The embedded model: transformers loads it and answers alike, it answers unseen questions, its samplers do their work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from forked import python
from PIL import Image

import minifocus
from minifocus import cards

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow
TINY = ROOT / "weights/tiny"


def some_questions(count: int) -> Iterator[tuple[Image.Image, str, str, str]]:
    return islice(cards.questions("test", count, seed=5000), count)


@torch.inference_mode()
def test_transformers_loads_the_folder_and_gives_the_same_answers() -> None:
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = minifocus.load(TINY, sampler="none")
    processor = AutoProcessor.from_pretrained(TINY, backend="pil")
    oracle = LlavaNextForConditionalGeneration.from_pretrained(TINY)
    for image, question, _, _ in some_questions(12):
        inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        expected = oracle.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        answer = model.generate(image, question, max_new_tokens=16)
        assert answer.text == processor.decode(expected, skip_special_tokens=True).strip()

        logits = oracle(**inputs).logits
        ours = model(inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"], inputs["attention_mask"])
        scale = float(logits.std())
        assert (ours - logits).abs().max() <= 1e-5 * max(scale / 4, 1)


def evaluate(*arguments: Any) -> dict[str, Any]:
    done = python("examples/evaluate.py", "--json", *arguments, timeout=900)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_at_least_90_percent_of_200_unseen_questions() -> None:
    result = evaluate("--sampler", "none", "--count", 200)
    assert result["accuracy"] >= 0.9, result
    assert set(result["families"]) == set(cards.FAMILIES)
    assert result["tokens"]["equivalent"] == pytest.approx(1.0)


def test_both_samplers_answer_with_fewer_tokens() -> None:
    result = evaluate("--sampler", "focus", "--count", 200)
    assert result["accuracy"] >= 0.85, result
    assert result["tokens"]["equivalent"] < 0.6, result
    assert result["tokens"]["after_text"] < result["tokens"]["after_vision"] < result["tokens"]["full"]


def test_the_picture_is_needed() -> None:
    """With another scene's picture the answers are mostly wrong: questions do not give themselves away."""
    model = minifocus.load(TINY, sampler="none")
    asked = list(some_questions(40))
    images = [image for image, *_ in asked]
    answers = model.generate_batch(
        images[20:] + images[:20], [question for _, question, *_ in asked], max_new_tokens=16
    )
    right = sum(answer.text == wanted for answer, (_, _, wanted, _) in zip(answers, asked, strict=True))
    assert right / len(asked) < 0.5


def test_size() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--model", "nowhere"], ["--gamma", "3"]])
def test_evaluate_refuses_bad_arguments(arguments: list[str]) -> None:
    done = python("examples/evaluate.py", *arguments, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
