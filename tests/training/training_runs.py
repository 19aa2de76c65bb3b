"""Runs of examples/train.py for the tests: in this process or as a command, and what they leave."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from example_scripts import example
from safetensors.torch import load_file
from several import Several

from minifocus.training.log import read_log

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights/tiny"
Tensors = dict[str, torch.Tensor]
trainer, draw_cards = example("train"), example("draw_cards")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def train(*arguments: Any) -> Done:
    """The command in this process, but for its setting of glibc, which would stay, and its picture.

    To draw that takes as long as all the rest. Those that run as programs do, and test_resume.py looks at it.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["train.py", "--device", "cpu", *map(str, arguments)]))
        stack.enter_context(mock.patch.object(trainer, "keep_freed_memory", lambda: None))
        stack.enter_context(mock.patch.object(trainer, "draw_curve"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            code = trainer.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def command(*arguments: Any, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def by_torchrun(*arguments: Any) -> None:
    """Two processes of the command, started as a user does."""
    words = command(ROOT / "examples/train.py", *arguments, processes=2)
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def by_two(*arguments: Any) -> None:
    """The same, forked after the imports."""
    with Several(2, "train", *arguments) as two:
        assert two.wait(500) == [0, 0], two.all_said()


def weights(folder: Path) -> Tensors:
    """Of a model, with what its sampler has learned: of the embedded one the selector, as no run here begins with its router."""
    tensors = load_file(folder / "model.safetensors")
    for part in ("selector",) if folder == TINY else ("selector", "router"):
        file = folder / f"{part}.safetensors"
        tensors |= {f"{part}.{name}": value for name, value in load_file(file).items()} if file.exists() else {}
    return tensors


def changed(before: Tensors, after: Tensors) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def largest_difference(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def part_of(name: str) -> str:
    if name.startswith("vision_tower."):
        return "unused" if "post_layernorm" in name else "vision"
    return {"language_model": "llm", "selector": "selector", "router": "router"}.get(name.split(".")[0], "projector")


def figures(folder: Path) -> list[dict[str, Any]]:
    """The log without what no two runs share."""
    return [
        {name: value for name, value in line.items() if name != "seconds"} for line in read_log(folder / "log.jsonl")
    ]


def write_data(folder: Path, text_only: int = 0) -> Path:
    """Three drawn scenes, and conversations about no picture."""
    draw_cards.write_json(folder, "train", 3)
    file = folder / "cards.json"
    records = json.loads(file.read_text())
    for number in range(text_only):
        said = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": "a number"}]
        records.append({"id": f"text {number}", "conversations": said * 2})
    file.write_text(json.dumps(records))
    return file


SHORT = ["--steps", 2, "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--log-every", 1, "--warmup", 0]


def short(out: Path, *arguments: Any) -> Tensors:
    done = train("--out", out, *SHORT, *arguments)
    assert done.code == 0, done.err
    assert str(out / "model") in done.out
    trained = weights(out / "model")
    assert all(bool(value.isfinite().all()) for value in trained.values())
    return trained
