"""generation_config.json: how a folder wants its answers decoded. The log names the settings that are not followed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import arguments
from ..arguments import shown
from ..constraints import Constraints
from ..errors import CheckpointError, InputError
from ..files.reading import present
from .json_fields import JsonFields

_CONSTRAINTS = tuple(one.name for one in fields(Constraints))
_LENGTHS = ("max_new_tokens", "max_length", "min_length")
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)
_EXACT_CACHES = (
    *("dynamic", "offloaded", "static", "offloaded_static", "paged"),
    *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)
# Keys that change transformers' answers and are not followed here: the values that change nothing, and what is lost otherwise.
_LOST: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "beam search"),
    "num_beam_groups": ((1,), "diverse beam search"),
    "penalty_alpha": ((0,), "contrastive search"),
    "dola_layers": ((), "contrast between layers (DoLa)"),
    "guidance_scale": ((1,), "classifier-free guidance"),
    "sequence_bias": ((), "biases on runs of tokens"),
    "constraints": (([],), "words that have to be said"),
    "force_words_ids": (([],), "words that have to be said"),
    "encoder_repetition_penalty": ((1,), "the penalty on what the prompt does not hold"),
    "encoder_no_repeat_ngram_size": ((0,), "the ban on runs of the prompt's tokens"),
    "forced_bos_token_id": ((), "a first token that is always the same"),
    "forced_eos_token_id": ((), "a last token that is always the same"),
    "exponential_decay_length_penalty": ((), "a growing pull towards the answer's end"),
    "remove_invalid_values": ((False,), "the replacement of logits that are not finite"),
    "stop_strings": (([],), "strings that end an answer"),
    "max_time": ((), "a limit on time"),
    "watermarking_config": ((), "a watermark"),
    "token_healing": ((False,), "token healing"),
    "num_return_sequences": ((1,), "several answers to a question"),
    "cache_implementation": (_EXACT_CACHES, "a quantised cache"),
}

_log = logging.getLogger("minifocus")


@dataclass(frozen=True)
class GenerationConfig:
    """
    constraints     penalties and bans, see `Constraints`
    min_length      the least number of tokens of prompt and answer; 0 where min_new_tokens is given instead
    max_new_tokens  the most tokens of an answer; None: not limited by this
    max_length      the most tokens of prompt and answer; None: not limited by this
    eos_token_ids   the tokens that end an answer
    """

    constraints: Constraints = field(default_factory=Constraints)
    min_length: int = 0
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def read_generation_config(folder: Path, top: JsonFields, text: JsonFields) -> GenerationConfig:
    """Read `folder`/generation_config.json. Without one, read config.json: its fields `top` and its text_config `text`.

    The stop tokens come from the first of the three that has any. Raises CheckpointError, which names file and key.
    """
    file = folder / "generation_config.json"
    own = JsonFields.of_file(file) if present(file) else None
    # Older versions of transformers wrote their defaults into text_config, a max_length of 20 among them.
    legacy = {**{key: value for key, value in text.members.items() if key != "max_length"}, **_given(top.members)}
    found, where = (_given(legacy), top.where) if own is None else (_given(own.members), own.where)
    try:
        constraints = Constraints(**{key: found[key] for key in _CONSTRAINTS if key in found})
        lengths = {key: arguments.whole(key, found[key], key != "min_length") for key in _LENGTHS if key in found}
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if "min_new_tokens" in found:
        lengths.pop("min_length", None)
    _say_what_is_lost(where, found)
    eos = next((_token_ids(f) for f in (own, top, text) if f is not None and f.given("eos_token_id")), ())
    return GenerationConfig(constraints=constraints, eos_token_ids=eos, **lengths)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _say_what_is_lost(where: str, found: dict[str, Any]) -> None:
    if found.get("do_sample", False) is not False:
        asked = ", ".join(f"{key} {shown(found[key])}" for key in _SAMPLING if key in found)
        _log.warning("%s: asks for %s: answers are greedy, unless generate() is given a temperature", where, asked)
    for key, (nothing, lost) in _LOST.items():
        if key in found and found[key] not in nothing:
            _log.warning("%s: %s %s is not followed: answers are without %s", where, key, shown(found[key]), lost)


def _token_ids(fields: JsonFields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    fields.check("eos_token_id", all(type(token) is int for token in ids), "a token number or a list of them")
    return tuple(ids)
