"""Penalties and bans on the next token. They equal transformers' logits processors of the same names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import arguments
from .errors import InputError


@dataclass(frozen=True)
class Constraints:
    """The tokens that came before are those of the prompt and of the answer so far. Each image placeholder counts as one.

    repetition_penalty     above 0: of every token that came before, a positive logit is divided by it and a negative one
                           multiplied; 1 changes nothing
    no_repeat_ngram_size   no run of this many tokens may come twice; 0: no such ban
    bad_words_ids          runs of tokens that may not be completed; a run that is one stop token is ignored
    suppress_tokens        tokens that may not be generated; numbers outside the vocabulary are ignored
    begin_suppress_tokens  tokens that may not come first in the answer
    min_new_tokens         no stop token before the answer has this many tokens
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        words = arguments.sequence("bad_words_ids", self.bad_words_ids, "a list of lists of token numbers")
        checked: dict[str, Any] = {
            "repetition_penalty": arguments.number("repetition_penalty", self.repetition_penalty, 0, above=True),
            "no_repeat_ngram_size": arguments.whole("no_repeat_ngram_size", self.no_repeat_ngram_size, 0),
            "bad_words_ids": tuple(arguments.whole_numbers("bad_words_ids", word, 0) for word in words),
            "min_new_tokens": arguments.whole("min_new_tokens", self.min_new_tokens, 0),
        }
        if not all(checked["bad_words_ids"]):
            raise InputError("bad_words_ids: expected at least one token in each list, got an empty list")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            checked[name] = arguments.whole_numbers(name, getattr(self, name), -arguments.LARGEST)
        arguments.settle(self, **checked)

    def apply(
        self, logits: torch.Tensor, prompt: Sequence[int], answer: Sequence[int], stop_ids: Collection[int]
    ) -> torch.Tensor:
        """The next token's logits [V], float32 on the CPU, after these constraints: -inf where a token is banned.

        Raises InputError where every token is banned.
        """
        if self == _NONE:
            return logits
        before = torch.tensor([*prompt, *answer])
        if self.repetition_penalty != 1:
            said = before.unique()
            own = logits[said]
            scaled = torch.where(own < 0, own * self.repetition_penalty, own / self.repetition_penalty)
            logits = logits.index_copy(0, said, scaled)
        banned = self._banned(before, len(answer), stop_ids)
        if banned:
            logits = logits.index_fill(
                0, torch.tensor([token for token in banned if 0 <= token < len(logits)]), -torch.inf
            )
            if bool(logits.isneginf().all()):
                raise InputError(f"expected a token that may be said next, got constraints that ban each one: {self}")
        return logits

    def _banned(self, before: torch.Tensor, said: int, stop_ids: Collection[int]) -> set[int]:
        banned = set(self.suppress_tokens)
        if said == 0:
            banned.update(self.begin_suppress_tokens)
        if said < self.min_new_tokens:
            banned.update(stop_ids)
        size = self.no_repeat_ngram_size
        if 0 < size <= len(before):
            runs = before.unfold(0, size, 1)
            begun = before[len(before) - size + 1 :]
            banned.update(runs[(runs[:, :-1] == begun).all(dim=1), -1].tolist())
        for word in self.bad_words_ids:
            *begin, last = word
            came = before[len(before) - len(begin) :].tolist() if len(begin) <= len(before) else None
            if came == begin and not (len(word) == 1 and last in stop_ids):
                banned.add(last)
        return banned


_NONE = Constraints()
