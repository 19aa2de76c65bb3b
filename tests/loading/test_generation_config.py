"""generation_config.json and the options of the same names, against transformers' generate on small random models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import add_tokenizer, build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration

import minifocus
from minifocus.constraints import Constraints
from minifocus.loading import generation_config

STOP, QUESTION, TOKENS = 2, "What is it?", st.integers(0, 95)


class Both:
    """One folder in minifocus and in transformers, and their answers to one question about one picture."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, minifocus.load(folder, "none")
        self.oracle = LlavaForConditionalGeneration.from_pretrained(folder)
        self.picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
        assert self.model.image_processor is not None
        pixels, size = self.model.image_processor(self.picture)
        text = "USER: " + "<image>" * self.model.num_visual_tokens(size) + f"\n{QUESTION} ASSISTANT:"
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
        self.prompt_length = ids.shape[1]
        self.inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)

    def theirs(self, stops: tuple[int, ...] = (STOP,), **options: Any) -> list[int]:
        said: list[int] = self.oracle.generate(**self.inputs, **options)[0, self.prompt_length :].tolist()
        return said[:-1] if said and said[-1] in stops else said

    def ours(self, **options: Any) -> list[int]:
        return self.model.generate(self.picture, QUESTION, **options).token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build("llava", seed=11), tmp_path_factory.mktemp("llava"))
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> Both:
    return Both(folder)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_constraints_are_those_of_transformers(both: Both, data: st.DataObject) -> None:
    """Any mixture of them, on tokens that the answer would have and on others."""
    usual = both.ours(max_new_tokens=12)
    token = st.sampled_from(usual) | TOKENS
    runs = st.integers(0, 9).flatmap(lambda at: st.integers(1, 3).map(lambda size: usual[at : at + size]))
    words = st.lists(runs | st.lists(token, min_size=1, max_size=3), min_size=1, max_size=3)
    drawn = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "repetition_penalty": st.sampled_from([0.5, 1.0, 1.2, 3.0]),
                "no_repeat_ngram_size": st.integers(0, 3),
                "bad_words_ids": words,
                "suppress_tokens": st.lists(token | st.just(5000), max_size=4),
                "begin_suppress_tokens": st.lists(token, max_size=4),
                "min_new_tokens": st.integers(0, 12),
            },
        )
    )
    if STOP not in usual:  # have the answer end early unless it may not
        both.model.config = with_stops(both.model, (STOP, usual[3]))
    assert both.ours(max_new_tokens=12, **drawn) == both.theirs(
        (STOP, usual[3]), max_new_tokens=12, eos_token_id=[STOP, usual[3]], pad_token_id=0, **drawn
    )
    both.model.config = with_stops(both.model, (STOP,))


def with_stops(model: minifocus.Llava, stops: tuple[int, ...]) -> Any:
    from dataclasses import replace

    return replace(model.config, generation=replace(model.config.generation, eos_token_ids=stops))


def test_of_a_batch_each_row_has_its_own_past(both: Both) -> None:
    """Answers of a batch are those of single questions, padding or not."""
    prompts = ["What is it?", "Where is it, if it is anywhere at all?", "?"]
    limits = dict(max_new_tokens=12, repetition_penalty=1.7, no_repeat_ngram_size=2)
    batch = both.model.generate_batch([both.picture] * 3, prompts, **limits)
    assert [a.token_ids for a in batch] == [
        both.model.generate(both.picture, prompt, **limits).token_ids for prompt in prompts
    ]
    assert batch[0].token_ids != both.ours(max_new_tokens=12)


def test_sampling_never_draws_what_is_banned(both: Both) -> None:
    allowed = {7, 8, 9}
    banned = sorted(set(range(96)) - allowed)
    said = [t for s in range(5) for t in both.ours(max_new_tokens=8, temperature=5.0, seed=s, suppress_tokens=banned)]
    assert set(said) == allowed


FOLLOWED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"min_length": 60},
    {"max_new_tokens": 3},
    {"max_length": 50},
    {"max_length": 50, "max_new_tokens": 5},
]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "text_config"])
@pytest.mark.parametrize("asked", FOLLOWED, ids=str)
def test_a_folder_s_own_are_followed(
    folder: Path, tmp_path: Path, both: Both, asked: dict[str, Any], where: str
) -> None:
    """Where there is no generation_config.json, older folders say it in config.json."""
    if where == "text_config" and "max_length" in asked:
        return  # what older versions wrote there by default is not followed: no answer would have had room
    usual = both.ours(max_new_tokens=12)
    asked = {"eos_token_id": [STOP, usual[3]], "pad_token_id": 0, **asked}
    other = copy_with(folder, tmp_path, asked, where)
    ours, theirs = minifocus.load(other, "none"), LlavaForConditionalGeneration.from_pretrained(other)
    limit = {} if "max_length" in asked or "max_new_tokens" in asked else {"max_new_tokens": 12}
    said = theirs.generate(**both.inputs, **limit)[0, both.prompt_length :].tolist()
    said = said[:-1] if said[-1] in (STOP, usual[3]) else said
    assert ours.generate(both.picture, QUESTION, **limit).token_ids == said
    if "min_length" not in asked:
        nothing = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "max_new_tokens": 12}
        assert ours.generate(both.picture, QUESTION, **nothing).token_ids == usual[:3]


def copy_with(folder: Path, target: Path, fields: dict[str, Any], where: str) -> Path:
    """The folder with generation fields in one of the three places, and no others."""
    for file in folder.iterdir():
        if file.name not in ("generation_config.json", "config.json"):
            (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    if where == "generation_config.json":
        (target / where).write_text(json.dumps(fields))
    else:
        (config if where == "config.json" else config["text_config"]).update(fields)
    (target / "config.json").write_text(json.dumps(config))
    return target


# Keys that say how an answer is computed, kept or reported, or that count beside another key only: no other tokens come out.
WITHOUT_EFFECT = {
    *("early_stopping", "length_penalty", "diversity_penalty", "low_memory"),  # of beams and contrastive search
    *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size"),
    *("renormalize_logits", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),  # of speculative decoding
    *("transformers_version", "_from_model_config"),
}


def test_every_key_of_transformers_is_followed_named_or_without_effect() -> None:
    known = {*generation_config._CONSTRAINTS, *generation_config._LENGTHS, *generation_config._SAMPLING, "eos_token_id"}
    known |= generation_config._LOST.keys()
    keys = {key for key in vars(GenerationConfig()) if not key.startswith("_original")}
    assert keys - known - WITHOUT_EFFECT == set()
    assert not known & WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
            "asks for do_sample True, temperature 0.9, top_p 0.6: ",
        ),
        ({"num_beams": 3}, "num_beams 3 is not followed: answers are without beam search"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id 2 is not followed"),
        (
            {"exponential_decay_length_penalty": [1, 9.0]},
            r"exponential_decay_length_penalty \[1, 9.0\] is not followed",
        ),
        ({"stop_strings": ["x" * 9000]}, "stop_strings .{0,200} is not followed"),
        ({"guidance_scale": 1.5, "num_beams": 1}, "guidance_scale 1.5 is not followed"),
        ({"do_sample": False, "temperature": 0.9, "num_beams": 1, "guidance_scale": 1, "stop_strings": None}, None),
        ({"repetition_penalty": 1.2, "max_new_tokens": 4, "of_somebody": 3}, None),
    ],
    ids=str,
)
def test_what_is_not_followed_is_said_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], words: str | None
) -> None:
    other = copy_with(folder, tmp_path, fields, "generation_config.json")
    with caplog.at_level(logging.WARNING, "minifocus"):
        minifocus.load(other, "none")
    import re

    said = [r.getMessage() for r in caplog.records if "generation_config.json" in r.getMessage()]
    assert len(said) == (words is not None)
    assert all(re.search(re.escape(str(other / "generation_config.json")) + f": {words}", line) for line in said)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("repetition_penalty", v) for v in (0, -1.0, "2", True, float("nan"), 10**400, [1.2])),
        *(("no_repeat_ngram_size", v) for v in (-1, 1.5, "1", 2**70, True)),
        *(("bad_words_ids", v) for v in ([3], [[]], [[-1]], "ab", [["a"]], {"a": 1}, 3)),
        *(("suppress_tokens", v) for v in (3, [2.5], "ab", [None], [[1]])),
        *(("begin_suppress_tokens", v) for v in (3, [2.5], [True])),
        *(("min_new_tokens", v) for v in (-1, 2.0, "3", 2**70)),
        *(("max_new_tokens", v) for v in (0, 2.0, "3", 2**70)),
    ],
)
def test_bad_values_are_named(folder: Path, tmp_path: Path, both: Both, name: str, value: Any) -> None:
    with pytest.raises(minifocus.InputError, match=f"^{name}: expected"):
        both.ours(**{name: value})
    other = copy_with(folder, tmp_path, {name: value}, "generation_config.json")
    with pytest.raises(minifocus.CheckpointError, match=f"generation_config.json: {name}: expected"):
        minifocus.load(other, "none")


def test_numbers_of_numpy_are_numbers(both: Both) -> None:
    plain = dict(max_new_tokens=9, repetition_penalty=1.5, suppress_tokens=[5, 6], bad_words_ids=[[4], [7, 8]], seed=3)
    numpy = dict(
        max_new_tokens=np.int64(9),
        repetition_penalty=np.float32(1.5),
        suppress_tokens=np.array([5, 6]),
        bad_words_ids=[np.array([4]), (np.int32(7), 8)],
        seed=np.uint8(3),
    )
    assert both.ours(**numpy, temperature=np.float64(0.7)) == both.ours(**plain, temperature=0.7)


def test_all_tokens_banned_is_an_error(both: Both) -> None:
    with pytest.raises(minifocus.InputError, match="expected a token that may be said next"):
        both.ours(max_new_tokens=2, suppress_tokens=list(range(96)))


def test_a_prompt_that_fills_max_length_is_refused(folder: Path, tmp_path: Path, both: Both) -> None:
    other = minifocus.load(
        copy_with(folder, tmp_path, {"max_length": both.prompt_length}, "generation_config.json"), "none"
    )
    with pytest.raises(minifocus.InputError, match=f"max_length of {both.prompt_length}, got {both.prompt_length}"):
        other.generate(both.picture, QUESTION)
    assert len(other.generate(both.picture, QUESTION, max_new_tokens=2).token_ids) <= 2


def test_without_constraints_nothing_is_copied() -> None:
    logits = torch.randn(5)
    assert Constraints().apply(logits, [1], [2], {3}) is logits
