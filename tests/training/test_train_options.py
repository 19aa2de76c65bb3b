"""Every option of examples/train.py once: what it trains, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import add_tokenizer, build, save
from safetensors.torch import safe_open
from training_runs import (
    SHORT,
    TINY,
    Tensors,
    changed,
    figures,
    largest_difference,
    part_of,
    short,
    train,
    trainer,
    weights,
    write_data,
)

import minifocus
from minifocus import cards, llama
from minifocus.cards import CardScenes
from minifocus.inputs.conversations import read_conversations
from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions
from minifocus.training.examples import Batches
from minifocus.training.objective import AnswerObjective, Objective
from minifocus.training.parts import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_goes_on_without_what_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture turns out to be torn in the middle of a run: what was done is not lost."""
    data = write_data(tmp_path)
    pictures = sorted((tmp_path / "images").iterdir())
    arguments = ["--out", tmp_path / "run", "--data", data, *SHORT, "--steps", 3, "--batch", 1, "--save-every", 1]
    arguments += ["--sampler", "none", "--seed", 1]
    model = minifocus.load(TINY, "none")
    second = Batches(model.processor, read_conversations(data), 1, 1).conversation(1)
    place = [conversation.id for conversation in read_conversations(data)].index(second.id)
    pictures[place].write_bytes(pictures[place].read_bytes()[:100])
    done = train(*arguments)
    assert done.code == 2 and f"conversation {second.id!r}: {pictures[place]}: not a picture" in done.err
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["steps"] == 1
    done = train(*arguments, "--skip-unusable")
    assert done.code == 0, done.err
    assert f"left out: conversation {second.id!r}: " in caplog.text
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return short(tmp_path_factory.mktemp("runs") / "plain", "--fresh", "projector")


def test_gradient_checkpointing_changes_nothing(plain: Tensors, tmp_path: Path) -> None:
    from torch.utils import checkpoint

    planned = []  # whether cuDNN's attention may be used, when layers are run and when they are run again

    def attend(*arguments: torch.Tensor | None) -> torch.Tensor:
        planned.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments)

    attention = llama.attend
    with (
        mock.patch.object(checkpoint, "checkpoint", wraps=checkpoint.checkpoint) as recomputed,
        mock.patch.object(llama, "attend", attend),
    ):
        again = short(tmp_path, "--fresh", "projector", "--gradient-checkpointing")
    assert len(planned) >= 2 * recomputed.call_count and not any(planned)
    assert recomputed.call_count == 4 * 4  # layers × micro-batches
    assert largest_difference(plain, again) <= 1e-5


def test_bf16_stays_near(plain: Tensors, tmp_path: Path) -> None:
    """Weights and files stay float32; the decoder's steps go nearly the same way. The projector is new, for there to be
    much to learn: what is left to a trained model is small, and rounding with it."""
    attention, dtypes = llama.attend, set()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        dtypes.update((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v, mask)

    with mock.patch.object(llama, "attend", attend):
        start, half = weights(TINY), short(tmp_path, "--fresh", "projector", "--bf16")
    assert dtypes == {torch.bfloat16}  # rotation leaves float32, which attention would cast, block by block
    assert {value.dtype for value in half.values()} == {torch.float32}
    names = [name for name in plain if part_of(name) == "llm"]
    ours, theirs = (torch.cat([(run[name] - start[name]).flatten() for name in names]) for run in (plain, half))
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    for name in names:
        ours, theirs = ((run[name] - start[name]).flatten() for run in (plain, half))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9, name


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        (["--freeze", "llm,selector", "--lr-vision", 1e-4], {"vision", "projector"}),
        (["--freeze", "vision, projector", "--lr-vision", 1e-4], {"llm", "selector"}),
        (["--lr-llm", 0, "--lr-projector", 0, "--optimizer", "adamw", "--weight-decay", 0.1], {"selector"}),
    ],
)
def test_frozen_parts_stay_bit_for_bit(tmp_path: Path, arguments: list[Any], trained: set[str]) -> None:
    start = weights(TINY)
    moved = changed(start, short(tmp_path, *arguments))
    # Of a vocabulary's embeddings a step moves those that it read, and so the table.
    assert moved == {name for name in start if part_of(name) in trained}


def test_aligning_a_fresh_projector(tmp_path: Path) -> None:
    """Only the projector and the newline are trained, from new weights that follow from the seed; no selector is left."""
    start = {name: value for name, value in weights(TINY).items() if part_of(name) != "selector"}
    arguments = ["--stage", "align", "--fresh", "projector", "--lr-projector", 1e-6]
    first = short(tmp_path / "a", *arguments)
    assert changed(start, first) == {name for name in start if part_of(name) == "projector"}
    assert changed(start, first) >= {"image_newline", "multi_modal_projector.linear_1.weight"}
    again = short(tmp_path / "b", *arguments, "--lr-projector", 2e-6)
    other = short(tmp_path / "c", *arguments, "--seed", 1)
    for name in changed(start, first):
        assert (first[name] - again[name]).abs().max() < 1e-3 * first[name].abs().max()
        assert (first[name] - other[name]).abs().max() > 0.1 * first[name].abs().max()
    assert not (tmp_path / "a/model/selector.safetensors").exists()

    # The next stage: a new selector, that begins by reading everything.
    trained = short(tmp_path / "d", "--model", tmp_path / "a/model", "--freeze", "selector", "--selector-bias", 2.5)
    assert trained["selector.bias"].tolist() == [0, 0, 2.5] and not trained["selector.weight"].any()
    assert figures(tmp_path / "d")[-1]["scale_1x1"] == 1


def test_a_fresh_selector_of_another_kind(tmp_path: Path) -> None:
    new = ["--fresh", "selector,projector", "--window", 8, "--branches", 7, "--printed-factor"]
    with mock.patch.object(trainer, "AnswerObjective", side_effect=AnswerObjective) as objective:
        options = ("text=all", "score_pool=max", "score_norm=layer")
        trained = short(tmp_path, *new, *(word for option in options for word in ("--option", option)))
    model = objective.call_args.args[0]
    assert (model.inside_llm.options.text, model.before_llm.options.score_pool) == ("all", "max")
    assert model.before_llm.options.straight_through is False and model.before_llm.selector.score_norm == "layer"
    start = weights(TINY)
    assert trained["selector.weight"].shape == (7, 64) and trained["selector.bias"].shape == (7,)
    assert trained["selector.weight"].any()
    name = "multi_modal_projector.linear_2.weight"
    assert (trained[name] - start[name]).abs().max() > 0.1 * start[name].abs().max()
    with safe_open(tmp_path / "model/selector.safetensors", "pt") as stored:
        assert stored.metadata()["window"] == "8" and stored.metadata()["branches"] == "7"
        assert stored.metadata()["score_norm"] == "layer"
    model = minifocus.load(tmp_path / "model", "focus")
    image, question, _, _ = next(iter(cards.questions("test", 1)))
    model.generate(image, question, max_new_tokens=1)


@pytest.mark.parametrize("turns", ["chat", "independent"])
def test_data_of_one_s_own(data: Path, tmp_path: Path, turns: str) -> None:
    """A JSON file that draw_cards.py wrote, once through by default, read ahead or not; validation changes no weight."""
    arguments = ["--data", data, "--turns", turns, "--batch", 2, "--max-turns", 2, "--log-every", 1, "--lr-llm", 1e-4]
    done = train("--out", tmp_path / "plain", *arguments)
    assert done.code == 0, done.err
    assert [line["step"] for line in figures(tmp_path / "plain")] == [1, 2]  # 5 conversations, 2 a step
    start, trained = weights(TINY), weights(tmp_path / "plain/model")
    assert {part_of(name) for name in changed(start, trained)} == {"vision", "projector", "llm", "selector"}

    options = ["--workers", 1, "--validate", 3, "--validation-data", data, "--validate-every", 1]
    with mock.patch.object(trainer, "evaluate", wraps=trainer.evaluate) as evaluated:
        done = train("--out", tmp_path / "other", *arguments, *options)
    assert done.code == 0, done.err
    tokenizer, turns = minifocus.load(TINY, "none").tokenizer, read_conversations(data)[0].turns
    assert tokenizer is not None
    longest = 8 + max(len(tokenizer.encode(turn.answer).ids) for turn in turns[:3])
    assert not changed(trained, weights(tmp_path / "other/model"))
    lines = figures(tmp_path / "other")
    assert [line for line in lines if "loss" in line] == figures(tmp_path / "plain")
    assert {call.kwargs["max_new_tokens"] for call in evaluated.call_args_list} == {longest}
    validated = [line for line in lines if "accuracy" in line]
    assert [line["step"] for line in validated] == [1, 2]
    assert all(0 <= line["accuracy"] <= 1 and line["tokens"]["equivalent"] < 1 for line in validated)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_every_trained_parameter_has_a_gradient(kind: str, tmp_path: Path) -> None:
    """And no other: of the tower, the blocks up to the one whose features are taken. LLaVA-1.5 has no newline."""
    folder = save(build(kind, seed=1), tmp_path)
    add_tokenizer(folder)
    save_selector(folder / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions())
    model = minifocus.load(folder, "focus")
    task = AnswerObjective(model, Objective(independent=True), 0).train()
    rates = dict.fromkeys(("vision", "projector", "llm", "selector", "selector_bias"), 1.0)
    named = dict(task.named_parameters())
    trained = {name for name in named if learning_rate(name, rates, model) > 0}
    batch = Batches(model.processor, CardScenes(count=4), 2, 0, independent=True, max_turns=2)[0]
    task(batch, 1, 1)[0].backward()
    assert {name for name, value in named.items() if value.grad is not None} == trained
    left = named.keys() - trained
    assert {
        name.removeprefix("model.vision_tower.").split(".self")[0].split(".mlp")[0].split(".layer_norm")[0]
        for name in left
    } == {
        "post_layernorm.weight",
        "post_layernorm.bias",
        "encoder.layers.2",
    }
    for part in rates:
        only = {other: float(other == part) for other in rates}
        of_part = {name for name in trained if learning_rate(name, only, model) > 0}
        assert of_part and all(
            part_of(name.removeprefix("model.").replace("before_llm.", "")) == part.removesuffix("_bias")
            for name in of_part
        )


def test_training_behind_a_method_without_parameters(tmp_path: Path) -> None:
    method = ["--sampler", "similarity", "--option", "ratio=0.4", "--option", "flip=true"]
    done = train("--out", tmp_path / "run", *method, "--steps", 1, "--batch", 2, "--micro-batch", 2)
    assert done.code == 0, done.err
    (line,) = figures(tmp_path / "run")
    assert line["tokens"] == pytest.approx(0.4, abs=0.01)
    assert not (tmp_path / "run/model/selector.safetensors").exists()


def test_what_a_preset_fills_in(data: Path, tmp_path: Path) -> None:
    """The miniature's settings without data, and LLaVA's with it. What is given is kept, and identities name no more than it."""

    def filled(*arguments: Any) -> tuple[Any, Batches, dict[str, Any]]:
        with mock.patch.object(trainer, "fit", return_value=0.0) as fit:
            done = train("--out", tmp_path / "run", *arguments)
        assert done.code == 0, done.err
        _, _, batches, settings, _, _, identity = fit.call_args.args
        return settings, batches, identity

    settings, batches, identity = filled()
    assert (settings.steps, settings.batch, settings.micro_batch, settings.warmup_steps) == (500, 16, 4, 25)
    assert (batches.size, batches.max_turns, batches.shuffle, batches.independent) == (4, 12, False, True)
    assert settings.muon and (identity["turns"], identity["optimizer"]) == ("independent", "muon")
    rates = ("lr_vision", "lr_projector", "lr_llm", "lr_selector", "lr_selector_bias")
    assert [identity[name] for name in rates] == [0.0, 1e-3, 1e-3, 1e-5, 3e-3]
    assert [identity[name] for name in ("steps", "micro_batch", "max_turns")] == [None] * 3  # only what was given

    settings, batches, identity = filled("--stage", "align")
    assert settings.steps == 500 and [identity[name] for name in rates] == [0.0, 2e-3, 0.0, 0.0, 0.0]
    settings, batches, identity = filled("--data", data, "--batch", 2)
    assert (settings.steps, settings.batch, settings.micro_batch, settings.warmup_steps) == (
        2,
        2,
        1,
        0,
    )  # one pass over 5
    assert (batches.size, batches.max_turns, batches.shuffle, batches.independent) == (1, None, True, False)
    assert not settings.muon and [identity[name] for name in rates] == [2e-6, 1e-5, 1e-5, 1e-5, 3e-4]
    settings, batches, identity = filled("--data", data, "--stage", "align")
    assert (settings.batch, settings.steps) == (256, 1) and [identity[n] for n in rates] == [0.0, 1e-3, 0.0, 0.0, 0.0]

    settings, batches, identity = filled(*SHORT, "--lr-llm", 0.5, "--optimizer", "adamw", "--turns", "chat")
    assert (settings.steps, settings.batch, settings.micro_batch, batches.max_turns) == (2, 2, 1, 2)
    assert identity["lr_llm"] == 0.5 and not settings.muon and not batches.independent
