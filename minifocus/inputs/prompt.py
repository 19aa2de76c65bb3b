"""The user's question → the text that a model was trained to answer; and a conversation → the text that it is trained on.

A folder's own chat template says what that is (`chat_template.py`). A folder without one is asked in the named template
that its vocabulary, or else its decoder, is usually trained with; `template=` names one for any folder.

The named templates are the hub's, with two exceptions. "chatml" has the system's words that LLaVA-1.6-34B was trained with,
which the hub's leaves out. "vicuna_v1" is for asking: LLaVA and its published scores have the system's words in front of
Vicuna's prompt, which the hub's ("vicuna") leaves out. None holds a BOS token: the tokenizer puts it in front.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..arguments import shown
from ..errors import CheckpointError, InputError
from .chat_template import ChatTemplate, Message, TemplateFails

if TYPE_CHECKING:
    from .tokenizer import Encoding, Tokenizer

IMAGE = "<image>"
_PLACE = re.compile(rf"{IMAGE}(?:[ \t]*\n)?")  # the end of its line goes with it


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

_ANSWERS = dict.fromkeys(("vicuna", "vicuna_v1", "mistral"), " {answer}")  # else the answer follows at once
_TURN_ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}  # else nothing of the template's own
# What follows the system's words, which a conversation has once.
_TURN_BEGINS = {"vicuna_v1": "USER: ", "chatml": "<|im_start|>user\n"}


@dataclass(frozen=True)
class _NamedTemplate:
    """One of TEMPLATES, to be used as a `ChatTemplate` is."""

    name: str

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Messages whose content is text. A prompt to go on from is a part of each question."""
        before, _, after = TEMPLATES[self.name].partition("{question}")
        begin = _TURN_BEGINS.get(self.name, before)
        text = before.removesuffix(begin)
        for message in messages:
            if message["role"] == "user":
                text += begin + message["content"] + after
            else:
                answer = _ANSWERS.get(self.name, "{answer}").replace("{answer}", message["content"])
                text += answer + _TURN_ENDS.get(self.name, "")
        return text


Template = str | ChatTemplate  # the name of one of TEMPLATES, or a folder's own


@dataclass(frozen=True)
class Prompt:
    """`instruction` is the span of the user's own words in `text`: without white space and `<image>` at either end.

    An `<image>` between the words stays inside the span. It is empty when a raw text has no words. Where a template changes
    the words beyond recognition, it is all that follows the last picture.
    """

    text: str
    instruction: tuple[int, int]


@dataclass(frozen=True)
class TurnSpans:
    """Where a turn is in a conversation's text.

    instruction  the span of the user's own words, as in `Prompt`
    asked        where the prompt ends that asks for the answer
    ended        where the token ends that ends the answer
    """

    instruction: tuple[int, int]
    asked: int
    ended: int


def detect_template(tokenizer: Tokenizer | None, text_model_type: str) -> str:
    """The name of the template that a folder's vocabulary, or else its `text_config.model_type`, stands for."""
    if tokenizer is not None and tokenizer.token_id("<|start_header_id|>") is not None:
        return "llama3"
    if tokenizer is not None and tokenizer.token_id("<|im_start|>") is not None:
        return "chatml"
    return "mistral" if text_model_type == "mistral" else "vicuna"


def encode_prompt(tokenizer: Tokenizer, text: str) -> Encoding:
    """A template's text as tokens. One that writes its BOS token itself gets no special tokens from the tokenizer."""
    bos = tokenizer.special_tokens.get("bos_token")
    return tokenizer.encode(text, special=not (bos and text.startswith(bos)))


def build_prompt(question: str, num_images: int, template: Template) -> Prompt:
    """Put `question` into a template, with one `<image>` for each picture.

    A question without `<image>` gets the pictures in front; one that has some keeps its own places, as far as the folder's
    template does. The template "raw" takes the text as it stands and adds nothing. Raises InputError for an unknown
    template, for a question without words, and when the places are not as many as the pictures.
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
    """The text of turns, each (question, its number of pictures, answer), to train on, and where they are in it.

    It is what the template makes of them, but for one thing: where none of `ends`, the tokens that end an answer when it is
    made, follows an answer, `end` does, in place of the white space there. The hub's template for Vicuna, for one, writes
    nothing there, and a model that is never shown where to end never does. Raises InputError, also for a template that
    does not go on from the prompt that it asks with.
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
    """The span of the words from `begin` to `end`: see `Prompt`."""
    words = text[begin:end].replace(IMAGE, " " * len(IMAGE))
    last = len(words.rstrip())
    first = min(len(words) - len(words.lstrip()), last)
    return begin + first, begin + last


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the texts of messages of one form.

    literals  before the first text, between one and the next, and after the last
    leads     per answer, how many of the characters before it are not of the prompt that asks for it
    """

    literals: list[str]
    leads: list[int]

    def find(self, text: str, values: Sequence[str]) -> list[tuple[int, int]] | None:
        """Where `values` are in what a template has written, as they are or without white space around them.

        A single one may be changed in any way. None where the text is not made so.
        """
        start, end = len(self.literals[0]), len(text) - len(self.literals[-1])
        if start > end or not (text.startswith(self.literals[0]) and text.endswith(self.literals[-1])):
            return None
        spans, at = [], start
        for value, literal in zip(values, self.literals[1:], strict=True):
            options = dict.fromkeys((value, value.strip(), value.lstrip(), value.rstrip()))
            own = next((own for own in options if text.startswith(own + literal, at)), None)
            if own is None:
                return [(start, end)] if len(values) == 1 else None
            spans.append((at, at + len(own)))
            at += len(own) + len(literal)
        return spans if at == len(text) else None


@dataclass
class _Writer:
    """A template, and what was found out about it with marks for words: no template takes a row of digits apart."""

    name: str
    template: _NamedTemplate | ChatTemplate
    frames: dict[Any, _Frame] = field(default_factory=dict)
    parts: bool | None = None

    def content(self, question: str, num_images: int) -> Any:
        """The content of the message that asks `question`, with its pictures. Checks both."""
        raw = self.template == _NamedTemplate("raw")
        if not question or not (question.replace(IMAGE, "").strip() or raw):
            raise InputError(f"prompt: expected a question, got {shown(question)}")
        places = question.count(IMAGE)
        if places != num_images and (places or raw):
            raise InputError(f"prompt: expected one {IMAGE} for each of {num_images} pictures, got {places} of them")
        if not self.takes_parts():
            return question if places else f"{IMAGE}\n" * num_images + question
        if not places:
            return [_PICTURE] * num_images + [_text(question)]
        first, *others = _PLACE.split(question)
        pieces = [_text(first), *(part for piece in others for part in (_PICTURE, _text(piece)))]
        return [part for part in pieces if part is _PICTURE or part["text"].strip()]

    def answer(self, answer: str) -> Any:
        return [_text(answer)] if self.takes_parts() else answer

    def takes_parts(self) -> bool:
        """Whether contents are lists of parts. The template of a language model may take text alone, with `<image>` in it."""
        if self.parts is None:
            self.parts = isinstance(self.template, ChatTemplate) and self._takes_parts()
        return self.parts

    def _takes_parts(self) -> bool:
        mark = _mark(0)
        fault: TemplateFails | InputError | None = None
        for places in (1, 0):  # a template without a place for pictures is good for questions about none
            for parts in (True, False):
                content = [*[_PICTURE] * places, _text(mark)] if parts else f"{IMAGE}\n" * places + mark
                try:
                    text = self.template.render([{"role": "user", "content": content}], True)
                except (TemplateFails, InputError) as error:
                    fault = fault or error
                    continue
                # Where text is expected, the list itself may be written out.
                if mark in text and text.count(IMAGE) == places and "'type'" not in text and '"type"' not in text:
                    return parts
        raise fault or CheckpointError(f"{self.name}: expected a chat template that writes the question")

    def write(self, messages: list[Message], num_images: int) -> tuple[str, list[list[tuple[int, int]]] | None]:
        """Messages as the template writes them, and for each where its texts are: None if they cannot be found."""
        text = self.template.render(messages, messages[-1]["role"] == "user")
        if text.count(IMAGE) != num_images:
            raise InputError(
                f"template: {self.name} has {text.count(IMAGE)} places for pictures, expected {num_images} of them"
            )
        texts = [_texts(message) for message in messages]
        values = [value for own in texts for value in own]
        spans = self.frame(messages).find(text, values)
        if spans is None:  # what stands around them may have changed: a template can ask for the date
            self.frames.clear()
            spans = self.frame(messages).find(text, values)
        if spans is None:
            return text, None
        places = iter(spans)
        return text, [[next(places) for _ in own] for own in texts]

    def frame(self, messages: list[Message]) -> _Frame:
        """What surrounds the texts of messages of this form."""
        form = tuple(tuple(part["type"] for part in m["content"]) if self.parts else () for m in messages)
        frame = self.frames.get(form)
        if frame is None:
            if len(self.frames) >= _MOST_FRAMES:
                self.frames.clear()
            frame = self.frames[form] = self._frame(messages)
        return frame

    def _frame(self, messages: list[Message]) -> _Frame:
        marked: list[Message] = []
        marks: list[str] = []
        for message in messages:
            own = [_mark(len(marks) + number) for number in range(len(_texts(message)))]
            marks += own
            content: Any = own[0]
            if self.parts:
                mine = iter(own)
                content = [part if part["type"] == "image" else _text(next(mine)) for part in message["content"]]
            marked.append({**message, "content": content})
        text = self.template.render(marked, messages[-1]["role"] == "user")
        literals, at = [], 0
        for mark in marks:
            place = text.find(mark, at)
            if place < 0:
                raise InputError(f"template: {self.name} leaves out words: expected one that writes all of them")
            literals.append(text[at:place])
            at = place + len(mark)
        leads = []
        for number in range(1, len(messages), 2):
            prompt = self.template.render(marked[:number], True)
            if not text.startswith(prompt):
                raise InputError(
                    f"template: {self.name} asks with a prompt that a conversation does not go on from: expected one "
                    "that only adds to it"
                )
            leads.append(text.index(_texts(marked[number])[0]) - len(prompt))
        return _Frame([*literals, text[at:]], leads)


_MOST_FRAMES = 1000
_PICTURE = {"type": "image", "image": "<Image>"}  # as transformers shows a template a picture


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _texts(message: Message) -> list[str]:
    """The texts of a message's content."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _mark(number: int) -> str:
    return f"5061{number:06}7394"


def check_name(template: object) -> None:
    """Raises InputError for what is not the name of one of TEMPLATES."""
    arguments.choice("template", template, tuple(TEMPLATES))


def _writer(template: Template) -> _Writer:
    if not isinstance(template, ChatTemplate):
        check_name(template)
    return _known_writer(template)


@lru_cache(maxsize=64)
def _known_writer(template: Template) -> _Writer:
    if isinstance(template, str):
        return _Writer(repr(template), _NamedTemplate(template), parts=False)
    return _Writer(template.place, template)
