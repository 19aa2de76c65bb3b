"""The check for NaN and infinity: every value is looked at, whatever is neighbour to what, and its thread ends with the load."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import build, save
from safetensors.torch import load_file, save_file

import minifocus
from minifocus.loading import finite

pytestmark = pytest.mark.timeout(30)
KEY = "language_model.model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(), tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "m")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def checkers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("minifocus-check")]


def neighbours(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of one memory, with a gap, in another order than they lie there; and some of other memory."""
    memory = torch.arange(100).to(dtype)
    return [memory[40:70], memory[:25], memory[25:40], memory[71:], torch.ones(3, 5, dtype=dtype), memory[3:3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [8, 64, 2**30])
def test_every_value_is_looked_at(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "PIECE", piece)
    tensors = neighbours(dtype)
    told: list[int] = []
    with finite.checking(tensors) as all_finite:
        assert all_finite(told.append)
    assert sum(told) == sum(value.nbytes for value in tensors) and max(told) <= max(piece, 69 * dtype.itemsize)
    for value in tensors:
        for place in {0, value.numel() // 2, value.numel() - 1} if value.numel() else ():
            before = value.view(-1)[place].clone()
            value.view(-1)[place] = (math.nan, math.inf, -math.inf)[place % 3]
            with finite.checking(tensors) as all_finite:
                assert not all_finite(told.append)
            value.view(-1)[place] = before


def test_neighbours_of_another_dtype_are_apart() -> None:
    """What is finite in bfloat16 would be infinite in float16."""
    memory = torch.full((32,), 0x7C00, dtype=torch.int16)
    halves, brain = memory[:16].view(torch.float16).fill_(1), memory[16:].view(torch.bfloat16)
    assert brain.isfinite().all() and brain.view(torch.float16).isinf().all()
    with finite.checking([halves, brain]) as all_finite:
        assert all_finite(lambda size: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # as it is stored, and converted
def test_a_bad_weight_is_refused_every_time_and_by_eight_at_once(folder: Path, dtype: str) -> None:
    change_weights(folder, lambda t: t[KEY].view(-1)[7].fill_(math.nan))

    def load(_: int) -> str:
        with pytest.raises(minifocus.CheckpointError) as error:
            minifocus.load(folder, "none", dtype=dtype)
        return str(error.value)

    with ThreadPoolExecutor(8) as pool:
        said = set(pool.map(load, range(8))) | {load(0)}
    assert said == {f"{folder / 'model.safetensors'}: {KEY}: holds NaN or infinite values (as {getattr(torch, dtype)})"}
    assert not checkers()


def test_the_first_of_several_is_named_also_of_a_tied_head(folder: Path) -> None:
    """A NaN differs from itself, so that a tied head with one is no copy of the embeddings."""
    embeddings = "language_model.model.embed_tokens.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[embeddings][3, 3] = math.nan
        tensors["language_model.lm_head.weight"] = tensors[embeddings].clone()

    change_weights(folder, change)
    config = (folder / "config.json").read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    assert "true" in config
    (folder / "config.json").write_text(config)
    with pytest.raises(minifocus.CheckpointError, match="lm_head.weight: holds NaN"):
        minifocus.load(folder, "none")


def test_the_check_ends_with_a_load_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For another reason, while the weights are looked at: nothing more is begun, and no thread is left."""
    change_weights(folder, lambda t: t.pop(KEY))
    monkeypatch.setattr(finite, "PIECE", 64)
    begun, refused = [], threading.Event()

    def slow(value: torch.Tensor) -> bool:
        begun.append(value.nbytes)
        time.sleep(0.01)
        return refused.wait(20)

    def named(*_: Any) -> None:
        refused.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(finite, "is_finite", slow)
    monkeypatch.setattr("minifocus.loading.weights.check_names_and_shapes", named)
    with pytest.raises(KeyboardInterrupt):
        minifocus.load(folder, "none")
    pieces = (folder / "model.safetensors").stat().st_size / 64
    assert pieces > 1000 and len(begun) < pieces / 2  # to which it would come after 5 s and more
    assert not checkers()


def test_the_model_is_made_while_its_weights_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else this would wait for ever: the check ends once the model is there."""
    made = threading.Event()
    whole = finite.is_finite
    monkeypatch.setattr(finite, "is_finite", lambda value: made.wait(20) and whole(value))
    fill = minifocus.loading.weights._fill

    def filled(*arguments: Any) -> None:
        fill(*arguments)
        made.set()

    monkeypatch.setattr("minifocus.loading.weights._fill", filled)
    assert minifocus.load(folder, "none").dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"check_finite": False}, {"dtype": "bfloat16"}])
def test_progress_counts_every_byte_once(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "PIECE", 4096)
    steps: list[tuple[int, int]] = []
    minifocus.load(folder, "none", progress=lambda done, total: steps.append((done, total)), **options)
    stored = sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert steps[-1] == (stored, stored) and {total for _, total in steps} == {stored}
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
