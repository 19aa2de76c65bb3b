"""The loop and its parts: steps, learning rates, the log, the checkpoint, memory, and what lies in a run's folder."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toy_task as toy
from training_runs import TINY

import minifocus
from minifocus.cards import CardScenes
from minifocus.training import loop
from minifocus.training.checkpoint import save_checkpoint
from minifocus.training.examples import Batches
from minifocus.training.log import Log, read_log
from minifocus.training.memory import check_memory
from minifocus.training.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_gpu_without_room_for_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 billion parameters in float32: a gradient, two moments, and 2 bytes each for autocast's copies."""
    task = torch.nn.Module()
    task.large = torch.nn.Linear(70_000, 100_000, bias=False, device="meta")
    task.frozen = torch.nn.Linear(10_000, 100_000, bias=False, device="meta").requires_grad_(False)
    for free, bf16, refused in (
        (99.9e9, True, True),
        (100.1e9, True, False),
        (83e9, False, True),
        (85e9, False, False),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 10**12))
        with pytest.raises(minifocus.InputError) if refused else contextlib.nullcontext() as error:
            check_memory(task, torch.device("cuda:1"), bf16)
        if error is not None:
            needed = "100.0" if bf16 else "84.0"
            assert f"at least {needed} GB" in str(error.value) and f"got {free / 1e9:.1f} GB on cuda:1" in str(
                error.value
            )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("there may be no CUDA"))
    check_memory(task, torch.device("cpu"), True)


def test_the_loop_s_parts(tmp_path: Path) -> None:
    """The learning rates' course, a step that is not finite, a batch that cannot be shared out, the log's lines."""
    settings = Settings(steps=10, batch=1, micro_batch=1, warmup_steps=4, final_lr=0.2)
    factors = [settings.lr_factor(step) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors == sorted(factors[:4]) + sorted(factors[4:])[::-1]
    assert factors[7] == pytest.approx(0.6) and settings.lr_factor(10) == pytest.approx(0.2)

    clipped = toy.train(tmp_path / "clipped", 4, steps=1, max_grad_norm=1e-3)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    moved = torch.cat([clipped.weight.detach() - start, clipped.sometimes.detach()[None] - 0.5]).norm()
    assert float(moved) == pytest.approx(0.02 * 1e-3, rel=1e-3)
    infinite = mock.patch.object(toy.Task, "forward", lambda self, *_: (self.weight.sum() * math.inf, {}))
    with infinite, pytest.raises(minifocus.InputError, match="step 1: the gradient is not finite"):
        toy.train(tmp_path / "infinite", 4)
    with pytest.raises(
        minifocus.InputError, match="batch: expected a multiple of micro_batch x processes = 3 x 1, got 4"
    ):
        toy.train(tmp_path / "uneven", 4, micro_batch=3)

    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 2, "accuracy": 0.5}\n{"step": 3, "lo')
    log = Log(file, 2)
    log.write(step=3, loss=1.23456789)
    assert read_log(file) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 2, "accuracy": 0.5},
        {"step": 3, "loss": 1.23457},
    ]
    assert read_log(tmp_path / "none.jsonl") == []


def test_what_a_run_finds_in_its_folder(tmp_path: Path) -> None:
    """Before the first step: what is no log or checkpoint is refused by its name, and stays; leftovers go."""
    never = mock.patch.object(toy.Task, "forward", side_effect=AssertionError("a step"))
    line = '{"step": 1}\n'
    odd = [
        ("log.jsonl", b"\xff\xfe{", "line 1: expected text in UTF-8, got b"),
        ("log.jsonl", b"[" * 100000, "line 1: nested too deeply"),
        ("log.jsonl", f"{line}<html>\n{line}".encode(), "line 2: expected an object with a step, got what is not JSON"),
        ("log.jsonl", b'{"step": -1}', "line 1: expected an object with a step"),
        ("log.jsonl", b'{"step": 1' + b"0" * 400 + b"}", "line 1: expected an object with a step"),
        ("log.jsonl", None, "expected a file, found a folder"),
        ("checkpoint.pt", None, "expected a file, found a folder"),
        ("checkpoint.pt", "FIFO", "expected a file, found a FIFO"),
    ]
    for number, (name, content, words) in enumerate(odd):
        folder = tmp_path / str(number)
        folder.mkdir()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            os.mkfifo(folder / name) if content else (folder / name).mkdir()
        with never, pytest.raises(minifocus.InputError, match=rf"{number}/{name}: {words}") as error:
            toy.train(folder, 4)
        assert len(str(error.value)) < 400 and [file.name for file in folder.iterdir()] == [name]
        assert not isinstance(content, bytes) or (folder / name).read_bytes() == content

    mine, out = tmp_path / "mine", tmp_path / "linked"
    mine.write_text(line)
    out.mkdir()
    for name in ("log.jsonl", "checkpoint.pt"):
        (out / name).symlink_to(mine if name == "log.jsonl" else tmp_path / "nowhere")
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").symlink_to(mine)
    (out / "checkpoint.pt").unlink()
    (out / ".unfinished-0").write_text("of a run that was killed")
    (out / "checkpoint.tmp").mkdir()
    toy.train(out, 4)
    assert sorted(file.name for file in out.iterdir()) == ["checkpoint.pt", "checkpoint.tmp", "log.jsonl"]
    assert mine.read_text() == line and not (out / "log.jsonl").is_symlink() and len(read_log(out / "log.jsonl")) == 3

    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for change in ({"steps": -1}, {"parameters": {}}, {"optimizers": [1]}, {"steps": "3"}):
        torch.save({**checkpoint, **change}, out / "checkpoint.pt")
        with never, pytest.raises(minifocus.InputError, match=r"checkpoint\.pt: not a checkpoint of this run: "):
            toy.train(out, 4)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    toy.train(tmp_path, 4)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for much in (2000, 200_000):  # noticed when the file is closed, and while torch writes it
            with pytest.raises(minifocus.InputError, match=r"checkpoint\.pt: cannot be written: File too large"):
                save_checkpoint(tmp_path / "checkpoint.pt", {}, [], {"much": "x" * much}, 1, 0.0, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_the_first_step_does_not_wait_for_the_last(tmp_path: Path) -> None:
    """Nothing is made for steps that are yet to come."""
    taken: list[Any] = []
    share = toy.Batches.share

    def watched(self: Any, numbers: Any, workers: int = 0) -> Any:
        taken.append(numbers)
        return share(self, numbers, workers)

    with mock.patch.object(toy.Batches, "share", watched):
        first = mock.patch.object(toy.Task, "forward", side_effect=minifocus.InputError("the first step"))
        with first, pytest.raises(minifocus.InputError, match="the first step"):
            toy.train(tmp_path, 4, steps=20_000)
    assert not hasattr(taken[0], "__len__")
    batches = Batches(minifocus.load(TINY, "none").processor, CardScenes(), 1, 0, independent=True, max_turns=1)
    stream = batches.share(itertools.count(10**9))
    assert [next(stream).position for _ in range(2)] == [10**9, 10**9 + 1]


def test_a_run_of_any_length_begins_at_once(tmp_path: Path) -> None:
    """Its micro-batches are numbered as they are asked for."""

    class Begun(Exception):
        pass

    class FirstAlone:
        def share(self, numbers: Any, workers: int = 0) -> Any:
            assert list(itertools.islice(iter(numbers), 3)) == [0, 1, 2] and not isinstance(numbers, list)
            raise Begun

    task = torch.nn.Linear(1, 1)
    settings = Settings(steps=10**7, batch=2, micro_batch=1)
    with pytest.raises(Begun):
        loop.fit(task, [], FirstAlone(), settings, tmp_path, torch.device("cpu"), {})
