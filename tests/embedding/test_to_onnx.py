"""examples/to_onnx.py: the parts that ONNX Runtime runs, and what it says where one is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from compiled import ROOT
from example_scripts import example

from minifocus.export.parts import HeadPart


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: object) -> int:
    script = example("to_onnx")
    for name, value in changes.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(sys, "argv", ["to_onnx.py", str(ROOT / "weights/tiny"), "--out", str(folder)])
    return script.main()


def test_parts_for_onnx_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path) == 0
    said = capsys.readouterr().out
    assert {file.stem for file in tmp_path.glob("*.onnx")} == {"picture", "layer", "last", "step", "head"}
    assert said.count(".onnx: takes ") == 5


def test_a_part_that_is_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, TOLERANCE=0.0, parts_of=lambda model: {"head": HeadPart(model)}) == 1
    assert "head.onnx: expected what the model computes, got values off by " in capsys.readouterr().err
