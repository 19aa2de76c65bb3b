"""Training with another projector: what it begins as, that it trains, resumes, loads and answers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import build, save
from PIL import Image
from training_runs import (
    SHORT,
    TINY,
    by_two,
    changed,
    figures,
    largest_difference,
    part_of,
    short,
    train,
    trainer,
    weights,
)

import minifocus
from minifocus import cards
from minifocus.projectors import Grid, MLPOptions
from minifocus.projectors.stf import STF
from minifocus.training.new_projector import NewProjector, replace_projector
from minifocus.training.parts import load_to_train

pytestmark = pytest.mark.usefixtures("one_thread")

STF_ARGUMENTS = ["--projector", "stf", "--vision-layers", "1,2,3,4", "--projector-option", "last_gelu=false"]
START = ["--projector-start", "pooling"]


# ---- the start ----


def pooled(outputs: torch.Tensor, side: int, k: int) -> torch.Tensor:
    planes = outputs.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.avg_pool2d(planes, k).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...], bool], Path]:
    """A random model by the layers that its projector reads and whether that has a bias; built once."""

    @cache
    def folder(layers: tuple[int, ...], bias: bool) -> Path:
        sizes = {"text_hidden_size": 16, "vision_intermediate_size": 8}
        model = build(vision_feature_layer=list(layers), multimodal_projector_bias=bias, seed=4, **sizes)
        return save(model, tmp_path_factory.mktemp("pooled"))

    return folder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    ("fusion", "mbtf", "before", "after"),
    [
        (fusion, mbtf, before, after)
        for fusion in ("concatenation", "convolution", "average")
        for mbtf, before, after in (
            (True, [2], (1, 2, 3)),
            (True, [2], (-2,)),
            (False, [2], (3, -2)),
            (False, [3, 1], (0, 1, 3)),
        )
    ],
)
def test_it_begins_as_pooling(
    folder_of: Callable[[tuple[int, ...], bool], Path],
    fusion: str,
    mbtf: bool,
    before: list[int],
    after: tuple[int, ...],
    k: int,
    bias: bool,
) -> None:
    """Of the model's own tokens, within rounding. With fusion "average", of what its projector reads instead."""
    model = minifocus.load(folder_of(tuple(before), bias), "none")
    newline = model.image_newline.clone()
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = model.vision_tower.features(model.vision_tower(pixels))
        old = model.multi_modal_projector
        expected = old(pooled(features, 4, k)) if fusion == "average" else pooled(old(features), 4, k)
    described = {"name": "stf", "window": k, "fusion": fusion, "mbtf": mbtf, "last_gelu": False}
    replace_projector(model, NewProjector(described, after, "pooling"), seed=5)
    new = model.multi_modal_projector
    with torch.inference_mode():
        found = new(model.vision_tower.features(model.vision_tower(pixels)))
    assert model.config.grid == Grid(4 // k, 4 // k, window=k)
    assert float(expected.std()) > 0.3 and float((found - expected).abs().max()) <= 1e-5
    assert torch.equal(model.image_newline, newline)
    # Nothing is stuck: every weight has a gradient, or will have one once the zeros behind it have moved.
    new(model.vision_tower.features(model.vision_tower(pixels))).square().sum().backward()
    assert all(value.grad is not None for value in new.parameters())


def test_a_last_gelu_of_mbtf_s_alone_is_no_hindrance_without_mbtf(tmp_path: Path) -> None:
    """AvgPool ends as LLaVA's MLP does, whatever `last_gelu` says."""
    model = minifocus.load(save(build(seed=4), tmp_path), "none")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        features = model.vision_tower.features(model.vision_tower(pixels))
        expected = model.multi_modal_projector(pooled(features, 4, 2))
        replace_projector(
            model, NewProjector({"name": "stf", "fusion": "average", "mbtf": False}, None, "pooling"), seed=0
        )
        assert torch.allclose(model.multi_modal_projector(features), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("described", "layers", "words"),
    [
        ({}, (2,), "start: behind a GELU there are no negative values: expected last_gelu false, got true"),
        ({"fusion": "average"}, (2,), "start: behind a GELU there are no negative values"),
        (
            {"last_gelu": False, "tokens": 2},
            (2,),
            "start: pooling makes one token of a window: expected tokens 1, got 2",
        ),
        (
            {"last_gelu": False},
            (1, 3),
            r"vision_layers: expected 2 among them, which the old projector reads, got \(1, 3\)",
        ),
        ({"last_gelu": False}, (2,), "start: expected at most 64 hidden units of a window, got 128"),
    ],
)
def test_a_start_that_cannot_be(tmp_path: Path, described: dict[str, Any], layers: tuple[int, ...], words: str) -> None:
    """The decoder is twice as wide as the tower: the convolution has half of the units that it would take."""
    model = minifocus.load(save(build(seed=4), tmp_path), "none")
    before, config = model.multi_modal_projector, model.config
    with pytest.raises(minifocus.InputError, match=words):
        replace_projector(model, NewProjector({"name": "stf", **described}, layers, "pooling"), seed=0)
    assert model.multi_modal_projector is before and model.config is config


def test_only_what_is_a_mlp_with_gelu_can_be_carried_on(tmp_path: Path) -> None:
    concatenation = {"name": "stf", "fusion": "concatenation", "last_gelu": False}
    for changes, layers, words in (
        (dict(projector_hidden_act="relu"), (2,), "expected LLaVA's MLP with a GELU"),
        (
            dict(vision_feature_layer=[1, 2]),
            (1, 2),
            "MBTF can hand on one hidden state: expected an old projector of one, got 2",
        ),
    ):
        folder = tmp_path / "-".join(changes)
        model = minifocus.load(save(build(seed=4, **changes), folder), "none")
        with pytest.raises(minifocus.InputError, match=words):
            replace_projector(model, NewProjector(concatenation, layers, "pooling"), seed=0)
    model = minifocus.load(folder, "none")
    replace_projector(model, NewProjector({"name": "stf"}), seed=0)
    with pytest.raises(minifocus.InputError, match="expected LLaVA's MLP with a GELU"):
        replace_projector(model, NewProjector(concatenation, None, "pooling"), seed=0)
    with pytest.raises(minifocus.InputError, match="MLP cannot begin as pooling: expected a random start"):
        replace_projector(model, NewProjector({"name": "mlp"}, None, "pooling"), seed=0)


def test_back_to_an_mlp(tmp_path: Path) -> None:
    """What is saved says so in config.json, activation and all; random values follow from the seed."""
    model = minifocus.load(save(build(seed=4), tmp_path / "a"), "none")
    replace_projector(model, NewProjector({"name": "stf", "tokens": 2}, (1, -1)), seed=0)
    model.save(tmp_path / "b")
    model = minifocus.load(tmp_path / "b", "none")
    assert isinstance(model.multi_modal_projector, STF) and model.config.feature_layers == (1, 3)
    replace_projector(model, NewProjector({"name": "mlp", "activation": "relu", "bias": False}, (-2,)), seed=7)
    first = model.multi_modal_projector.linear_1.weight
    model.save(tmp_path / "c")
    again = minifocus.load(tmp_path / "c", "none")
    assert again.config == model.config and again.config.projector == MLPOptions("relu", False)
    assert torch.equal(again.multi_modal_projector.linear_1.weight, first)
    replace_projector(again, NewProjector({"name": "mlp", "activation": "relu", "bias": False}), seed=7)
    assert torch.equal(again.multi_modal_projector.linear_1.weight, first)


# ---- runs ----


def asked(model: minifocus.Llava) -> minifocus.Answer:
    image, question, _, _ = next(iter(cards.questions("test", 1)))
    return model.generate(image, question, max_new_tokens=2)


def test_aligning_a_new_projector(tmp_path: Path) -> None:
    """It and the newline are trained, the rest stays bit for bit; the folder that is left needs nothing else."""
    start = {name: value for name, value in weights(TINY).items() if part_of(name) != "selector"}
    arguments = ["--stage", "align", "--projector", "stf", "--vision-layers", "1,2,3,4"]
    trained = short(tmp_path / "a", *arguments)
    kept = {name for name in start if name in trained and torch.equal(start[name], trained[name])}
    assert kept == {name for name in start if part_of(name) in ("vision", "llm", "unused")}
    assert (trained["image_newline"] - start["image_newline"]).abs().max() < 0.1  # it went on from the old one
    model = minifocus.load(tmp_path / "a/model", "none")
    assert isinstance(model.multi_modal_projector, STF) and model.config.feature_layers == (1, 2, 3, 4)
    tokens = asked(model).tokens
    assert tokens.full == asked(minifocus.load(TINY, "none")).tokens.full
    assert 0.24 < tokens.equivalent < 0.3 and tokens.after_vision < tokens.full
    # The log counts as the answers do.
    assert all(0.2 < line["tokens"] < 0.3 for line in figures(tmp_path / "a"))

    other = short(tmp_path / "b", *arguments, "--seed", 1)
    name = "multi_modal_projector.mbtf.0.weight"
    assert (other[name] - trained[name]).abs().max() > 0.1 * trained[name].abs().max()
    renewed = short(tmp_path / "c", *arguments, "--fresh", "projector")
    assert (renewed["image_newline"] - start["image_newline"]).abs().max() > 0.1


def test_behind_focus_with_a_new_selector(tmp_path: Path) -> None:
    """Its G is the coarse thumbnail's. The tower is frozen or trained as ever, up to the last state that is read."""
    arguments = ["--sampler", "focus", "--fresh", "selector", *STF_ARGUMENTS, *START]
    trained = short(tmp_path / "a", *arguments, "--lr-vision", 1e-4)
    start = weights(TINY)
    assert trained["selector.weight"].shape == (3, 16)
    shared = {name for name in start.keys() & trained.keys() if part_of(name) != "selector"}
    moved = {part_of(name) for name in shared if not torch.equal(start[name], trained[name])}
    assert moved == {"vision", "projector", "llm"}
    model = minifocus.load(tmp_path / "a/model", "focus")
    answer = asked(model)
    assert 0 < answer.tokens.equivalent < 0.28 and answer.pictures[0].choice is not None
    # The next stage goes on from that folder without a word of projectors.
    on = short(tmp_path / "b", "--model", tmp_path / "a/model")
    assert changed(trained, on) == {name for name in trained if part_of(name) in ("projector", "llm", "selector")}


def test_a_method_on_top_is_made_for_the_new_grid(tmp_path: Path) -> None:
    """ "fastervlm" reads the last block whose output is read, which the new layers say."""
    method = ["--sampler", "fastervlm", "--option", "ratio=0.5", "--projector", "stf", "--vision-layers=1,-3"]
    with mock.patch.object(trainer, "AnswerObjective", side_effect=trainer.AnswerObjective) as objective:
        short(tmp_path, *method)
    sampler = objective.call_args.args[0].before_llm
    assert list(sampler.tower_blocks) == [1]
    assert all(0.1 < line["tokens"] < 0.15 for line in figures(tmp_path))


def test_a_run_begins_where_pooling_is(tmp_path: Path) -> None:
    """At rates next to nothing the losses are those of the old model behind average pooling, thumbnail and all.

    Of square pictures: where unpadding cuts a map at an odd row, the two have other windows.
    """
    records = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"a number {number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(records))
    still = ["--data", tmp_path / "data.json", *SHORT, "--lr-projector", 1e-12, "--freeze", "vision,llm"]
    done = train("--out", tmp_path / "stf", *still, "--sampler", "none", *STF_ARGUMENTS, *START)
    assert done.code == 0, done.err
    pool = ["--sampler", "avgpool", "--option", "window=2", "--option", "thumbnail=compress"]
    done = train("--out", tmp_path / "avgpool", *still, *pool)
    assert done.code == 0, done.err
    for ours, theirs in zip(figures(tmp_path / "stf"), figures(tmp_path / "avgpool"), strict=True):
        assert theirs["loss"] > 1 and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["tokens"] == pytest.approx(theirs["tokens"], abs=1e-6)


RESUMED = [*SHORT, "--steps", 4, "--save-every", 2, "--sampler", "none", *STF_ARGUMENTS, *START]


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    """From the checkpoint in the middle, as if nothing had happened. Another projector is another run."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    with mock.patch("minifocus.training.loop.save_checkpoint", wraps=trainer_checkpoint()) as saved:

        def keep(file: Path, *rest: Any) -> None:
            trainer_checkpoint()(file, *rest)
            if rest[3] == 2:
                halved.mkdir(exist_ok=True)
                shutil.copy(file, halved / file.name)
                shutil.copy(whole / "log.jsonl", halved / "log.jsonl")

        saved.side_effect = keep
        assert train("--out", whole, *RESUMED).code == 0
    assert (halved / "checkpoint.pt").exists() and not (halved / "model").exists()
    done = train("--out", halved, *RESUMED)
    assert done.code == 0, done.err
    assert (halved / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert (halved / "model/config.json").read_bytes() == (whole / "model/config.json").read_bytes()
    assert figures(halved) == figures(whole)
    for other, words in (
        (["--projector-option", "window=4"], "projector_option: ['last_gelu=false'] there"),
        (["--vision-layers", "4"], "vision_layers: '1,2,3,4' there, '4' here"),
        (["--projector-start", "random"], "projector_start: 'pooling' there, 'random' here"),
    ):
        done = train("--out", whole, *RESUMED, *other)
        assert done.code == 2 and "of another run" in done.err and words in done.err


def trainer_checkpoint() -> Any:
    from minifocus.training.checkpoint import save_checkpoint

    return save_checkpoint


def test_two_processes_equal_one(tmp_path: Path) -> None:
    arguments = [
        "--steps",
        2,
        "--batch",
        2,
        "--micro-batch",
        1,
        "--max-turns",
        2,
        "--sampler",
        "none",
        "--device",
        "cpu",
    ]
    arguments += ["--projector", "stf", "--optimizer", "adamw", "--lr-projector", 1e-4, "--lr-llm", 1e-4]
    done = train("--out", tmp_path / "one", *arguments)
    assert done.code == 0, done.err
    by_two("--out", tmp_path / "two", *arguments)
    assert largest_difference(*(weights(tmp_path / name / "model") for name in ("one", "two"))) <= 1e-5


# ---- what is refused ----

BAD: list[tuple[Sequence[Any], str]] = [
    (["--projector-option", "window=2"], "--projector-option: expected --projector beside it, got "),
    (["--vision-layers", "1"], "--vision-layers: expected --projector beside it, got 1"),
    (["--projector-start", "pooling"], "--projector-start: expected --projector beside it, got pooling"),
    (["--projector", "stf"], "projector: what sampler 'focus' has learned is of another grid: expected it to begin anew"),
    (["--projector", "stf", "--freeze", "projector"], "--projector: random values have to be trained: expected a learning"),
    (["--projector", "stf", "--lr-projector", 0], "--projector: random values have to be trained: expected a learning rate"),
    ([*STF_ARGUMENTS, *START, "--fresh", "projector"], "--projector-start: expected no --fresh projector beside it"),
    (["--projector", "stf", "--projector-option", "window"], "--projector-option: expected NAME=VALUE, each name once, got"),
    (["--projector", "stf", "--projector-option", "name=mlp"], "--projector-option: expected NAME=VALUE, each name once"),
    (["--projector", "stf", "--projector-option", "window=3"], "window: expected a divisor of the 8 patches along a view's"),
    (["--projector", "stf", "--projector-option", "window=two"], "window: expected a whole number from 1 to 1024, got 'two'"),
    (["--projector", "stf", "--projector-option", "size=2"], "size: not an option of projector 'stf'; its options: "),
    (["--projector", "mlp", "--projector-option", "activation=x"], "activation: expected one of 'gelu'"),
    (["--projector", "stf", "--vision-layers", "1,two"], "--vision-layers: expected whole numbers with commas between, got"),
    (["--projector", "stf", "--vision-layers", ""], "--vision-layers: expected whole numbers with commas between, got ''"),
    (["--projector", "stf", "--vision-layers", "9" * 5000], "--vision-layers: expected whole numbers with commas between"),
    (["--projector", "stf", "--vision-layers", "1,17"], "vision_layers: expected a whole number from -"),
    (["--projector", "stf", "--vision-layers=" + ",".join(["1"] * 300)], "window: expected layers of at most"),
    (["--projector", "stf", *START], "start: behind a GELU there are no negative values: expected last_gelu false"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(map(str, a))[:60] for a, _ in BAD])
def test_bad_arguments(tmp_path: Path, arguments: Sequence[Any], words: str) -> None:
    more = ["--projector-option", "mbtf=false"] if "layers of at most" in words else []
    done = train("--out", tmp_path, "--steps", 1, *arguments, *more)
    assert done.code == 2 and not done.out
    assert done.err.startswith("error: ") and words in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err and len(done.err) < 1000, done.err
    assert not (tmp_path / "model").exists()


def test_a_kept_class_token_has_no_place(tmp_path: Path) -> None:
    folder = save(build("llava", vision_feature_select_strategy="full"), tmp_path)
    with pytest.raises(minifocus.InputError, match="projector: expected a model without a CLS token"):
        load_to_train(folder, "none", torch.device("cpu"), {}, projector=NewProjector({"name": "stf"}))


def test_tokenpacker_in_two_stages(tmp_path: Path) -> None:
    """The same commands with another name: every part of it has a gradient, and the folder loads and answers."""
    arguments = [
        "--stage",
        "align",
        "--projector",
        "tokenpacker",
        "--vision-layers",
        "1,2,4",
        "--projector-option",
        "heads=4",
    ]
    first = short(tmp_path / "a", *arguments)
    second = short(tmp_path / "b", "--model", tmp_path / "a/model", "--sampler", "none", "--lr-vision", 1e-4)
    still = {name for name in first.keys() - changed(first, second) if part_of(name) != "unused"}
    assert still <= {"multi_modal_projector.k_proj.bias"}  # a softmax does not see what all its keys share
    model = minifocus.load(tmp_path / "b/model", "none")
    assert model.config.grid == Grid(4, 4, window=2) and model.config.feature_layers == (1, 2, 4)
    assert 0.2 < asked(model).tokens.equivalent < 0.3


def test_a_folder_s_own_projector_can_begin_anew(tmp_path: Path) -> None:
    """`--fresh projector` gives STF new values, and the newline, as it does LLaVA's MLP."""
    model = minifocus.load(TINY, "none")
    replace_projector(model, NewProjector({"name": "stf"}), seed=3)
    model.save(tmp_path / "start")
    before = weights(tmp_path / "start")
    arguments = ["--stage", "align", "--model", tmp_path / "start", "--fresh", "projector", "--lr-projector", 1e-6]
    after = short(tmp_path / "run", *arguments)
    assert changed(before, after) == {name for name in before if part_of(name) == "projector"}
    for name in changed(before, after):
        assert (before[name] - after[name]).abs().max() > 0.1 * before[name].abs().max(), name
    assert (tmp_path / "run/model/config.json").read_bytes() == (tmp_path / "start/config.json").read_bytes()
