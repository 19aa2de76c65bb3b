"""A question → the prompt to answer, and a conversation → the text to train on.

Both are written with the folder's own chat template (`chat_template.py`). A folder without one gets the named template that
its vocabulary, or else its decoder, is usually trained with. `template=` names one for any folder.

The named templates are those of the hub's checkpoints, with two exceptions. "chatml" has the system prompt that LLaVA-1.6-34B
was trained with; the hub's lacks it. "vicuna_v1" has the system prompt with which LLaVA's published scores were measured; the
hub's, "vicuna", lacks it. None holds a BOS token: the tokenizer adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from .. import arguments
from ..errors import InputError
from .chat_template import ChatTemplate, Message
from .template_writer import IMAGE, TemplateWriter

if TYPE_CHECKING:
    from .tokenizer import Encoding, Tokenizer

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

_ANSWERS = dict.fromkeys(("vicuna", "vicuna_v1", "mistral"), " {answer}")  # with others the answer follows at once
_TURN_ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}  # others write nothing after an answer
# What begins each question after the system prompt, which a conversation has once.
_TURN_BEGINS = {"vicuna_v1": "USER: ", "chatml": "<|im_start|>user\n"}


def _render_named(name: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Write messages whose content is text with one of TEMPLATES. Each question ends with the prompt for its answer."""
    before, _, after = TEMPLATES[name].partition("{question}")
    begin = _TURN_BEGINS.get(name, before)
    text = before.removesuffix(begin)
    for message in messages:
        if message["role"] == "user":
            text += begin + message["content"] + after
        else:
            text += _ANSWERS.get(name, "{answer}").replace("{answer}", message["content"]) + _TURN_ENDS.get(name, "")
    return text


Template = str | ChatTemplate  # the name of one of TEMPLATES, or a folder's own


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and `instruction`, the span of the user's own words in it.

    The span has no white space or `<image>` at either end; an `<image>` between the words stays inside. It is empty when a raw
    text has no words. Where a template changes the words so that they are not found, it is all that follows the last picture.
    """

    text: str
    instruction: tuple[int, int]


@dataclass(frozen=True)
class TurnSpans:
    """Where a turn is in a conversation's text.

    instruction  the span of the user's own words, as in `Prompt`
    asked        where the prompt for the answer ends
    ended        where the answer ends, with the token that ends it
    """

    instruction: tuple[int, int]
    asked: int
    ended: int


def detect_template(tokenizer: Tokenizer | None, text_model_type: str) -> str:
    """The name of the template that fits a folder's vocabulary, or else its `text_config.model_type`."""
    if tokenizer is not None and tokenizer.token_id("<|start_header_id|>") is not None:
        return "llama3"
    if tokenizer is not None and tokenizer.token_id("<|im_start|>") is not None:
        return "chatml"
    return "mistral" if text_model_type == "mistral" else "vicuna"


def encode_prompt(tokenizer: Tokenizer, text: str) -> Encoding:
    """Tokenize what a template wrote. If it begins with the BOS token itself, the tokenizer adds no special tokens."""
    bos = tokenizer.special_tokens.get("bos_token")
    return tokenizer.encode(text, special=not (bos and text.startswith(bos)))


def build_prompt(question: str, num_images: int, template: Template) -> Prompt:
    """Put `question` into a template, with one `<image>` for each picture.

    A question without `<image>` gets the pictures in front. One that has some keeps their places, as far as the folder's
    template keeps them. The template "raw" takes the text as it stands and adds nothing. Raises InputError for an unknown
    template, for a question without words, and when there are not as many places as pictures.
    """
    writer = _writer(template)
    messages = [{"role": "user", "content": writer.content(question, num_images)}]
    text, spans = writer.write(messages, num_images)
    if spans is None:
        begin = text.rfind(IMAGE) + len(IMAGE) if IMAGE in text else 0
        return Prompt(text, _words(text, begin, len(text)))
    return Prompt(text, _words(text, spans[0][0][0], spans[0][-1][1]))


def build_conversation(
    turns: Sequence[tuple[str, int, str]], template: Template, ends: Sequence[str], end: str | None
) -> tuple[str, list[TurnSpans]]:
    """Turns, each (question, number of its pictures, answer) → the text to train on, and each turn's place in it.

    The template writes the text, with one addition. `ends` are the tokens that end an answer in generation. If none of them
    follows an answer, `end` is put there, in place of white space. The hub's template for Vicuna, for one, writes no such token,
    and a model that is never shown where to end never does. Raises InputError, also for a template whose conversation does not
    begin with the prompt for its answer.
    """
    writer = _writer(template)
    messages = []
    for question, num_images, answer in turns:
        messages.append({"role": "user", "content": writer.content(question, num_images)})
        messages.append({"role": "assistant", "content": writer.answer(answer)})
    text, spans = writer.write(messages, sum(count for _, count, _ in turns))
    if spans is None:
        raise InputError(f"template: {writer.name} changes a conversation's words: expected one that keeps them")
    leads, built, done = writer.frame(messages).leads, "", 0
    found = []
    for number, (asking, answering) in enumerate(zip(spans[::2], spans[1::2], strict=True)):
        shift = len(built) - done
        first, last = _words(text, asking[0][0], asking[-1][1])
        asked, ended = answering[0][0] - leads[number], answering[-1][1]
        next_turn = spans[2 * number + 2][0][0] if number + 1 < len(turns) else len(text)
        places = [(text.find(token, ended, next_turn), token) for token in ends]
        place, token = min(((place, token) for place, token in places if place >= 0), default=(ended, ""))
        built += text[done : place + len(token)]
        done = place + len(token)
        if not token:
            if end is None:
                raise InputError(f"model: its tokenizer has no token that ends a turn of {writer.name}")
            built += end
            done = next_turn - len(text[done:next_turn].lstrip())
        found.append(TurnSpans((first + shift, last + shift), asked + shift, len(built)))
    return built + text[done:], found


def _words(text: str, begin: int, end: int) -> tuple[int, int]:
    """The span of the words between `begin` and `end`: see `Prompt`."""
    words = text[begin:end].replace(IMAGE, " " * len(IMAGE))
    last = len(words.rstrip())
    first = min(len(words) - len(words.lstrip()), last)
    return begin + first, begin + last


def check_name(template: object) -> None:
    """Raises InputError if `template` is not the name of one of TEMPLATES."""
    arguments.choice("template", template, tuple(TEMPLATES))


def _writer(template: Template) -> TemplateWriter:
    if not isinstance(template, ChatTemplate):
        check_name(template)
    return _known_writer(template)


@lru_cache(maxsize=64)
def _known_writer(template: Template) -> TemplateWriter:
    if isinstance(template, str):
        return TemplateWriter(repr(template), partial(_render_named, template), parts=False, raw=template == "raw")
    return TemplateWriter(template.place, template.render)
