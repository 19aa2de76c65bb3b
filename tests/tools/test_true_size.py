"""experiments/true_size: its folders have the published shapes, it runs, goes on and cleans up, and weights are not copied."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import Forked, python

import minifocus
from examples.command_line import Refused
from experiments.true_size import __main__ as program
from experiments.true_size import folder as folders
from experiments.true_size import report
from experiments.true_size.folder import made_folder
from experiments.true_size.models import MODELS, QUICK
from minifocus.loading.config import read_config
from minifocus.loading.json_fields import JsonFields
from minifocus.loading.weights import shapes_of, without_values
from minifocus.model import LlavaNetwork

ROOT = Path(__file__).resolve().parents[2]
BILLIONS = {
    "llava-v1.6-vicuna-7b": 7.06,
    "llava-v1.6-mistral-7b": 7.57,
    "llama3-llava-next-8b": 8.36,
}  # as the hub says
# Weights of a few hundred kilobytes, for what is not about their size.
SMALL = replace(QUICK, text={**QUICK.text, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_the_published_ones(name: str) -> None:
    """As transformers makes a model of the same config.json, and as many parameters as the hub counts."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = MODELS[name].config()
    ours = shapes_of(
        without_values(lambda: LlavaNetwork(read_config(JsonFields(config, "config.json"), Path("nowhere"))))
    )
    with torch.device("meta"):
        theirs = LlavaNextForConditionalGeneration(LlavaNextConfig(**config))
    count = sum(value.numel() for value in theirs.parameters())
    assert round(count / 1e9, 2) == BILLIONS[name]
    renamed = {}
    for key, value in theirs.state_dict().items():
        key = key.removeprefix("model.").replace("language_model.", "language_model.model.")
        renamed["language_model." + key if key.startswith("lm_head") else key] = tuple(value.shape)
    assert ours == renamed
    assert config["text_config"]["max_position_embeddings"] >= 2928  # visual tokens of a picture of 672 × 672


def run(*arguments: str | Path, module: str = "experiments.true_size") -> subprocess.CompletedProcess[str]:
    return python("-m", module, *arguments)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --quick --keep leaves."""
    runs = tmp_path_factory.mktemp("true-size")
    done = run("--quick", "--keep", "--dtype", "bf16", "--runs", runs, "--out", runs / "out")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in runs.iterdir()} == {"quick", "out"}
    return runs


def test_what_is_measured(quick: Path) -> None:
    record = json.loads((quick / "out/results.json").read_text(encoding="utf-8"))
    none, focus = record["questions"]
    assert (none["sampler"], focus["sampler"], none["side"], len(none["rounds"])) == ("none", "focus", 112, 1)
    assert record["model"]["parameters"] * 2 < record["model"]["bytes"] < record["model"]["parameters"] * 2 + 1e5
    for one in none["rounds"] + focus["rounds"]:
        seconds, memory = one["seconds"], one["memory"]
        assert seconds["first_token"]["wall"] > seconds["tower"]["wall"] > 0 and seconds["token"]["processor"] > 0
        # Every weight was in memory: mapped pages are in the one figure, and not in the other.
        assert memory["resident"] > record["model"]["bytes"] > memory["first_token"]
        assert one["text"]  # random tokens are read as text
    tokens = none["rounds"][0]["tokens"]
    assert tokens["equivalent"] == 1 and tokens["full"] == 64 + 8 * 9  # the thumbnail, and a map with newlines
    assert report.time_ratio(none, record) == report.flops_ratio(none, record) == 1
    assert focus["rounds"][0]["tokens"]["equivalent"] < 0.8 and report.flops_ratio(focus, record) < 0.9
    page = (quick / "out/README.md").read_text(encoding="utf-8")
    assert f"Made by `{record['command']}`" in page and report.tables(record) in page and "GB: met." in page
    assert 'selector="variance"' in page and "random weights in the exact shapes" in page


def beside(memory: dict[str, int]) -> int:
    """Anonymous memory above what the imports take."""
    return max(memory["load"], memory["first_token"], memory["answer"]) - memory["imports"]


def test_memory_beside_the_weights(quick: Path) -> None:
    """Of 2 GB beside the 14 GB of a model of 7 billion parameters, a seventh, this one has its share, and 32 MB for what does not
    grow with a model, such as the tokenizer. Weights that are copied, as another dtype has them, take more."""
    record = json.loads((quick / "out/results.json").read_text(encoding="utf-8"))
    used = [run["memory"] for one in record["questions"] for run in one["rounds"]]
    assert len(used) == 2 and all(beside(memory) < record["model"]["bytes"] / 7 + 32e6 for memory in used), used

    command = ("--folder", quick / "quick", "--samplers", "none", "--sides", "56", "--rounds", "1", "--dtype", "fp32")
    done = run(*command, "--runs", quick / "runs", "--out", quick / "copied")
    assert done.returncode == 0, done.stderr
    assert "| 56² | `none` | 136 of 136 |" in done.stdout and "bar" not in done.stdout
    copied = json.loads((quick / "copied/results.json").read_text(encoding="utf-8"))
    assert beside(copied["questions"][0]["rounds"][0]["memory"]) > 2 * record["model"]["bytes"]
    assert (quick / "quick/config.json").is_file() and not (quick / "runs").exists()  # it was not made for that run


def test_a_killed_run_leaves_no_folder(tmp_path: Path) -> None:
    command = ["-m", "experiments.true_size", "--quick", "--rounds", "1000", "--runs", tmp_path]
    with Forked(command, [{}], [ROOT]) as running:
        begun = time.monotonic()
        while not (tmp_path / "quick/model.safetensors.index.json").exists():
            assert running.running() and time.monotonic() - begun < 300
            time.sleep(0.05)
        os.kill(running.pids[0], signal.SIGTERM)
        assert running.wait(120) == [130] and "Traceback" not in running.err()
    assert not (tmp_path / "quick").exists()


def arguments_of(*words: str) -> Any:
    with mock.patch.object(sys, "argv", ["true_size", *words]):
        return program.parse_arguments()


def test_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the questions that are left; another run's answers are not mixed in."""
    monkeypatch.setattr(program, "QUICK", SMALL)
    asked: list[tuple[str, int]] = []

    def answer(folder: Path, sampler: str, side: int, _: Any) -> dict[str, Any]:
        assert minifocus.load(folder, "none").num_visual_tokens((side, side)) > 0
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((sampler, side))
        return found(len(asked))

    def found(number: int, processor: float = 1.0) -> dict[str, Any]:
        return {"number": number, "seconds": {"first_token": {"wall": 1.0, "processor": processor}}, "threads": 1}

    def answer_again(_: Path, sampler: str, side: int, __: Any) -> dict[str, Any]:
        asked.append((sampler, side))
        return found(9, 0.1 if len(asked) == 1 else 1.0)  # other work had the processors

    monkeypatch.setattr(program, "ask", answer)
    words = ("--quick", "--sides", "56,112", "--rounds", "2", "--runs", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        program.measure(arguments_of(*words))
    assert [file.name for file in tmp_path.iterdir()] == ["unfinished-quick-own.json"]
    with (
        mock.patch.object(sys, "argv", ["true_size", "other"]),
        pytest.raises(Refused, match="other arguments: delete it"),
    ):
        program.measure(arguments_of(*words))

    first, asked[:] = asked[:], []
    monkeypatch.setattr(program, "ask", answer_again)
    record = program.measure(arguments_of(*words))
    assert "goes on after 3 questions" in capsys.readouterr().err
    assert first == [("none", 56), ("focus", 56), ("none", 112)] and asked == [("focus", 112), *first, ("focus", 112)]
    numbers = [[one["number"] for one in question["rounds"]] for question in record["questions"]]
    assert numbers == [[1, 9], [2, 9], [3, 9], [9, 9]] and not list(tmp_path.iterdir())
    assert record["watched"] == {"rounds": 2, "disturbed": 1, "repeated": 0}
    (tmp_path / "unfinished-quick-own.json").write_text("{", encoding="utf-8")
    with pytest.raises(Refused, match="unfinished-quick-own.json: expected an unfinished run"):
        program.measure(arguments_of(*words))


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is looked at before; what is written is deleted when it is not enough after all. Others' folders stay."""
    usage = shutil.disk_usage(tmp_path)
    with (
        mock.patch.object(shutil, "disk_usage", return_value=usage._replace(free=15_100_000_000)),
        pytest.raises(Refused, match=r"take 14\.1 GB.*expected 16\.1 GB of room, got 15\.1 GB"),
        made_folder(MODELS["llava-v1.6-vicuna-7b"], tmp_path / "large", False),
    ):
        raise AssertionError
    monkeypatch.setattr(folders, "write_shard", mock.Mock(side_effect=OSError(28, os.strerror(28))))
    with pytest.raises(OSError, match="No space"), made_folder(SMALL, tmp_path / "small", True):
        raise AssertionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(Refused, match="mine: is there already"), made_folder(SMALL, tmp_path / "mine", False):
        raise AssertionError
    assert (tmp_path / "mine").is_dir()


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than a shard's bytes there are several, in pieces of any size; the numbers are as large as they should be."""
    monkeypatch.setattr(folders, "SHARD_BYTES", 1_500_000)
    monkeypatch.setattr(folders, "PIECE", 1000)
    with made_folder(SMALL, tmp_path / "small", False) as folder:
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        model = minifocus.load(folder, "none")
        deviation = {name: float(value.detach().float().std()) for name, value in model.named_parameters()}
    assert deviation["language_model.model.embed_tokens.weight"] == pytest.approx(0.5, rel=0.02)
    assert deviation["language_model.lm_head.weight"] == pytest.approx(4 / 32**0.5, rel=0.02)
    assert deviation["vision_tower.encoder.layers.0.mlp.fc2.weight"] == pytest.approx(1 / 256**0.5, rel=0.02)
    assert deviation["language_model.model.norm.weight"] == pytest.approx(0.2, rel=0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "int3"], "dtype: expected one of float32"),
        (["--device", "nowhere"], "device: 'nowhere' is not usable here"),
        (["--sides", "336,0"], "--sides: expected numbers of pixels with commas between, got 336,0"),
        (["--samplers", "text,nothing"], "--samplers: expected some of"),
        (["--folder", "x", "--layers", "3"], "--layers: is of a folder that is made"),
        (["--quick", "--model", "llama3-llava-next-8b"], "--quick: has a model of its own"),
        (["--image", "nowhere.png"], "nowhere.png: "),
        (["--folder", "nowhere"], "--folder: expected a folder, found nothing"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_what_is_refused_before_any_work(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["true_size", "--runs", str(tmp_path / "runs"), *words])
    for module, name in ((signal, "signal"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, mock.Mock())  # pytest keeps its own
    try:
        code = program.main()
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2 and said in capsys.readouterr().err and not (tmp_path / "runs").exists()
