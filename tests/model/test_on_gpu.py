"""The models on a GPU: what they compute there is what they compute on the CPU, and the programs run there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sharing_program import CARDS, OTHER, QUESTION, ROOT, TINY, ask_all, described, logits_of

import minifocus
from minifocus import ops
from minifocus.errors import CheckpointError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """With the compiled operators, and float32's products in float32, as torch has them by default."""
    assert ops.BACKENDS["cuda"] == "native", "the compiled CUDA operators are missing"
    assert not torch.backends.cuda.matmul.allow_tf32
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # of the tower's convolution
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_every_method_answers_as_on_a_cpu() -> None:
    on_cpu, on_gpu = (ask_all(minifocus.load(TINY, "none", device)) for device in ("cpu", "cuda"))
    on_cpu.pop("batch"), on_gpu.pop("batch")  # a GPU draws other numbers
    assert on_gpu.keys() == on_cpu.keys()
    for name, answer in on_cpu.items():
        assert on_gpu[name] == answer, name


def test_a_batch_is_answered_as_its_questions_alone() -> None:
    model = minifocus.load(TINY, "focus", "cuda")
    asked = [(CARDS, QUESTION), (None, "What is red?"), ([CARDS, CARDS], OTHER), (CARDS, OTHER)]
    batch = model.generate_batch(*zip(*asked, strict=True), max_new_tokens=8)
    for (picture, question), answer in zip(asked, batch, strict=True):
        assert described(answer) == described(model.generate(picture, question, max_new_tokens=8))
    drawn = [
        [one.token_ids for one in model.generate_batch([CARDS] * 2, [QUESTION] * 2, temperature=3.0, seed=seed)]
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_logits_are_those_of_a_cpu(dtype: str) -> None:
    """Within a few roundings of the dtype."""
    expected, found = (
        logits_of(minifocus.load(TINY, "none", device, dtype)).float().cpu() for device in ("cpu", "cuda")
    )
    rounding = {"float32": 2e-6, "float16": 2e-3}.get(dtype, 2e-2)
    assert (found - expected).abs().max() <= 4 * rounding * expected.std()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_a_folder_of_int4_weights_loads_there(tmp_path: Path) -> None:
    """Written out by a model on the GPU, too."""
    model = minifocus.load(TINY, "text", "cuda", "int4")
    model.save(tmp_path / "int4")
    again = minifocus.load(tmp_path / "int4", "text", "cuda")
    assert torch.equal(logits_of(model), logits_of(again))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tensors, name = load_file(TINY / "model.safetensors"), "language_model.model.layers.3.mlp.up_proj.weight"
    tensors[name][-1, -1] = value
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        minifocus.load(tmp_path, "none", "cuda").generate(CARDS, QUESTION)


def run(script: str, *arguments: Any, alone: bool = False) -> str:
    """What examples/`script` prints, with NCCL's environment of one process unless it is `alone`."""
    with socket.create_server(("localhost", 0)) as free:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), "--device", "cuda", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **({} if alone else place)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


TRAIN = ("--steps", 3, "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--log-every", 1, "--warmup", 0)


def test_a_shared_model_trains_as_a_whole_one(tmp_path: Path) -> None:
    """Of one process, by NCCL; in float32, and a run that went on from its checkpoint."""
    options = (*TRAIN, "--no-bf16")
    run("train.py", *options, "--out", tmp_path / "whole", alone=True)
    run("train.py", *options, "--out", tmp_path / "shared", "--shard", "--gradient-checkpointing")
    run("train.py", *options, "--out", tmp_path / "again", "--shard", "--steps", 2, "--save-every", 1)
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "shared") == pytest.approx(expected, rel=2e-4)
    model = minifocus.load(tmp_path / "shared/model", "focus", "cuda")
    assert model.generate(CARDS, QUESTION, max_new_tokens=8).tokens.full > 0


def test_training_in_bfloat16_with_lora_and_shares(tmp_path: Path) -> None:
    run("train.py", *TRAIN, "--out", tmp_path / "lora", "--shard", "--bf16", "--lora-rank", 4, "--lora-merge")
    run("train.py", *TRAIN, "--out", tmp_path / "whole", "--bf16", "--lora-rank", 4, alone=True)
    assert losses(tmp_path / "lora") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)
    merged = minifocus.load(tmp_path / "lora/model", "focus", "cuda")
    assert merged.generate(CARDS, QUESTION, max_new_tokens=8).text


def test_a_file_of_questions_and_tensor_parallel_decoding(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [{"id": n, "image": CARDS.name, "question": question} for n, question in enumerate((QUESTION, OTHER) * 3)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "answers.jsonl"
    run("generate.py", "--file", questions, "--images", CARDS.parent, "--out", out, "--batch-size", 4)
    model = minifocus.load(TINY, "focus", "cuda")
    answers = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    assert answers == [model.generate(CARDS, line["question"], max_new_tokens=128).text for line in lines]
    said = run("generate.py", "--tensor-parallel", "--prompt", OTHER)
    assert model.generate(CARDS, OTHER).text in said
