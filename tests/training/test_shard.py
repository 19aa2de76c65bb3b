"""Processes that each hold a share of the model: they train as one process that holds it all, and go on in other numbers."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from several import Several
from training_runs import (
    SHORT,
    TINY,
    changed,
    figures,
    largest_difference,
    part_of,
    train,
    weights,
)

from minifocus.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = [
    "--steps",
    4,
    "--batch",
    4,
    "--micro-batch",
    1,
    "--max-turns",
    2,
    "--log-every",
    1,
    "--warmup",
    0,
    "--seed",
    20,
]
STEPS += ["--device", "cpu", "--sampler-dropout", 0.5]


def begin(count: int, *arguments: Any) -> Several:
    return Several(count, "train", "--shard", *arguments)


def run(count: int, *arguments: Any) -> None:
    with begin(count, *arguments) as processes:
        assert processes.wait() == [0] * count, processes.all_said()


def same_figures(one: Path, other: Path) -> None:
    """Sums are taken in another order, and the log has five digits."""
    for ours, theirs in zip(figures(one), figures(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == (
                pytest.approx(theirs[name], rel=1e-4, abs=2e-5) if name != "families" else theirs[name]
            )


def test_a_killed_run_of_four_goes_on_as_two(data: Path, tmp_path: Path) -> None:
    """Text alone and what is left unpooled fall to different processes; all take part in validation, and by Muon."""
    arguments = ["--data", data, *STEPS, "--optimizer", "muon", "--save-every", 2, "--gradient-checkpointing"]
    arguments += ["--validate", 1, "--validation-data", data, "--validate-every", 2]
    arguments += [word for part in ("vision", "projector", "llm", "selector") for word in (f"--lr-{part}", 1e-4)]
    done = train("--out", tmp_path / "plain", *arguments)
    assert done.code == 0, done.err

    with begin(4, "--out", tmp_path / "shared", *arguments) as four:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "shared").glob("checkpoint-*")) and time.monotonic() < deadline:
            assert four.running(), four.all_said()
            time.sleep(0.005)
    (there,) = (tmp_path / "shared").glob("checkpoint-*")
    assert there.name == "checkpoint-00000002" and not (tmp_path / "shared/model").exists()
    assert len(list(there.glob("*.distcp"))) == 4

    (tmp_path / "shared/.unfinished-checkpoint").mkdir()  # as if one had been killed while it saved
    run(2, "--out", tmp_path / "shared", *arguments)
    assert [file.name for file in (tmp_path / "shared").glob("*checkpoint*")] == ["checkpoint-00000004"]
    same_figures(tmp_path / "plain", tmp_path / "shared")
    start, one, other = (weights(place) for place in (TINY, tmp_path / "plain/model", tmp_path / "shared/model"))
    assert {part_of(name) for name in changed(start, other)} == {"vision", "projector", "llm", "selector"}
    assert largest_difference(one, other) <= 2e-5 < 1e-4 < largest_difference(start, other)
    for file in (tmp_path / "plain/model").iterdir():
        found = (tmp_path / "shared/model" / file.name).read_bytes()
        assert file.suffix == ".safetensors" or found == file.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lora-rank", 4, "--freeze", "vision", "--bf16", "--lr-projector", 1e-4],
        ["--stage", "align", "--fresh", "projector", "--lr-projector", 1e-4],
    ],
    ids=["LoRA in bfloat16", "a projector alone"],
)
def test_frozen_parts(data: Path, tmp_path: Path, arguments: list[Any]) -> None:
    """Of text alone nothing would reach the layers that all have to gather: both runs would wait for ever.

    The second step ends with a micro-batch of text alone beside one with a picture.
    """
    arguments = ["--data", data, *STEPS, "--steps", 2, "--optimizer", "adamw", *arguments]
    done = train("--out", tmp_path / "plain", *arguments)
    assert done.code == 0, done.err
    run(2, "--out", tmp_path / "shared", *arguments)
    same_figures(tmp_path / "plain", tmp_path / "shared")
    for file in tmp_path.glob("plain/*/*.safetensors"):
        other = tmp_path / "shared" / file.relative_to(tmp_path / "plain")
        assert largest_difference(load_file(file), load_file(other)) <= 1e-5


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one process that torchrun started."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)


def test_one_process_is_a_plain_run_bit_for_bit(alone: None, tmp_path: Path) -> None:
    """One that is killed after its first step, too."""
    runs = [["--out", tmp_path / "plain", *SHORT], ["--out", tmp_path / "shared", *SHORT, "--shard"]]
    save = loop.save_shards

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with mock.patch.object(loop, "save_shards", save_and_die):
        assert train(*runs[1], "--save-every", 1).code == 130
    assert (tmp_path / "shared/checkpoint-00000001").exists() and len(figures(tmp_path / "shared")) == 1
    for arguments in runs:
        done = train(*arguments)
        assert done.code == 0, done.err
    assert figures(tmp_path / "plain") == figures(tmp_path / "shared")
    for file in (tmp_path / "plain/model").iterdir():
        assert (tmp_path / "shared/model" / file.name).read_bytes() == file.read_bytes()

    shutil.rmtree(tmp_path / "shared/model")
    done = train(*runs[1])  # done already: from its checkpoint
    assert done.code == 0, done.err
    assert not changed(weights(tmp_path / "plain/model"), weights(tmp_path / "shared/model"))
    done = train(*runs[1], "--seed", 1)
    assert done.code == 2 and "checkpoint-00000002: of another run" in done.err and "seed: 0 there, 1 here" in done.err
    for arguments, words in (
        ([*runs[0], "--shard"], "plain/checkpoint.pt: of a run without --shard"),
        (runs[1][:-1], "shared/checkpoint-00000002: of a run with --shard"),
    ):
        done = train(*arguments)
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err

    there = tmp_path / "shared/checkpoint-00000002"
    whole = {name: (there / name).read_bytes() for name in (".metadata", "__0_0.distcp", "run.json")}
    for name, content in ((".metadata", b"nonsense"), ("__0_0.distcp", b""), ("run.json", b"{}"), ("run.json", None)):
        (there / name).unlink() if content is None else (there / name).write_bytes(content)
        done = train(*runs[1])
        assert done.code == 2 and f"{there}: not a checkpoint of " in done.err and done.err.count("\n") == 1, done.err
        (there / name).write_bytes(whole[name])


def test_folders_that_cannot_be_shared(alone: None, tmp_path: Path) -> None:
    """They are refused by the tensor's or the file's name, before anything is written."""
    for case in ("nan", "missing", "tied"):
        shutil.copytree(TINY, tmp_path / case)
    tensors = load_file(TINY / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    broken = tensors[name].clone()
    broken[-1, -1] = torch.nan
    save_file({**tensors, name: broken}, tmp_path / "nan/model.safetensors", {"format": "pt"})
    save_file({n: v for n, v in tensors.items() if n != name}, tmp_path / "missing/model.safetensors", {"format": "pt"})
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for case, words in (
        ("nan", f"model.safetensors: {name}: holds NaN or infinite values"),
        ("missing", f"missing: {name}"),
        ("tied", "shard: expected a model whose head is its own"),
    ):
        done = train("--out", tmp_path / "out", *SHORT, "--shard", "--model", tmp_path / case)
        assert done.code == 2 and words in done.err, done.err
        assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--shard: expected to be started by torchrun, got True"),
        (["--stage", "router"], "--shard: expected --stage align or instruct beside it"),
        (["--projector", "stf"], "--shard: expected no --projector beside it"),
        (["--sampler", "hired"], "--sampler: expected none, focus, vision or text beside --shard, got hired"),
    ],
)
def test_what_is_not_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str) -> None:
    if arguments:
        monkeypatch.setenv("WORLD_SIZE", "1")
    done = train("--out", tmp_path, *SHORT, "--shard", *arguments)
    assert done.code == 2 and words in done.err and not list(tmp_path.iterdir())
