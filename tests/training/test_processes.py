"""Two processes train as one does. What happens when one dies: see test_faults.py."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_task as toy
from several import Several
from training_runs import (
    TINY,
    by_torchrun,
    by_two,
    changed,
    figures,
    largest_difference,
    part_of,
    train,
    weights,
    write_data,
)

import minifocus
from minifocus.distributed.processes import Process
from minifocus.inputs.conversations import read_conversations
from minifocus.training.examples import Batches
from minifocus.training.objective import Objective, draw_guidance

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_processes_equal_one(data: Path, tmp_path: Path) -> None:
    """Weights but for the order of sums, and the log; some micro-batches leave out the selector, others all pictures."""
    seed = 20
    arguments = ["--data", data, "--steps", 3, "--batch", 4, "--micro-batch", 1, "--max-turns", 2, "--log-every", 1]
    arguments += ["--sampler-dropout", 0.5, "--seed", seed, "--warmup", 0]
    arguments += [word for part in ("projector", "llm", "selector") for word in (f"--lr-{part}", 1e-4)]
    arguments += ["--freeze", "vision", "--device", "cpu"]

    # Of each step, whether the two micro-batches after which gradients are exchanged have a picture, and one that is pooled.
    model, objective = minifocus.load(TINY, "focus"), Objective(sampler_dropout=0.5)
    batches = Batches(model.processor, read_conversations(data), 1, seed)
    last = [(4 * step + 2, 4 * step + 3) for step in range(3)]
    pictures = [tuple(bool(batches.conversation(n).images) for n in pair) for pair in last]
    pooled = [tuple(draw_guidance(objective, 4, seed, n, 1, model).pooled[0] for n in pair) for pair in last]
    assert pictures == [(False, False), (True, False), (True, True)] and pooled[2] == (True, False)

    done = train("--out", tmp_path / "one", *arguments)
    assert done.code == 0, done.err
    by_torchrun("--out", tmp_path / "two", *arguments)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert largest_difference(one, two) <= 1e-5
    assert {part_of(name) for name in changed(weights(TINY), two)} == {"projector", "llm", "selector"}
    assert largest_difference(weights(TINY), two) > 1e-4
    for ours, theirs in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)


def test_text_alone_behind_a_frozen_decoder(tmp_path: Path) -> None:
    """Micro-batches that reach nothing that is trained add nothing, in one process as in two."""
    file = write_data(tmp_path, text_only=5)
    arguments = ["--data", file, "--stage", "align", "--steps", 2, "--batch", 4, "--micro-batch", 1, "--max-turns", 2]
    arguments += ["--log-every", 1, "--device", "cpu"]
    done = train("--out", tmp_path / "one", *arguments)
    assert done.code == 0, done.err
    by_two("--out", tmp_path / "two", *arguments)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert largest_difference(one, two) <= 1e-5
    start = {name: value for name, value in weights(TINY).items() if part_of(name) != "selector"}
    assert {part_of(name) for name in changed(start, one)} == {"projector"}


def toy_targets(step: int, batch: int = 4) -> int:
    return sum(1 + number % 4 for number in range(batch * step, batch * step + batch))


def test_gradients_of_accumulated_and_shared_micro_batches(tmp_path: Path) -> None:
    """Plain gradient descent on the step's whole loss, whatever the number of processes: no factor is lost in averages."""
    weight, sometimes = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    batches = list(toy.Batches().share(range(12)))
    for step in range(3):
        own, targets = batches[4 * step : 4 * step + 4], toy_targets(step)
        w, s = weight.clone().requires_grad_(), sometimes.clone().requires_grad_()
        loss = sum(((batch.x @ w - 1) ** 2).sum() for batch in own) / targets + (w**4).sum()
        loss = loss + sum((s - batch.number) ** 2 for batch in own if batch.number % 3 == 0) / targets
        loss.backward()
        factor = 0.5 * (1 + math.cos(math.pi * step / 3))
        assert w.grad is not None and s.grad is not None
        weight, sometimes = weight - 0.02 * factor * w.grad, sometimes - 0.02 * factor * s.grad
    expected = [weight.tolist(), sometimes.tolist()]

    task = toy.train(tmp_path / "one", 4)
    assert [p.tolist() for p in task.parameters()] == [pytest.approx(value, rel=1e-12) for value in expected]
    assert task.seen == [(number, toy_targets(number // 4), 4) for number in range(12)]
    with Several(2, Path(toy.__file__), tmp_path / "two") as both:
        assert both.wait() == [0, 0], both.all_said()
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["weights"] == [pytest.approx(value, rel=1e-12) for value in expected]
    assert result["seen"] == [[[n, toy_targets(n // 4), 4] for n in range(rank, 12, 2)] for rank in (0, 1)]
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert [line["number"] for line in figures(tmp_path / "one")] == pytest.approx([1.5, 1.7, 2.09])


def test_what_processes_agree_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go on after the same step; counters stay on the CPU."""
    toy.train(tmp_path, 4)
    places: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: places.append(k["map_location"]) or load(*a, **k))
    monkeypatch.setattr(Process, "current", lambda: Process(1, 2))
    monkeypatch.setattr(Process, "gather", lambda self, value: [0, value])
    monkeypatch.setattr(Process, "alone", lambda self, folder: nullcontext())
    with pytest.raises(minifocus.InputError, match=r"checkpoint.pt: expected one that all processes see, .* \[0, 3\]"):
        toy.train(tmp_path, 4)
    assert places == ["cpu"]
