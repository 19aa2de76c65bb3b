"""What the README says is run: its links, its commands on the embedded model, its Python, its make targets."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minifocus

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "weights/README.md",
        "reproduction/README.md",
        "reproduction/notes.md",
        "examples/lmms_eval/README.md",
    )
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake (\w+)", "".join(page.read_text() for page in PAGES)))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_on_the_embedded_model(tmp_path: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    ours = [
        shlex.split(line, comments=True)[1:]
        for line in commands
        if line.startswith("python examples/") and "--model" not in line
    ]
    assert len(ours) >= 4
    for folder in ("examples", "weights"):  # what the commands write goes elsewhere
        (tmp_path / folder).symlink_to(ROOT / folder)
    for arguments in ours:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_the_operators_benchmark() -> None:
    command = [sys.executable, "benchmarks/operators.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    recorded = json.loads((ROOT / "experiments/results/operators_cpu.json").read_text())
    assert [case["operator"] for case in report["cases"]] == [case["operator"] for case in recorded["cases"]]
    assert all(bar["met"] for case in recorded["cases"] for bar in case["bars"].values())


def test_the_methods_table_is_the_record_s() -> None:
    record = json.loads((ROOT / "experiments/results/compare.json").read_text())
    found = {(one["method"], one["budget"]): one["accuracy"] for one in record["results"]}
    lines = (ROOT / "README.md").read_text().split("| | 50 % | 39 % | 25 % |\n", 1)[1].splitlines()[1:]
    rows = [line.strip("| ").split("|") for line in lines[: lines.index("")]]
    assert len(rows) >= 10
    for name, *cells in rows:
        method = re.sub(r"[`*]", "", name).strip().replace(", flipped", " (flipped)")
        for budget, cell in zip((0.5, 0.39, 0.25), cells, strict=False):
            if cell.strip():
                assert cell.strip(" *") == f"{100 * found[method, budget]:.1f}", (method, budget)


def test_the_recorded_mutants_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change that the script makes still applies, and the record is of these: none has survived."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from mutate_kernels import mutants

    record = json.loads((ROOT / "experiments/results/mutants.json").read_text())
    assert [(row["file"], row["mutant"]) for row in record["mutants"]] == [mutant[:2] for mutant in mutants()]
    assert {row["outcome"] for row in record["mutants"]} == {"noticed"}
    assert f"({len(record['mutants'])} lines" in (ROOT / "README.md").read_text()


def test_options_of_the_commands_on_your_own_model() -> None:
    """Those need a checkpoint that is not here: their options at least are those of --help."""
    commands = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if "--model" in line]
    tried = 0
    for line in commands:
        words = shlex.split(line, comments=True)
        script = next(word for word in words if word.startswith("examples/"))
        shown = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in words[words.index(script) + 1 :]:
            if option.startswith("--"):
                assert option in shown, line
                tried += 1
    assert tried > 10


def test_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    code, _ = blocks("python")
    model = minifocus.load("weights/tiny", sampler="none")
    assert model.image_processor is not None and model.tokenizer is not None
    from minifocus.inputs.open_image import open_image

    pixels, size = model.image_processor(open_image("examples/cards.png"))
    names = {
        "input_ids": torch.tensor([[1] + [model.config.image_token_id] * model.num_visual_tokens(size) + [5, 6]]),
        "pixel_values": pixels[None],
        "image_sizes": torch.tensor([size]),
        "attention_mask": None,
    }
    exec(compile(code, "README.md", "exec"), names)
    assert "TokenCounts(full=" in capsys.readouterr().out
    assert len(names["answers"]) == 2 and names["logits"].shape[:2] == names["input_ids"].shape  # type: ignore[arg-type,union-attr]


def test_python_of_the_operators() -> None:
    _, code = blocks("python")
    names = {
        "cells": torch.randn(6 * 5, 8),
        "grid_hw": torch.tensor([[6, 5]]),
        "choice": torch.tensor([0, 1, 2, 0]),
        "q": torch.randn(3, 4, 128),
        "k": torch.randn(30, 2, 128),
        "cu_text": torch.tensor([0, 3]),
        "cu_visual": torch.tensor([0, 30]),
        "hidden": torch.randn(30, 16),
        "positions": torch.arange(30),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["tokens"]) == len(names["source"]) == 1 + 2 + 8 + 1  # type: ignore[arg-type]
    assert torch.equal(names["positions"], names["index"]) and len(names["hidden"]) == int(names["count"])  # type: ignore[arg-type]
