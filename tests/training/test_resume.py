"""A run that is interrupted goes on; a run that began from something else is another one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from forked import Forked, python
from safetensors.torch import safe_open, save_file
from training_runs import (
    ROOT,
    SHORT,
    TINY,
    changed,
    figures,
    short,
    train,
    trainer,
    weights,
    write_data,
)

import minifocus
from minifocus import cards
from minifocus.training.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

RESUMED = ["--steps", 6, "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--save-every", 2, "--log-every", 1]
RESUMED += ["--sampler-dropout", 0.3, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = python("examples/train.py", "--out", out, *RESUMED)
    assert done.returncode == 0, done.stderr
    return out


def test_a_killed_run_goes_on_where_its_checkpoint_is(whole: Path, tmp_path: Path) -> None:
    """In the end, weights and log are those of the run that was not interrupted: bit for bit."""
    out = tmp_path / "killed"
    arguments = [ROOT / "examples/train.py", "--out", out, *RESUMED]
    with Forked(arguments, [{}]) as killed:
        deadline = time.monotonic() + 300
        while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
            assert killed.running(), killed.err()
            time.sleep(0.005)
        os.kill(killed.pids[0], signal.SIGKILL)
        assert killed.wait(60) == [-signal.SIGKILL]
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["steps"] in (2, 4) and not (out / "model").exists()
    assert len(figures(out)) < 6

    # Whatever had been written when the process died: a line that is cut off, and one of a step that will be repeated.
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    done = python(*arguments, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert (out / "model/selector.safetensors").read_bytes() == (whole / "model/selector.safetensors").read_bytes()
    assert [line["step"] for line in figures(out)] == [1, 2, 3, 4, 5, 6]
    assert figures(out) == figures(whole)
    assert changed(weights(TINY), weights(whole / "model")) >= {"selector.bias", "language_model.lm_head.weight"}


def test_a_run_that_is_done_stays_as_it_is_and_other_arguments_are_refused(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    done = train("--out", out, *RESUMED)
    assert done.code == 0, done.err
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert figures(out) == figures(whole)

    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for other, words in (
        (["--lr-llm", 2e-3], "lr_llm: 0.001 there, 0.002 here"),
        (["--seed", 1], "seed: 0 there, 1 here"),
        (["--steps", 8], "steps: 6 there, 8 here"),
        (["--bf16"], "bf16: "),
        (["--freeze", "projector"], "freeze: '' there, 'projector' here"),
        (["--template", "mistral"], "template: None there, 'mistral' here"),
    ):
        done = train("--out", out, *RESUMED, *other)
        assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1, done.err
        assert done.err.startswith(f"error: {out / 'checkpoint.pt'}: of another run") and words in done.err
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (out / "checkpoint.pt").write_bytes(b"nonsense")
    for foreign in (None, [1, 2], {"state_dict": {}}):
        if foreign is not None:
            torch.save(foreign, out / "checkpoint.pt")
        done = train("--out", out, *RESUMED)
        assert done.code == 2 and done.err.startswith(f"error: {out / 'checkpoint.pt'}: not a checkpoint of a run")
    (out / "checkpoint.pt").unlink()
    (out / "log.jsonl").write_text('{"step": 1}\n{"epoch": 1}\n')
    done = train("--out", out, *RESUMED)
    assert done.code == 2 and f"{out / 'log.jsonl'}: line 2: expected an object with a step" in done.err


def test_the_trained_folder_loads(whole: Path) -> None:
    """With the weights of the last checkpoint, here and in transformers."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = minifocus.load(whole / "model", sampler="focus")
    checkpoint = torch.load(whole / "checkpoint.pt", weights_only=True)
    own = {f"model.{name}": value for name, value in model.named_parameters()}
    assert checkpoint["parameters"] and all(torch.equal(own[n], v) for n, v in checkpoint["parameters"].items())
    untrained = own.keys() - checkpoint["parameters"].keys()
    assert untrained == {name for name in own if "vision_tower" in name}

    image, question, _, _ = next(iter(cards.questions("test", 1, seed=5000)))
    assert model.generate(image, question).tokens.equivalent < 1
    model = minifocus.load(whole / "model", sampler="none")
    processor = AutoProcessor.from_pretrained(whole / "model", backend="pil")
    oracle = LlavaNextForConditionalGeneration.from_pretrained(whole / "model")
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    with torch.inference_mode():
        logits = oracle(**inputs).logits
        ours = model(inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"], inputs["attention_mask"])
    assert (ours - logits).abs().max() <= 1e-5 * max(float(logits.std()) / 4, 1)


def test_the_log_and_its_picture(whole: Path, tmp_path: Path) -> None:
    lines = read_log(whole / "log.jsonl")
    keys = {"step", "seconds", "lr", "loss", "balance_loss", "tokens", "tokens_entered"}
    assert all(line.keys() == keys | {"scale_4x4", "scale_2x2", "scale_1x1"} for line in lines)
    assert lines == sorted(lines, key=lambda line: line["seconds"]) and lines[0]["seconds"] >= 0
    for line in lines:
        assert 0 < line["tokens"] <= line["tokens_entered"] <= 1 and line["loss"] > 0
        assert line["scale_4x4"] + line["scale_2x2"] + line["scale_1x1"] == pytest.approx(1, abs=1e-4)
    from PIL import Image

    with Image.open(whole / "curve.png") as curve:
        assert curve.format == "PNG" and curve.width > 600
    from minifocus.training.plot_log import draw_curve

    (tmp_path / "log.jsonl").write_text("")
    draw_curve(tmp_path / "log.jsonl", tmp_path / "empty.png")  # a log without lines is no error
    validated = {"step": 6, "accuracy": 0.5, "families": {"sum": [1, 2]}}  # what no run of this file has
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], validated]))
    draw_curve(tmp_path / "log.jsonl", tmp_path / "more.png")
    with Image.open(tmp_path / "more.png") as more:
        assert more.width == pytest.approx(curve.width * 4 / 3, abs=2)


def test_a_run_is_known_by_what_it_began_from_wherever_that_is(tmp_path: Path) -> None:
    """Nor does it matter what takes less memory. Frozen parts are not in the checkpoint: other ones are another run's."""
    before, after = tmp_path / "before", tmp_path / "elsewhere/after"
    shutil.copytree(TINY, before / "start/model")
    short(before / "run", "--model", before / "start/model", "--freeze", "llm")
    after.parent.mkdir()
    before.rename(after)
    checkpoint = after / "run/checkpoint.pt"
    made = checkpoint.stat().st_mtime_ns
    same = ["--out", after / "run", *SHORT, "--freeze", "llm", "--model", after / "start/model"]
    assert train(*same, "--gradient-checkpointing").code == 0
    assert checkpoint.stat().st_mtime_ns == made
    kept = (after / "run/model/model.safetensors").read_bytes()
    with safe_open(after / "start/model/model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["language_model.lm_head.weight"][7, 7] += 1
    save_file(tensors, after / "start/model/model.safetensors", metadata)
    done = train(*same)
    assert done.code == 2 and "of another run" in done.err and "model: '" in done.err
    assert (after / "run/model/model.safetensors").read_bytes() == kept


def test_a_finished_stage_can_be_run_again_under_the_next_one(tmp_path: Path) -> None:
    """It leaves the same model, and the next goes on."""
    first, second = tmp_path / "first", tmp_path / "second"
    stages = [["--out", first, *SHORT], ["--out", second, *SHORT, "--model", first / "model"]]
    for arguments in (*stages, *stages, stages[0], stages[1]):
        done = train(*arguments)
        assert done.code == 0, done.err


def test_a_file_that_has_changed_is_another_run_s(tmp_path: Path) -> None:
    """Under the same name; a run of the miniature is known by what it always was."""
    arguments = ["--out", tmp_path / "run", "--data", write_data(tmp_path), *SHORT, "--sampler", "none"]
    done = train(*arguments)
    assert done.code == 0, done.err
    write_data(tmp_path, text_only=1)
    done = train(*arguments)
    assert done.code == 2 and "conversations: 3 there, 4 here; data: '" in done.err

    with mock.patch.object(trainer, "fit", return_value=0.0) as fit:
        assert train("--out", tmp_path / "miniature", "--sampler", "none").code == 0
    identity = fit.call_args.args[6]
    assert not identity.keys() & {"conversations", "data"}
    assert (identity["alpha"], identity["selector_bias"], identity["scale_weights"]) == (0.1, 1.0, None)
