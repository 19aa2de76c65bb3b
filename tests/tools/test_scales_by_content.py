"""The measure of where samplers look: kinds of regions, and what counts as covered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import last_line, python

from experiments import accuracy
from experiments.scales_by_content import asked_thing, covered, region_kinds
from minifocus import cards
from minifocus.inputs.token_layout import Layout
from minifocus.trace import PictureTrace

ROOT = Path(__file__).resolve().parents[2]


def test_kinds_of_regions() -> None:
    scene = cards.draw(11, dense=True)
    kinds = region_kinds(scene, 4)
    assert set(np.unique(kinds)) == {0, 1, 2}
    empty = cards.Scene(0, scene.image, [], [])
    assert kinds.shape == region_kinds(empty, 4).shape and not region_kinds(empty, 4).any()
    shapes = cards.Scene(0, scene.image, [o for o in scene.objects if not o.text], [])
    assert region_kinds(shapes, 4).max() <= 1
    glyphs = sum(len(thing.text) for thing in scene.objects)
    assert 0.8 * glyphs <= (region_kinds(scene, 1) == 2).sum() <= glyphs  # seldom do two share a patch
    cells = region_kinds(scene, 1)
    for window in (2, 4, 8, 12):
        of_window = region_kinds(scene, window)
        assert of_window.shape == tuple(-(-side // window) for side in cells.shape)
        for row, col in np.ndindex(of_window.shape):
            own = cells[row * window : (row + 1) * window, col * window : (col + 1) * window]
            assert of_window[row, col] == own.max()


def test_the_thing_that_is_asked_about() -> None:
    """It is in the scene, and its text is the answer."""
    kinds = set()
    for seed in range(40):
        scene = cards.draw(seed)
        for q in (q for q in scene.questions if q.family == "read"):
            (thing,) = [thing for thing in scene.objects if thing.name == asked_thing(q.question)]
            assert thing.text == q.answer
            kinds.add(thing.kind)
    assert kinds == {"card", "sign", "row"}


@pytest.mark.parametrize(
    ("kept", "places", "expected"),
    [
        ([4], [4], True),
        ([4], [5], False),
        (
            [7],
            [7, 8, 11, 12],
            True,
        ),  # a 2x2 pooling at row 1, column 0: places 7, 8 and, a row and a newline on, 11, 12
        ([7], [9], False),
        ([4, 7], [4, 12], True),
        ([0, 6], [4], False),  # a thumbnail's token and a newline cover nothing
    ],
)
def test_covered(kept: list[int], places: list[int], expected: bool) -> None:
    layout = Layout(
        3, 3, 3, newlines=True, thumbnail_width=3, num_plain=15
    )  # rows at 3 … 5, 7 … 9, 11 … 13; newlines 6, 10, 14
    entered = torch.tensor([0, 4, 6, 7])
    extent = torch.tensor([[1, 1], [1, 1], [1, 1], [2, 2]])
    trace = PictureTrace(layout, None, entered, extent, torch.tensor(kept), torch.zeros(4))
    assert covered(trace, np.array(places)) is expected


def test_the_recorded_accuracy_is_written_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["accuracy", "--count", "6", "--dense-count", "8", "--out", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(accuracy, "last_line", last_line)
    assert accuracy.main() == 0
    made = json.loads((tmp_path / "a.json").read_text())
    recorded = json.loads((ROOT / "experiments/results/accuracy.json").read_text())
    assert recorded.keys() == made.keys() and recorded["where"].keys() == made["where"].keys()
    assert recorded["results"]["dense"]["focus"]["count"] == 2000


def test_command() -> None:
    done = python("-m", "experiments.scales_by_content", "--count", 3, "--line")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["questions"] == 3 and set(result["scales"]) == {"empty", "things", "text"}
    for kind, shares in result["scales"].items():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3) or not result["regions"][kind]
