"""Whatever is passed to the Python API either works or raises InputError or CheckpointError, in words that are short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from checkpoints import add_tokenizer, build, make_inputs, save
from PIL import Image

import minifocus
from minifocus import arguments
from minifocus.generation_options import GenerationOptions, Options
from minifocus.methods import SamplerOptions, names, options_of


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words for it")


ODD: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        2,
        2**31,
        2**63,
        -(2**63) - 1,
        10**400,
        0.5,
        1e-300,
        1e308,
        float("inf"),
        float("nan"),
        1 + 2j,
    ),
    *(
        "",
        "x",
        "x" * 5000,
        "x\0",
        "\ud800",
        b"x" * 5000,
        [],
        [1],
        [0.5, "x"],
        ["x" * 9000] * 99,
        {},
        {"a": 1},
        (2, 1),
        set(),
    ),
    *(np.int64(2), np.float32(0.5), np.bool_(True), np.str_("x"), np.float64("nan"), np.array(2), np.array([1, 2])),
    *(
        np.array("x"),
        np.zeros((3, 4, 3), np.uint8),
        torch.tensor(2),
        torch.tensor(0.5),
        torch.tensor([1, 2]),
        torch.zeros(0),
    ),
    *(
        torch.ones(1, 4, dtype=torch.complex64),
        torch.tensor([[float("inf")] * 2]),
        torch.float64,
        object(),
        int,
        Unprintable(),
    ),
]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> minifocus.Llava:
    # A number of tokens that is odd is taken, and ends with the context.
    folder = save(
        build(request.param, seed=5, text_max_position_embeddings=512), tmp_path_factory.mktemp(request.param)
    )
    add_tokenizer(folder)
    return minifocus.load(folder, "none")


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 60, 3), dtype=np.uint8))


def attempt(what: str, run: Callable[[], object]) -> str | None:
    """What is wrong with how an odd argument fails, if anything."""
    try:
        run()
    except (minifocus.InputError, minifocus.CheckpointError) as error:
        return f"{what}: {len(str(error))} characters" if len(str(error)) > 1500 else None
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"[:300]
    return None


def failures(name: str, call: Callable[[Any], object]) -> list[str]:
    found = (attempt(f"{name}={arguments.shown(value)}", lambda v=value: call(v)) for value in ODD)
    return [one for one in found if one]


def test_load(model: minifocus.Llava) -> None:
    bad = failures("folder", minifocus.load)
    for name in ("sampler", "device", "dtype", "check_finite"):
        bad += failures(name, lambda value, name=name: minifocus.load(model.folder, **{"sampler": "none", name: value}))
    assert not bad


@pytest.mark.parametrize("sampler", names())
def test_options_of_samplers(model: minifocus.Llava, sampler: str) -> None:
    """Those that are taken answer."""

    def call(name: str, value: Any) -> None:
        others = {"selector": "variance"} if sampler in ("focus", "vision") else {}
        model.set_sampler(sampler, **{**others, name: value})
        model.generate(picture(), "What?", max_new_tokens=1)

    bad = [one for name in options_of(sampler) for one in failures(name, lambda value, name=name: call(name, value))]
    model.set_sampler("none")
    assert not bad


def test_generate(model: minifocus.Llava) -> None:
    bad = failures("sampler", model.set_sampler) + failures(
        "prompt", lambda v: model.generate(picture(), v, max_new_tokens=1)
    )
    model.set_sampler("none")
    bad += failures("image", lambda value: model.generate(value, "?", max_new_tokens=1))
    bad += failures("images", lambda value: model.generate_batch(value, ["?"], max_new_tokens=1))
    bad += failures("prompts", lambda value: model.generate_batch([None], value, max_new_tokens=1))
    for name in minifocus.generate.Options.__dataclass_fields__:
        bad += failures(
            name, lambda value, name=name: model.generate(None, "?", **{"max_new_tokens": 1, name: value}) and None
        )
    assert not bad


def test_forward(model: minifocus.Llava) -> None:
    usual = make_inputs(model, [[(30, 60)]]).arguments()
    bad = []
    for name in ("input_ids", "pixel_values", "image_sizes", "attention_mask", "instruction_mask", "labels"):
        bad += failures(name, lambda value, name=name: model(**{**usual, name: value}))
    assert not bad


def test_forward_takes_what_a_processor_returns(model: minifocus.Llava) -> None:
    """Keys that say nothing more are passed over; a key that would change the result is not."""
    usual = make_inputs(model, [[(30, 60)]]).arguments()
    with torch.inference_mode():
        extra = {"mm_token_type_ids": torch.ones_like(usual["input_ids"]), "token_type_ids": None, "length": [3]}
        assert torch.equal(model(**usual, **extra), model(**usual))
    for name in ("labels", "position_ids", "inputs_embeds", "past_key_values", "vision_feature_layer", "x" * 9000):
        with pytest.raises(minifocus.InputError, match=f"^{name[:100]}: not an argument of forward$"):
            model(**usual, **{name: torch.ones(1)})


def test_what_is_shown_is_short() -> None:
    for value in ODD:
        assert 0 < len(arguments.shown(value)) < 250
    assert arguments.shown(np.zeros((2, 3))) == "ndarray of float64 [2, 3]"
    assert arguments.shown(-(10**5000)) == "a whole number of 16610 bits"
    assert len(str(minifocus.InputError("x" * 10**6))) < 6100


def test_what_editors_complete_is_what_there_is() -> None:
    """Keyword arguments are typed by two TypedDicts beside the classes that check them."""
    assert set(SamplerOptions.__annotations__) == set().union(*map(options_of, names()))
    assert get_type_hints(GenerationOptions) == get_type_hints(Options)
