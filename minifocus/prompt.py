"""The user's question → the text that each family of models answers.

They are the hub's templates, with two exceptions. "chatml" has the system's words that LLaVA-1.6-34B was trained with, which
the hub's leaves out. "vicuna_v1" is for asking: LLaVA and its published scores have the system's words in front of Vicuna's
prompt, which the hub's ("vicuna") leaves out.

No template holds a BOS token: the tokenizer puts it in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

IMAGE = "<image>"

TEMPLATES = {
    "vicuna": "USER: {question} ASSISTANT:",
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: {question} ASSISTANT:"
    ),
    "mistral": "[INST] {question} [/INST]",
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"
    ),
    "raw": "{question}",
}

ANSWERS = dict.fromkeys(("vicuna", "vicuna_v1", "mistral"), " {answer}")  # else the answer follows at once
TURN_ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}  # else the tokenizer's end of sequence
# What follows the system's words, which a conversation has once.
TURN_BEGINS = {"vicuna_v1": "USER: ", "chatml": "<|im_start|>user\n"}


@dataclass(frozen=True)
class Prompt:
    """`instruction` is the span of the user's own words in `text`: without white space and `<image>` at either end.

    An `<image>` between the words stays inside the span. It is empty when a raw text has no words.
    """

    text: str
    instruction: tuple[int, int]


def detect_template(tokenizer: Tokenizer | None, text_model_type: str) -> str:
    """The name of the template that a folder's vocabulary, or else its `text_config.model_type`, stands for."""
    if tokenizer is not None and tokenizer.token_id("<|start_header_id|>") is not None:
        return "llama3"
    if tokenizer is not None and tokenizer.token_id("<|im_start|>") is not None:
        return "chatml"
    return "mistral" if text_model_type == "mistral" else "vicuna"


def end_token_id(template: str, tokenizer: Tokenizer) -> int | None:
    """The token that ends an answer in `template`; None if the vocabulary has no such token."""
    end = TURN_ENDS.get(template)
    return tokenizer.eos_token_id if end is None else tokenizer.token_id(end)


def build_prompt(question: str, num_images: int, template: str) -> Prompt:
    """Put `question` into TEMPLATES[template], with one `<image>` for each picture.

    A question without `<image>` gets "<image>\\n" for each picture in front; one that has some keeps its own places.
    The template "raw" takes the text as it stands and adds nothing. Raises InputError for an unknown template, for a
    question without words and when the places are not as many as the pictures.
    """
    if template not in TEMPLATES:
        raise InputError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
    words = question.replace(IMAGE, " " * len(IMAGE))
    if not question or not (words.strip() or template == "raw"):
        raise InputError(f"prompt: expected a question, got {question!r}")
    places = question.count(IMAGE)
    added = f"{IMAGE}\n" * num_images if places == 0 and template != "raw" else ""
    if not added and places != num_images:
        raise InputError(f"prompt: expected one {IMAGE} for each of {num_images} pictures, got {places} of them")
    before, _, after = TEMPLATES[template].partition("{question}")
    start = len(before) + len(added)
    last = len(words.rstrip())
    first = min(len(words) - len(words.lstrip()), last)
    return Prompt(before + added + question + after, (start + first, start + last))
