"""examples/train.py as it is run: interrupted and resumed, shared by two processes, every part frozen or fresh, refused."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from checkpoints import add_tokenizer, build, save
from example_scripts import example
from safetensors.torch import load_file, safe_open, save_file

import minifocus
from minifocus import cards
from minifocus.cards import CardScenes
from minifocus.files import locks
from minifocus.inputs.conversations import read_conversations
from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions
from minifocus.training import loop
from minifocus.training.checkpoint import save_checkpoint
from minifocus.training.examples import Batches
from minifocus.training.log import Log, read_log
from minifocus.training.memory import check_memory
from minifocus.training.objective import AnswerObjective, Objective, draw_guidance
from minifocus.training.processes import Process
from minifocus.training.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights/tiny"
Tensors = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


trainer, draw_cards = example("train"), example("draw_cards")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def train(*arguments: Any) -> Done:
    """The command in this process, but for its setting of glibc, which would stay."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["train.py", "--device", "cpu", *map(str, arguments)]))
        stack.enter_context(mock.patch.object(trainer, "keep_freed_memory", lambda: None))
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


def run(*arguments: Any, processes: int = 1) -> None:
    done = subprocess.run(
        command(*arguments, processes=processes), capture_output=True, text=True, timeout=500, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> Tensors:
    """Of a run's model, the selector's among them."""
    tensors = load_file(folder / "model.safetensors")
    if (folder / "selector.safetensors").exists():
        tensors |= {f"selector.{name}": value for name, value in load_file(folder / "selector.safetensors").items()}
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
    return {"language_model": "llm", "selector": "selector"}.get(name.split(".")[0], "projector")


def figures(folder: Path) -> list[dict[str, Any]]:
    """The log without what no two runs share."""
    return [
        {name: value for name, value in line.items() if name != "seconds"} for line in read_log(folder / "log.jsonl")
    ]


# ------------------------------------------------------------------------------------------------- interrupted, resumed

RESUMED = ["--steps", 6, "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--save-every", 2, "--log-every", 1]
RESUMED += ["--sampler-dropout", 0.3, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(ROOT / "examples/train.py", "--out", out, *RESUMED)
    return out


def test_a_killed_run_goes_on_where_its_checkpoint_is(whole: Path, tmp_path: Path) -> None:
    """In the end, weights and log are those of the run that was not interrupted: bit for bit."""
    out = tmp_path / "killed"
    arguments = command(ROOT / "examples/train.py", "--out", out, *RESUMED)
    killed = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 300
        while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
            assert killed.poll() is None
            time.sleep(0.005)
    finally:
        killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["steps"] in (2, 4) and not (out / "model").exists()
    assert len(figures(out)) < 6

    # Whatever had been written when the process died: a line that is cut off, and one of a step that will be repeated.
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    subprocess.run(arguments, check=True, capture_output=True, env=ENVIRONMENT, timeout=500)
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


# -------------------------------------------------------------------------------------------------- shared by processes


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), text_only=2)


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
    run(ROOT / "examples/train.py", "--out", tmp_path / "two", *arguments, processes=2)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert largest_difference(one, two) <= 1e-5
    assert {part_of(name) for name in changed(weights(TINY), two)} == {"projector", "llm", "selector"}
    assert largest_difference(weights(TINY), two) > 1e-4
    for ours, theirs in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)


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


def test_text_alone_behind_a_frozen_decoder(tmp_path: Path) -> None:
    """Micro-batches that reach nothing that is trained add nothing, in one process as in two."""
    file = write_data(tmp_path, text_only=5)
    arguments = ["--data", file, "--stage", "align", "--steps", 2, "--batch", 4, "--micro-batch", 1, "--max-turns", 2]
    arguments += ["--log-every", 1, "--device", "cpu"]
    done = train("--out", tmp_path / "one", *arguments)
    assert done.code == 0, done.err
    run(ROOT / "examples/train.py", "--out", tmp_path / "two", *arguments, processes=2)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert largest_difference(one, two) <= 1e-5
    start = {name: value for name, value in weights(TINY).items() if part_of(name) != "selector"}
    assert {part_of(name) for name in changed(start, one)} == {"projector"}


TOY = """
import json, sys, types
from pathlib import Path
import torch
from minifocus.training.loop import fit
from minifocus.training.processes import Process
from minifocus.training.settings import Settings

class Task(torch.nn.Module):
    # The mean over a step's targets of a squared error, and the mean over its micro-batches of a penalty.
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.sometimes = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.seen = []

    def forward(self, batch, num_targets, num_batches):
        self.seen.append((batch.number, num_targets, num_batches))
        loss = ((batch.x @ self.weight - 1) ** 2).sum() / num_targets + (self.weight ** 4).sum() / num_batches
        if batch.number % 3 == 0:
            loss = loss + (self.sometimes - batch.number) ** 2 / num_targets
        return loss, {"number": float(batch.number)}

class Batches:
    def share(self, numbers, workers=0):
        for number in numbers:
            x = torch.randn(1 + number % 4, 2, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            yield types.SimpleNamespace(number=number, x=x, num_targets=len(x))

def train(folder, batch, **options):
    task = Task()
    optimizer = torch.optim.SGD([{"params": list(task.parameters()), "lr": 0.02, "peak_lr": 0.02}])
    settings = Settings(**{**dict(steps=3, batch=batch, micro_batch=1, max_grad_norm=1e9, log_every=1), **options})
    folder.mkdir(parents=True, exist_ok=True)
    fit(task, [optimizer], Batches(), settings, folder, torch.device("cpu"), {})
    return task

if __name__ == "__main__":
    process = Process.join(torch.device("cpu"))
    task = train(Path(sys.argv[1]), 4)
    seen = process.gather(task.seen)
    if process.rank == 0:
        result = dict(seen=seen, weights=[p.tolist() for p in task.parameters()])
        (Path(sys.argv[1]) / "result.json").write_text(json.dumps(result))
    process.leave()
    # Where there is /proc: no thread is left that could get in the way of Python's end.
    sys.exit(", ".join(str(t) for t in Path("/proc/self/task").glob("*/comm") if "gloo" in t.read_text()) or 0)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    file = tmp_path_factory.mktemp("toy") / "toy.py"
    file.write_text(textwrap.dedent(TOY))
    spec = importlib.util.spec_from_file_location("toy", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy_targets(step: int, batch: int = 4) -> int:
    return sum(1 + number % 4 for number in range(batch * step, batch * step + batch))


def test_gradients_of_accumulated_and_shared_micro_batches(toy: ModuleType, tmp_path: Path) -> None:
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
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    places = [
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port} for rank in (0, 1)
    ]
    both = [subprocess.Popen(command(toy.__file__, tmp_path / "two"), env={**ENVIRONMENT, **own}) for own in places]
    assert [process.wait(300) for process in both] == [0, 0]
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["weights"] == [pytest.approx(value, rel=1e-12) for value in expected]
    assert result["seen"] == [[[n, toy_targets(n // 4), 4] for n in range(rank, 12, 2)] for rank in (0, 1)]
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert [line["number"] for line in figures(tmp_path / "one")] == pytest.approx([1.5, 1.7, 2.09])


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


def test_the_loop_s_parts(toy: ModuleType, tmp_path: Path) -> None:
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


def test_what_processes_agree_on(toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go on after the same step, and wait for the first for as long as it takes; counters stay on the CPU."""
    toy.train(tmp_path, 4)
    places: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: places.append(k["map_location"]) or load(*a, **k))
    monkeypatch.setattr(Process, "current", lambda: Process(1, 2))
    monkeypatch.setattr(Process, "gather", lambda self, value: [0, value])
    with pytest.raises(minifocus.InputError, match=r"checkpoint.pt: expected one that all processes see, .* \[0, 3\]"):
        toy.train(tmp_path, 4)
    assert places == ["cpu"]

    group = mock.Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    Process.join(torch.device("cpu"))
    assert group.call_args.kwargs["timeout"].total_seconds() > 3600


# ---------------------------------------------------------------------------------------------------- the run's own folder


HOLDER = """
import os, sys, time
from minifocus.files.locks import hold
with hold(sys.argv[1]):
    if os.fork() == 0:  # a process that reads ahead, which may live longer
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no POSIX locks")
def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    """The second ends at once and touches nothing. When the first is killed, its children keep nobody out."""
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = {file: file.read_bytes() for file in out.iterdir()}
        with mock.patch.object(trainer, "load_to_train", side_effect=AssertionError("loaded")):
            done = train("--out", out, *SHORT)
        assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
        assert done.err.startswith(f"error: {out}: process {holder.pid} writes into it: wait for it to end, or name")
        with pytest.raises(minifocus.InputError, match=rf"^{out}: process {holder.pid} writes into it"):
            draw_cards.write_json(out, "train", 1)
        assert {file: file.read_bytes() for file in out.iterdir()} == before and list(before) == [out / ".lock"]
        holder.kill()
        holder.wait(30)
        with locks.hold(out):
            assert (out / ".lock").read_text() == f"{os.getpid()}\n"
        assert not list(out.iterdir())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_s_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a/b"
    with locks.hold(folder):
        with locks.hold(folder), locks.hold(tmp_path):
            assert folder.is_dir()
        raised: list[Exception] = []

        def from_a_thread() -> None:
            try:
                with locks.hold(f"{folder}/../b"):
                    pass
            except minifocus.InputError as error:
                raised.append(error)

        thread = threading.Thread(target=from_a_thread)
        thread.start()
        thread.join()
        assert "another thread of this process writes into it" in str(raised[0])
        assert (folder / ".lock").exists()
    assert not list(tmp_path.iterdir())  # folders that were made for nothing are gone

    mine = tmp_path / "mine"
    mine.write_text("mine")
    for make in (lambda lock: lock.symlink_to(mine), os.mkfifo, Path.mkdir):
        odd = tmp_path / make.__name__.strip("<>") / "odd"
        odd.mkdir(parents=True)
        make(odd / ".lock")
        with pytest.raises(minifocus.InputError, match=r"\.lock: expected the file of a lock, found something else"):
            locks.hold(odd).__enter__()
    for bad in (mine, mine / "below", tmp_path / ("a" * 5000), "/sys/run"):
        with pytest.raises(minifocus.InputError, match="cannot be written: ") as error:
            locks.hold(bad).__enter__()
        assert len(str(error.value)) < 400
    assert mine.read_text() == "mine"

    def none(descriptor: int, what: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with locks.hold(tmp_path):  # NFS without a lock daemon: two runs there are the user's own affair
        assert "no lock keeps other runs from writing into it: No locks available" in caplog.text


def test_what_a_run_finds_in_its_folder(toy: ModuleType, tmp_path: Path) -> None:
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


def test_a_disk_that_is_full_leaves_the_checkpoint_before(toy: ModuleType, tmp_path: Path) -> None:
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


def test_what_a_run_cannot_end_with_is_refused_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a/curve.png").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/model").write_text("mine")
    for out, words in (("a/curve.png", "expected a file or nothing"), ("b/model", "expected a folder or nothing")):
        with mock.patch.object(trainer, "load_to_train", side_effect=AssertionError("loaded")):
            done = train("--out", (tmp_path / out).parent, *SHORT)
        assert done.code == 2 and f"--out: {tmp_path / out}: {words}" in done.err


def test_the_first_step_does_not_wait_for_the_last(toy: ModuleType, tmp_path: Path) -> None:
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


def test_scenes_are_those_of_the_split() -> None:
    assert len(CardScenes(first=cards.SPLIT_SIZE - 5)) == 5 and len(CardScenes()) == cards.SPLIT_SIZE // 2
    with pytest.raises(minifocus.InputError, match="seed: expected 0 to 99999999"):
        CardScenes(first=cards.SPLIT_SIZE)


# ------------------------------------------------------------------------------------------------------ every option once

SHORT = ["--steps", 2, "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--log-every", 1, "--warmup", 0]


def short(out: Path, *arguments: Any) -> Tensors:
    done = train("--out", out, *SHORT, *arguments)
    assert done.code == 0, done.err
    assert str(out / "model") in done.out
    trained = weights(out / "model")
    assert all(bool(value.isfinite().all()) for value in trained.values())
    return trained


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return short(tmp_path_factory.mktemp("runs") / "plain", "--fresh", "projector")


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


def test_a_digest_of_a_model_is_of_its_content(tmp_path: Path) -> None:
    """Of each tensor's ends, too, where there is more than is read; not of how it is written, nor of what is not loaded."""

    def digest() -> str:
        return trainer.digest_of_model(tmp_path, blocks=2, size=8)

    small, large = torch.arange(4.0), torch.arange(100.0)
    found = set()
    for changed in ((), (small, 0), (small, 3), (large, 0), (large, 99)):
        with torch.no_grad():
            if changed:
                changed[0][changed[1]] += 1
        save_file({"small": small, "large": large}, tmp_path / "model.safetensors", {"format": "pt"})
        found.add(digest())
    assert len(found) == 5
    (tmp_path / "model.safetensors").unlink()
    save_file({"small": small}, tmp_path / "model-00001-of-00002.safetensors", {"of": "another", "writer": "this"})
    save_file({"large": large}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"large": "model-00002-of-00002.safetensors", "small": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digest() in found
    save_file({"small": small.view(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    found.add(digest())
    assert len(found) == 6

    for name, contents in {
        "config.json": ('{"a": 1, "b": 2}', '{"b": 2,\n "a": 1}', '{"b": 2, "a": 3}'),
        "chat_template.jinja": ("a", "a", "b"),
        "additional_chat_templates/x.jinja": ("a", "a", "b"),
        "trainer_state.json": ("{}", "[]"),
        "README.md": ("Hello.", "Bye."),
    }.items():
        before = digest()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        digests = []
        for content in contents:
            (tmp_path / name).write_text(content)
            digests.append(digest())
        assert digests[0] == digests[1]
        assert (before != digests[0] and digests[2] != digests[0]) if len(contents) == 3 else before == digests[0]
    selectors = []
    for window in (4, 4, 8):
        (tmp_path / "selector.safetensors").unlink(missing_ok=True)
        save_selector(tmp_path / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions(window=window))
        selectors.append(digest())
    metadata = {"format": "minifocus-selector", "window": "4", "branches": "3", "score_pool": "max"}
    file = tmp_path / "selector.safetensors"
    for _ in range(4):  # as it was written before, in random order
        save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, file, dict(metadata))
        selectors.append(digest())
    assert len(set(selectors)) == 2 and selectors[0] != selectors[2]


def test_gradient_checkpointing_changes_nothing(plain: Tensors, tmp_path: Path) -> None:
    from torch.utils import checkpoint

    with mock.patch.object(checkpoint, "checkpoint", wraps=checkpoint.checkpoint) as recomputed:
        again = short(tmp_path, "--fresh", "projector", "--gradient-checkpointing")
    assert recomputed.call_count == 4 * 4  # layers × micro-batches
    assert largest_difference(plain, again) <= 1e-5


def test_bf16_stays_near(plain: Tensors, tmp_path: Path) -> None:
    """Weights and files stay float32; the decoder's steps go nearly the same way. The projector is new, for there to be
    much to learn: what is left to a trained model is small, and rounding with it."""
    start, half = weights(TINY), short(tmp_path, "--fresh", "projector", "--bf16")
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
    new = ["--fresh", "selector,projector", "--window", 8, "--branches", 7, "--straight-through"]
    with mock.patch.object(trainer, "AnswerObjective", side_effect=AnswerObjective) as objective:
        trained = short(tmp_path, *new, "--option", "text=all", "--option", "score_pool=max")
    model = objective.call_args.args[0]
    assert (model.inside_llm.options.text, model.before_llm.options.score_pool) == ("all", "max")
    start = weights(TINY)
    assert trained["selector.weight"].shape == (7, 64) and trained["selector.bias"].shape == (7,)
    assert trained["selector.weight"].any()
    name = "multi_modal_projector.linear_2.weight"
    assert (trained[name] - start[name]).abs().max() > 0.1 * start[name].abs().max()
    with safe_open(tmp_path / "model/selector.safetensors", "pt") as stored:
        assert stored.metadata()["window"] == "8" and stored.metadata()["branches"] == "7"
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
    trained = {name for name in named if trainer.learning_rate(name, rates, model) > 0}
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
        of_part = {name for name in trained if trainer.learning_rate(name, only, model) > 0}
        assert of_part and all(
            part_of(name.removeprefix("model.").replace("before_llm.", "")) == part.removesuffix("_bias")
            for name in of_part
        )


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("refused")
    record = json.loads(data.read_text())[0] | {"id": "0"}
    for name, image in (("lost", "lost.png"), ("torn", "file"), ("away", str(folder / "file"))):
        (folder / f"{name}.json").write_text(json.dumps([record | {"image": image}]))
    llava = save(build("llava", seed=1), folder / "llava")
    silent = save(build("llava_next", seed=1), folder / "silent")
    save_selector(silent / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions())
    add_tokenizer(llava)
    (folder / "file").write_text("")
    files = {name: folder / f"{name}.json" for name in ("lost", "torn", "away")}
    return SimpleNamespace(folder=folder, data=data, llava=llava, silent=silent, **files)


BAD: list[tuple[Sequence[Any], str]] = [
    (["--model", "nowhere"], "nowhere: expected the folder of a model, found nothing"),
    (["--model", "{silent}"], "silent has none"),
    (["--out", "{folder}/file"], "{folder}/file: cannot be written: Not a directory"),
    (["--device", "abacus"], "device: 'abacus' is not usable here"),
    (["--device", "cuda:99"], "device: 'cuda:99' is not usable here"),
    (["--data", "none.json"], "none.json: expected a JSON file, found nothing"),
    (["--data", "{data}", "--images", "none"], "none: expected a folder with pictures"),
    (["--data", "{lost}"], "lost.json: record 0: image: {folder}/lost.png: no such file"),
    (["--data", "{lost}", "--skip-unusable"], "lost.json: record 0: image: {folder}/lost.png: no such file"),
    (["--data", "{torn}"], "conversation '0': {folder}/file: not a picture that can be read: "),
    (["--data", "{torn}", "--workers", 1], "(skip_unusable leaves such a conversation out)"),
    (["--data", "{torn}", "--skip-unusable"], "data: expected a usable conversation, got 1 that are not"),
    (["--data", "{data}", "--max-tokens", 3], "; expected its answer to begin within 3 (skip_unusable"),
    (["--skip-unusable"], "--skip-unusable: expected --data beside it, got True"),
    (["--images-anywhere"], "--images-anywhere: expected --data beside it, got True"),
    (
        ["--data", "{away}"],
        "away.json: record 0: image: expected a name inside of {folder} (images_anywhere takes others)",
    ),
    (["--data", "{away}", "--images-anywhere"], "conversation '0': {folder}/file: not a picture that can be read: "),
    (
        ["--data", "{data}", "--validate", 1, "--validation-data", "{away}"],
        "away.json: record 0: image: expected a name",
    ),
    (["--data", "{data}", "--dense"], "--dense: expected no --data"),
    (["--data", "{data}", "--first-scene", 2], "--first-scene: expected no --data"),
    (["--data", "{data}", "--validate", 2], "--validate: expected --validation-data beside it, got 2"),
    (["--data", "{data}", "--validate", 2, "--validation-data", "none.json"], "none.json: expected a JSON file"),
    (
        ["--data", "{data}", "--validation-data", "{data}"],
        "--validation-data: expected --validate beside it, got {data}",
    ),
    (["--images", "."], "--images: expected --data beside it, got ."),
    (["--validation-data", "x"], "--validation-data: expected --data beside it, got x"),
    *(
        ([f"--{option}", value], f"--{option}: expected a number of at least {least}, got {value}")
        for least, options in (
            (1, "steps batch micro-batch max-turns max-tokens save-every log-every validate-every"),
            (0, "seed first-scene workers validate weight-decay final-lr lr-vision lr-projector lr-llm lr-selector"),
        )
        for option in options.split()
        for value in [least - 1 if least else "-1.0" if option.startswith(("lr", "weight", "final")) else -1]
    ),
    (["--lr-selector-bias", "-0.5"], "--lr-selector-bias: expected a number of at least 0, got -0.5"),
    (["--lr-llm", "nan"], "--lr-llm: expected a number of at least 0, got nan"),
    (["--lr-llm", "inf"], "--lr-llm: expected a number of at most 1e+06, got inf"),
    (["--warmup", "1.5"], "--warmup: expected a share from 0 to 1, got 1.5"),
    (["--warmup", "nan"], "--warmup: expected a share from 0 to 1, got nan"),
    (["--beta2", "1"], "--beta2: expected a number from 0 to below 1, got 1.0"),
    (["--max-grad-norm", "0"], "--max-grad-norm: expected a number above 0, got 0.0"),
    (["--selector-bias", "nan"], "--selector-bias: expected a number of at least -1e+06, got nan"),
    (["--selector-bias", "2"], "--selector-bias: expected a new selector"),
    (["--selector-bias", "2", "--sampler", "text"], "--selector-bias: expected a new selector"),
    (["--alpha", "0.5", "--stage", "align"], "--alpha: sampler 'none' has no selector"),
    (["--scale-weights", "1,1,1", "--sampler", "text"], "--scale-weights: sampler 'text' has no selector"),
    (["--batch", 5, "--micro-batch", 2], "batch: expected a multiple of micro_batch x processes = 2 x 1, got 5"),
    (["--freeze", "tower"], "--freeze: expected some of vision, projector, llm, selector, got 'tower'"),
    (["--freeze", "vision,projector,llm,selector"], "learning rates: expected at least one above 0"),
    (["--fresh", "llm"], "--fresh: expected some of projector, selector, got 'llm'"),
    (["--window", 5], "window: "),
    (["--window", 5, "--fresh", "selector"], "window: expected one of 1, 2, 4, 8, 12, got 5"),
    (["--branches", 5, "--fresh", "selector"], "branches: expected 3 or 7, got 5"),
    (["--thumbnail", "drop", "--sampler", "text"], "--thumbnail: sampler 'text' has no such option"),
    (["--straight-through", "--sampler", "none"], "--straight-through: sampler 'none' has no such option"),
    (["--sampler", "fastv"], "sampler: FastV acts inside the language model and is not for training"),
    (["--sampler", "random", "--option", "window=2"], "window: not an option of sampler 'random'"),
    (
        ["--fresh", "selector", "--option", "gamma=0.5"],
        "--option: gamma is drawn for every sample: expected its range as",
    ),
    (["--sampler", "text", "--option", "layer=1"], "drawn for every sample: expected its range as --layers"),
    (["--fresh", "selector", "--option", "size=3"], "size: not an option of sampler 'text'; its options: "),
    (["--fresh", "selector", "--sampler", "vision", "--option", "text=all"], "text: not an option of sampler 'none'"),
    (["--window", "2", "--option", "window=4"], "--option: expected NAME=VALUE, each name once, got 'window=4'"),
    (["--thumbnail", "drop", "--model", "{llava}"], "thumbnail: LLaVA-1.5 has no thumbnail to drop"),
    (["--alpha", "-1"], "alpha: expected a number of at least 0 and at most 1e+06, got -1.0"),
    (["--gamma", "0.9"], "--gamma: expected 2 numbers with commas between, got '0.9'"),
    (["--gamma", "0.9,0.5"], "gamma: expected a range between 0 and 1, got 0.9 to 0.5"),
    (["--layers", "a,b"], "--layers: expected 2 numbers with commas between, got 'a,b'"),
    (["--layers", "0.5,1.5"], "layers: expected a range between 0 and 1, got 0.5 to 1.5"),
    (["--scale-weights", "1,one,1"], "--scale-weights: expected numbers with commas between, got '1,one,1'"),
    (["--scale-weights", "1,1"], "scale_weights: expected 3, one per scale, got 2"),
    (["--scale-weights", "1,1,inf"], "scale_weights: expected numbers of at least 0"),
    (["--sampler-dropout", "2"], "sampler_dropout: expected a probability, got 2.0"),
    (["--device", "meta"], "device: 'meta' is not usable here"),
    (["--fresh", "projector", "--seed", 10**20], "--seed: expected a number of at most 9.22337e+18, got 1000000"),
    (["--steps", 10**4000], "--steps: expected a number of at most 9.22337e+18, got a whole number of 13288 bits"),
    (["--batch", 10**30], "--batch: expected a number of at most 1.04858e+06"),
    (["--workers", 10**6], "--workers: expected a number of at most 1000"),
    (["--lr-llm", "1e38"], "--lr-llm: expected a number of at most 1e+06, got 1e+38"),
    (["--weight-decay", "1e400"], "--weight-decay: expected a number of at most 1e+06, got inf"),
    (["--selector-bias", "1e39"], "--selector-bias: expected a number of at most 1e+06, got 1e+39"),
    (["--alpha", "inf"], "alpha: expected a number of at least 0 and at most 1e+06, got inf"),
    (["--first-scene", 10**8], "seed: expected 0 to 99999999, a scene of the split, got 100000000"),
    (["--out", ""], "--out: expected the name of a folder, got"),
    (["--images", "a" * 5000], "--images: expected --data beside it, got aaaa"),
    (["--gamma", "a" * 5000], "--gamma: expected 2 numbers with commas between, got 'aaaa"),
    (["--freeze", "a" * 5000], "--freeze: expected some of vision, projector, llm, selector, got 'aaaa"),
    (["--model", "a" * 5000], "expected the folder of a model, found a name that cannot be used"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(map(str, arguments))[:50] for arguments, _ in BAD])
def test_bad_arguments(places: SimpleNamespace, tmp_path: Path, arguments: Sequence[Any], words: str) -> None:
    done = train("--out", tmp_path, "--steps", 1, *(str(word).format(**vars(places)) for word in arguments))
    assert done.code == 2 and not done.out
    assert done.err.startswith("error: ") and words.format(**vars(places)) in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err and len(done.err) < 1000, done.err


@pytest.mark.parametrize("arguments", [["--stage", "tune"], ["--steps", "many"], ["--sampler", "best"], ["--unknown"]])
def test_what_argparse_refuses(tmp_path: Path, arguments: list[str]) -> None:
    done = train("--out", tmp_path, *arguments)
    assert done.code == 2 and f"error: {'argument ' * (arguments != ['--unknown'])}" in done.err
    assert arguments[0] in done.err and "Traceback" not in done.err


def test_as_a_command(tmp_path: Path) -> None:
    """The exit code and the line of an error as a shell sees them."""
    arguments = command(ROOT / "examples/train.py", "--out", "new", "--steps", 0)
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --steps: expected a number of at least 1, got 0\n"
    assert not list(tmp_path.iterdir())


def test_training_behind_a_method_without_parameters(tmp_path: Path) -> None:
    method = ["--sampler", "similarity", "--option", "ratio=0.4", "--option", "flip=true"]
    done = train("--out", tmp_path / "run", *method, "--steps", 1, "--batch", 2, "--micro-batch", 2)
    assert done.code == 0, done.err
    (line,) = figures(tmp_path / "run")
    assert line["tokens"] == pytest.approx(0.4, abs=0.01)
    assert not (tmp_path / "run/model/selector.safetensors").exists()


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
