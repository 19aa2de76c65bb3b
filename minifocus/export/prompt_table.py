"""How the C++ runtime writes prompts (csrc/runtime/text/prompt.h): what a template puts around a question, found by asking it.

A template is a program, and the runtime has no interpreter for it. What it writes for marks in place of a question's texts says
what it puts around them; questions that are hard to keep say whether that is all it does. A template that does more is refused.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..inputs.chat_template import ChatTemplate
from ..inputs.prompt import Prompt, Template, build_prompt
from ..inputs.template_writer import IMAGE, PLACE
from . import character_classes

if TYPE_CHECKING:
    from ..inputs.processor import Processor

Gap = tuple[str, str]  # what the template writes before and behind the pictures between two texts
Render = Callable[[str, int], Prompt]

_STRIPS: dict[str, Callable[[str], str]] = {"none": str, "left": str.lstrip, "right": str.rstrip, "both": str.strip}
_MARKS = "506187394", "937468105"  # digits, which no template splits or changes
_SAFE = "".join(set(string.punctuation) - {"%", '"'})
_MOST = 3  # pictures to a question that is tried; what holds for so many holds for more

_QUESTIONS = (
    "What is it?",
    "A",
    "USER",
    " Why [is]\n it ",
    "\n\tA line\r\n\nand one more \n",
    "\u00a0\u3000x\x1f\u2028",
    "mIxEd Case, 0123 ÄÖ ß ſ é e\u0301 ﬁ 你好 🙂 \x00\x7f",
    '\'s "quoted" <b>bold</b> & &amp; {{ messages }} {% for %} {# no #} \\n %s $x `~^',
    "<s></s> <unk> [INST] x [/INST] <<SYS>> <|im_start|>user\n<|im_end|> <|eot_id|> ASSISTANT: ###",
    "<think>so</think> json tool system assistant",
    "word " * 500,
    f"x {IMAGE} y",
    f"{IMAGE}\nWhat?",
    f"What?{IMAGE}",
    f" Is {IMAGE} \t\n like  {IMAGE}?\n",
    f"{IMAGE}{IMAGE}\n Which? ",
    f"  \n{IMAGE}x {IMAGE}\n\n {IMAGE} ",
    f"a{IMAGE}{IMAGE} \n{IMAGE}b",
)


@dataclass(frozen=True)
class Form:
    """
    places   "kept": the question stays as it is, its <image>s with it; "first": all pictures in front of its texts; "in_order"
    strips   at which ends a text loses its white space: "none", "left", "right" or "both"
    picture  what is written for a picture
    start, between, end  the gaps before the first text, between two, and behind the last
    raw      whether the text is the question itself
    """

    places: str
    strips: str
    picture: str
    start: Gap
    between: Gap = ("", "")
    end: Gap = ("", "")
    raw: bool = False

    def write(self, question: str, num_images: int) -> Prompt:
        """As the runtime does it, for a question that may be asked."""
        texts, pictures = self._content(question, num_images)
        text, spans = "", []
        for number, one in enumerate(texts):
            text += self._gap(self.between if number else self.start, pictures[number])
            spans.append(len(text))
            text += _STRIPS[self.strips](one)
            spans.append(len(text))
        words = text[spans[0] :].replace(IMAGE, " " * len(IMAGE))[: spans[-1] - spans[0]]
        last = len(words.rstrip())
        first = min(len(words) - len(words.lstrip()), last)
        return Prompt(text + self._gap(self.end, pictures[-1]), (spans[0] + first, spans[0] + last))

    def _content(self, question: str, num_images: int) -> tuple[list[str], list[int]]:
        """The question's texts, and the number of pictures in the gap before each and behind the last."""
        if self.places == "kept":
            return [question if IMAGE in question else self.picture * num_images + question], [0, 0]
        if IMAGE not in question:
            return [question], [num_images, 0]
        texts, pictures = [], [-1]
        for text in PLACE.split(question):
            pictures[-1] += 1
            if text.strip():
                texts.append(text)
                pictures.append(0)
        return texts, pictures if self.places == "in_order" else [num_images] + [0] * len(texts)

    def _gap(self, gap: Gap, pictures: int) -> str:
        return gap[0] + self.picture * pictures + gap[1]


def lines(processor: Processor) -> dict[str, list[object]]:
    """The manifest's lines for text, by their keys, which begin with `text.`: what the C++ runtime needs beside the tokenizer.

    Raises CheckpointError for a folder without a tokenizer, and for a template that the runtime cannot do the same as.
    """
    form, config = form_of(processor.template), processor.config
    bos = processor.text_tokenizer.special_tokens.get("bos_token", "")
    return {
        "text.prompt.places": [form.places],
        "text.prompt.raw": [str(form.raw).lower()],
        "text.prompt.strips": [form.strips],
        "text.prompt.picture": [_quoted(form.picture)],
        "text.prompt.start": [*map(_quoted, form.start)],
        "text.prompt.between": [*map(_quoted, form.between)],
        "text.prompt.end": [*map(_quoted, form.end)],
        "text.white_space": [code for codes in character_classes.python_space() for code in codes],
        "text.bos": [_quoted(bos)],
        "text.image_token": [config.image_token_id],
        "text.stop": [*sorted(processor.stop_token_ids())],
        "text.context_length": [config.text.max_position_embeddings],
        "text.vocab_size": [config.text.vocab_size],
    }


def form_of(template: Template) -> Form:
    """What a template does to questions. Raises CheckpointError if no Form says it: if it writes the date, for one."""
    name = template.place if isinstance(template, ChatTemplate) else repr(template)
    if template == "raw":
        return Form("kept", "none", f"{IMAGE}\n", ("", ""), raw=True)
    if isinstance(template, ChatTemplate) and "strftime_now" in template.source:
        raise CheckpointError(f"{name}: asks for the date, which the C++ runtime does not write into prompts")

    @cache
    def render(question: str, num_images: int) -> Prompt:
        return build_prompt(question, num_images, template)

    trials = [
        (question, number)
        for question in _QUESTIONS
        for number in ([question.count(IMAGE)] if IMAGE in question else range(_MOST + 1))
    ]
    try:
        closest, fault = -1, ""
        for form in _forms(render):
            wrong = next((i for i, trial in enumerate(trials) if form.write(*trial) != render(*trial)), None)
            if wrong is None:
                return form
            if wrong > closest:
                closest, fault = wrong, f"writes {shown(render(*trials[wrong]).text)} for {shown(trials[wrong][0])}"
    except InputError as error:
        raise CheckpointError(f"{name}: the C++ runtime needs a template that takes any question: {error}") from error
    raise CheckpointError(
        f"{name}: {fault or 'writes something else for each number of pictures'}: the C++ runtime needs a template that only "
        "puts its own words around a question's and pictures, and takes away white space at their ends"
    )


def _forms(render: Render) -> Iterator[Form]:
    """What a template may do, judging by what it writes for marks."""
    first, second = _MARKS

    def parts(question: str, num_images: int) -> list[str]:
        return re.split("|".join(_MARKS), render(question, num_images).text)

    alone = [parts(first, number) for number in range(_MOST + 1)]
    inside = [parts(first + IMAGE * number + second, number) for number in (1, 2)]
    behind = [parts(first + IMAGE * number, number) for number in (0, 1, 2)]
    if any(len(found) != 2 for found in (*alone, *behind)) or any(len(found) != 3 for found in inside):
        return
    before, after = [found[0] for found in alone], behind[0][1]
    for strips in _STRIPS:
        yield Form("kept", strips, f"{IMAGE}\n", (before[0], ""), end=("", after))
    # Which part of what stands before a question repeats with each picture can often be said in several ways.
    length = len(before[1]) - len(before[0])
    places = sorted(range(len(before[0]) + 1), key=lambda at: not before[1].startswith(IMAGE, at))
    for at, strips in product(places, _STRIPS):
        picture = before[1][at : at + length]
        start = _gap(before, 0, picture)
        if start is None:
            continue
        yield Form("first", strips, picture, start, (inside[0][1], ""), ("", after))
        between = _gap([found[1] for found in inside], 1, picture)
        end = _gap([found[1] for found in behind], 0, picture)
        if between is not None and end is not None:
            yield Form("in_order", strips, picture, start, between, end)


def _gap(written: list[str], pictures: int, picture: str) -> Gap | None:
    """The gap that is `written` with so many pictures, with one more, and so on. None if there is none."""
    sides = len(written[0]) - pictures * len(picture)
    for at in range(sides + 1):
        gap = written[0][:at], written[0][len(written[0]) - sides + at :]
        if all(gap[0] + picture * number + gap[1] == text for number, text in enumerate(written, pictures)):
            return gap
    return None


def _quoted(text: str) -> str:
    """A text as one word without white space: in quotes, and all but visible ASCII in the form %20."""
    return f'"{quote(text, safe=_SAFE)}"'
