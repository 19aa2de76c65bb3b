"""Writing messages with a template, and finding their texts in what it wrote.

A template may put anything around the texts, and may change them. What it puts around them is found by rendering marks in place
of the texts, once for each form of messages. The form is how many messages there are, and of which parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arguments import shown
from ..errors import CheckpointError, InputError
from .chat_template import Message, TemplateFails

IMAGE = "<image>"
PLACE = re.compile(rf"{IMAGE}(?:[ \t]*\n)?")  # the end of its line goes with it
_MOST_FRAMES = 1000
_PICTURE = {"type": "image", "image": "<Image>"}  # as transformers shows a template a picture


@dataclass
class TemplateWriter:
    """A template, and what was found out about it.

    name    its name in errors
    render  (messages, whether to end with the prompt for an answer) → text
    parts   True: a message's content is a list of parts; False: it is text with `<image>` in it; None: not known yet
    raw     whether the text is the question itself, with nothing added
    frames  what it writes around the texts, by the form of the messages
    """

    name: str
    render: Callable[[Sequence[Message], bool], str]
    parts: bool | None = None
    raw: bool = False
    frames: dict[Any, Frame] = field(default_factory=dict)

    def content(self, question: str, num_images: int) -> Any:
        """The content of the message that asks `question` about its pictures. Raises InputError where they do not fit."""
        if not question or not (question.replace(IMAGE, "").strip() or self.raw):
            raise InputError(f"prompt: expected a question, got {shown(question)}")
        places = question.count(IMAGE)
        if places != num_images and (places or self.raw):
            raise InputError(f"prompt: expected one {IMAGE} for each of {num_images} pictures, got {places} of them")
        if not self.takes_parts():
            return question if places else f"{IMAGE}\n" * num_images + question
        if not places:
            return [_PICTURE] * num_images + [_text(question)]
        first, *others = PLACE.split(question)
        pieces = [_text(first), *(part for piece in others for part in (_PICTURE, _text(piece)))]
        return [part for part in pieces if part is _PICTURE or part["text"].strip()]

    def answer(self, answer: str) -> Any:
        """The content of the message that answers."""
        return [_text(answer)] if self.takes_parts() else answer

    def takes_parts(self) -> bool:
        """Whether contents are lists of parts. A language model's template may take only text, with `<image>` in it."""
        if self.parts is None:
            self.parts = self._takes_parts()
        return self.parts

    def _takes_parts(self) -> bool:
        mark = _mark(0)
        fault: TemplateFails | InputError | None = None
        for places in (1, 0):  # a template without places for pictures still serves questions without any
            for parts in (True, False):
                content = [*[_PICTURE] * places, _text(mark)] if parts else f"{IMAGE}\n" * places + mark
                try:
                    text = self.render([{"role": "user", "content": content}], True)
                except (TemplateFails, InputError) as error:
                    fault = fault or error
                    continue
                # A template that expects text may write out the list itself.
                if mark in text and text.count(IMAGE) == places and "'type'" not in text and '"type"' not in text:
                    return parts
        raise fault or CheckpointError(f"{self.name}: expected a chat template that writes the question")

    def write(self, messages: list[Message], num_images: int) -> tuple[str, list[list[tuple[int, int]]] | None]:
        """The text of the messages, and the spans of each one's texts in it: None if they cannot be found."""
        text = self.render(messages, messages[-1]["role"] == "user")
        if text.count(IMAGE) != num_images:
            raise InputError(
                f"template: {self.name} has {text.count(IMAGE)} places for pictures, expected {num_images} of them"
            )
        texts = [_texts(message) for message in messages]
        values = [value for own in texts for value in own]
        spans = self.frame(messages).find(text, values)
        if spans is None:  # what is around them may have changed: a template can write the date
            self.frames.clear()
            spans = self.frame(messages).find(text, values)
        if spans is None:
            return text, None
        places = iter(spans)
        return text, [[next(places) for _ in own] for own in texts]

    def frame(self, messages: list[Message]) -> Frame:
        """What the template writes around the texts of messages of this form."""
        form = tuple(tuple(part["type"] for part in m["content"]) if self.parts else () for m in messages)
        frame = self.frames.get(form)
        if frame is None:
            if len(self.frames) >= _MOST_FRAMES:
                self.frames.clear()
            frame = self.frames[form] = self._frame(messages)
        return frame

    def _frame(self, messages: list[Message]) -> Frame:
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
        text = self.render(marked, messages[-1]["role"] == "user")
        literals, at = [], 0
        for mark in marks:
            place = text.find(mark, at)
            if place < 0:
                raise InputError(f"template: {self.name} leaves out words: expected one that writes all of them")
            literals.append(text[at:place])
            at = place + len(mark)
        leads = []
        for number in range(1, len(messages), 2):
            prompt = self.render(marked[:number], True)
            if not text.startswith(prompt):
                raise InputError(
                    f"template: {self.name} asks with a prompt that a conversation does not go on from: expected one "
                    "that only adds to it"
                )
            leads.append(text.index(_texts(marked[number])[0]) - len(prompt))
        return Frame([*literals, text[at:]], leads)


@dataclass(frozen=True)
class Frame:
    """What a template writes around the texts of messages of one form.

    literals  before the first text, between one and the next, and after the last
    leads     per answer, how many characters stand between the prompt for it and the answer
    """

    literals: list[str]
    leads: list[int]

    def find(self, text: str, values: Sequence[str]) -> list[tuple[int, int]] | None:
        """The spans of `values` in a text that the template wrote. They may have lost white space at their ends.

        A single value may be changed in any way. None if the text does not fit this frame.
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


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _texts(message: Message) -> list[str]:
    """The texts of a message's content."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _mark(number: int) -> str:
    """A mark in place of a text: digits, which no template splits or changes."""
    return f"5061{number:06}7394"
