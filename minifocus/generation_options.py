"""How an answer is decoded. The caller's options come first, then generation_config.json, then greedy and 256 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict

from . import arguments
from .constraints import Constraints
from .errors import InputError
from .inputs.prompt import check_name
from .loading.generation_config import GenerationConfig


class GenerationOptions(TypedDict, total=False):
    """The fields of `Options`, for editors to complete."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    template: str | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    min_new_tokens: int | None


@dataclass(frozen=True)
class Options:
    """
    max_new_tokens  at most this many tokens per answer; None: what generation_config.json says, or else 256
    temperature     0: always the likeliest token; above: sample from softmax(logits / temperature). What the folder's
                    generation_config.json says of sampling does not count
    top_p           sample only from the likeliest tokens that together have this probability
    seed            of the sampling; each row draws from its own generator, so that a batch gives what single calls give
    template        a name in `minifocus.inputs.prompt.TEMPLATES`; None: the model's own
    repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens, begin_suppress_tokens, min_new_tokens
                    see `minifocus.constraints.Constraints`; None: what generation_config.json says
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    template: str | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    min_new_tokens: int | None = None

    @classmethod
    def of(cls, given: GenerationOptions) -> Options:
        """Options by name. Raises InputError for an unknown name and a value out of range."""
        known = cls.__dataclass_fields__
        if unknown := set(given) - set(known):
            listed = ", ".join(sorted(unknown))[:100]
            raise InputError(f"{listed}: not an option of generation; its options: {', '.join(known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "temperature": arguments.number("temperature", self.temperature, 0),
            "top_p": arguments.share("top_p", self.top_p),
        }
        if self.max_new_tokens is not None:
            checked["max_new_tokens"] = arguments.whole("max_new_tokens", self.max_new_tokens, 1)
        if self.seed is not None:
            checked["seed"] = arguments.whole("seed", self.seed, -(2**63))
        if self.template is not None:
            check_name(self.template)
        arguments.settle(self, **checked)

    def constraints(self, of_folder: GenerationConfig, prompt_length: int) -> Constraints:
        """The constraints that were given; for the others the folder's, for a prompt of this length."""
        given = {field.name: getattr(self, field.name) for field in fields(Constraints)}
        given = {name: value for name, value in given.items() if value is not None}
        least = max(of_folder.min_length - prompt_length, of_folder.constraints.min_new_tokens)
        return replace(of_folder.constraints, **{"min_new_tokens": least, **given})

    def longest(self, of_folder: GenerationConfig, prompt_length: int) -> int:
        """How many tokens an answer to a prompt of so many may have. Raises InputError where the folder leaves none."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if of_folder.max_new_tokens is not None or of_folder.max_length is None:
            return of_folder.max_new_tokens or 256
        if of_folder.max_length <= prompt_length:
            raise InputError(
                f"prompt: expected fewer tokens than the folder's max_length of {of_folder.max_length}, got {prompt_length} "
                "with those of its pictures: give max_new_tokens instead"
            )
        return of_folder.max_length - prompt_length
