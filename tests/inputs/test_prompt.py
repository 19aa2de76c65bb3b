"""Prompts of all families, letter by letter, and the span of the user's own words in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifocus.errors import InputError
from minifocus.inputs.prompt import TEMPLATES, build_prompt, detect_template

PROMPTS = {
    "vicuna": "USER: <image>\nWhat is it? ASSISTANT:",
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT:"
    ),
    "mistral": "[INST] <image>\nWhat is it? [/INST]",
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n"
    ),
}


@pytest.mark.parametrize("template", PROMPTS)
def test_families(template):
    prompt = build_prompt("What is it?", 1, template)
    assert prompt.text == PROMPTS[template]
    assert prompt.text[slice(*prompt.instruction)] == "What is it?"
    assert build_prompt("<image>\nWhat is it?", 1, template) == prompt


def test_no_and_several_pictures():
    assert build_prompt("Hi", 0, "vicuna").text == "USER: Hi ASSISTANT:"
    prompt = build_prompt("Which is red?", 3, "vicuna")
    assert prompt.text == "USER: <image>\n<image>\n<image>\nWhich is red? ASSISTANT:"
    assert prompt.text[slice(*prompt.instruction)] == "Which is red?"


def test_own_places_are_kept():
    prompt = build_prompt("Is <image> like <image>?", 2, "mistral")
    assert prompt.text == "[INST] Is <image> like <image>? [/INST]"
    assert prompt.text[slice(*prompt.instruction)] == "Is <image> like <image>?"
    prompt = build_prompt(" Compare:\n<image> <image>\n", 2, "vicuna")
    assert prompt.text == "USER:  Compare:\n<image> <image>\n ASSISTANT:"
    assert prompt.text[slice(*prompt.instruction)] == "Compare:"


def test_raw():
    text = "A chat.\nUSER: <image>\nWhy? ASSISTANT:"
    prompt = build_prompt(text, 1, "raw")
    assert prompt.text == text and prompt.instruction == (0, len(text))
    prompt = build_prompt("<image>\nA red", 1, "raw")
    assert prompt.text == "<image>\nA red" and prompt.text[slice(*prompt.instruction)] == "A red"
    prompt = build_prompt("<image>", 1, "raw")
    assert prompt.text == "<image>" and prompt.instruction[0] == prompt.instruction[1]


@pytest.mark.parametrize("question, num_images, template, words", [
    ("Is <image> red?", 2, "vicuna", "each of 2 pictures, got 1 of them"),
    ("Is <image> red?", 0, "llama3", "each of 0 pictures, got 1 of them"),
    ("<image><image> Same?", 1, "raw", "each of 1 pictures, got 2 of them"),
    ("No place.", 1, "raw", "each of 1 pictures, got 0 of them"),
    ("", 1, "vicuna", "expected a question, got ''"),
    (" \n", 1, "mistral", "expected a question"),
    ("<image>\n", 1, "chatml", "expected a question"),
    ("", 0, "raw", "expected a question"),
    ("Hi", 0, "alpaca", "expected one of 'vicuna', 'vicuna_v1', 'mistral', 'llama3', 'chatml', 'raw', got 'alpaca'"),
])  # fmt: skip
def test_bad_prompts(question, num_images, template, words):
    with pytest.raises(InputError) as error:
        build_prompt(question, num_images, template)
    assert words in str(error.value)


@given(st.text(min_size=1), st.integers(0, 3), st.sampled_from(list(TEMPLATES)))
def test_words_are_found_again(question, num_images, template):
    question = question.replace("<image>", "")
    if not question.strip():
        return
    if template == "raw":
        question = "<image>" * num_images + question
    prompt = build_prompt(question, num_images, template)
    assert prompt.text[slice(*prompt.instruction)] == question.replace("<image>", "").strip()
    assert question in prompt.text and prompt.text.count("<image>") == num_images


class Vocabulary(dict):
    token_id = dict.get


def test_template_of_a_folder():
    assert detect_template(None, "llama") == "vicuna"
    assert detect_template(None, "mistral") == "mistral"
    assert detect_template(Vocabulary({"<image>": 5}), "llama") == "vicuna"
    assert detect_template(Vocabulary({"<|start_header_id|>": 0}), "llama") == "llama3"
    assert detect_template(Vocabulary({"<|im_start|>": 7}), "mistral") == "chatml"
