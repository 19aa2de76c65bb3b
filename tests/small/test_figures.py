"""experiments/small/figures.py: its statistics against rules written out a second time, and a quick run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forked import python
from PIL import Image
from scipy.stats import spearmanr

import minifocus
from examples.command_line import Refused
from experiments.small import figures, importance_maps, report
from experiments.small.photographs import pieces
from experiments.small.selector_inputs import NORMS, selector_inputs, statistics
from experiments.small.speed import ordered_methods
from experiments.timing import remark

ROOT = Path(__file__).resolve().parents[2]


def test_every_method_is_timed() -> None:
    assert {*ordered_methods(), "none"} == set(minifocus.methods.names()) - {"avg-llava"}


def test_pieces_are_all_different() -> None:
    found = [image.tobytes() for image, _ in pieces(20)]
    assert len(set(found)) == 20


def test_statistics_of_inputs_that_are_known() -> None:
    """One number for a token, one for a region, and one for both, each on its own."""
    generator = torch.Generator().manual_seed(0)
    by_token, by_region = torch.randn(64, generator=generator), torch.randn(49, 1, generator=generator)
    found = statistics(by_token.expand(49, 64))
    expected = {"common": 1, "level": 0, "own": 0, "common_squares": 1}
    expected |= {"mean": float(by_token.mean()), "std": float(by_token.std(correction=0))}
    assert found == pytest.approx(expected, abs=1e-6)
    assert statistics(by_region.expand(49, 64))["level"] == pytest.approx(1)
    product = statistics((by_region - by_region.mean()) * (by_token - by_token.mean()))
    assert product["own"] == pytest.approx(1) and product["common_squares"] == pytest.approx(0, abs=1e-6)


def test_inputs_are_the_paper_s() -> None:
    whole, thumbnail = torch.randn(6, 9, 32), 3 + torch.randn(25, 32)
    scores = selector_inputs(whole, thumbnail, "none")
    assert scores.shape == (2 * 3, 25)
    last = whole[4:, 8:].amax((0, 1))
    torch.testing.assert_close(scores[-1], thumbnail @ last / 32**0.5)
    cosine = selector_inputs(whole, thumbnail, "cosine")
    torch.testing.assert_close(cosine[-1], torch.cosine_similarity(thumbnail, last[None]))
    layer = selector_inputs(whole, thumbnail, "layer")
    torch.testing.assert_close(layer, torch.nn.functional.layer_norm(scores, [25], eps=0))


def test_concentration_and_rank_correlation() -> None:
    assert importance_maps.concentration(torch.ones(200)) == pytest.approx({"entropy": 1, "top": 0.1})
    alone = torch.zeros(200).index_fill(0, torch.tensor([7]), 3.0)
    assert importance_maps.concentration(alone) == pytest.approx({"entropy": 0, "top": 1})
    a, b = torch.rand(2, 300)
    assert importance_maps.rank_correlation(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic)


def test_importance_of_all_layers_is_that_of_each() -> None:
    """One pass that removes nothing gives what the text-guided sampler gives at γ = 1, layer by layer."""
    model = minifocus.load(ROOT / "weights/tiny", "none")
    asked = (Image.open(ROOT / "examples/cards.png").convert("RGB"), "What number is on the red card?")
    scores, layout = importance_maps.importance_by_layer(model, asked)
    for layer, own in enumerate(scores):
        model.set_sampler("text", layer=layer, gamma=1.0)
        torch.testing.assert_close(own, model.generate(*asked, max_new_tokens=1).pictures[0].importance, equal_nan=True)
    cell = importance_maps.on_the_map(scores[0], layout)[2, 3]
    assert cell == scores[0][layout.leading + 2 * layout.row_length + 3]


def test_drawn_layers() -> None:
    assert importance_maps.drawn_layers(30) == [0, 3, 7, 11, 15, 19, 23, 27]
    for depth in (1, 6, 8, 12, 40):
        drawn = importance_maps.drawn_layers(depth)
        assert drawn[0] == 0 and drawn[-1] < depth and len(drawn) <= importance_maps.DRAWN


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--methods focus,typo", "--methods: expected some of"),
        ("--methods focus --batched text", "--batched: expected some of focus, got text"),
        ("--batch 21", "--batch: expected a number of at most 20, got 21"),
        ("--rounds 0", "--rounds: expected a number of at least 1, got 0"),
    ],
)
def test_a_mistyped_argument_is_named(tmp_path: Path, arguments: str, said: str) -> None:
    done = python("-m", "experiments.small.figures", "--out", tmp_path, *arguments.split())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SMALL", tmp_path)
    with pytest.raises(Refused, match="`make small` makes it"):
        figures.load("next")


def test_the_recorded_page_is_its_record_s() -> None:
    folder = ROOT / "experiments/results/small"
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == report.page(record, folder / "README.md")
    assert {one["method"] for one in record["speed"]["alone"]} == set(minifocus.methods.names()) - {"avg-llava"}


def test_quick_run(tmp_path: Path) -> None:
    words = ("--quick", "--batched", "random", "--out", tmp_path)
    done = python("-m", "experiments.small.figures", *words, timeout=600)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "README.md", "importance-by-layer.png"}
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == report.page(record, tmp_path / "README.md")
    for way, names in (("alone", ["none", "vision", "random"]), ("batch", ["none", "random"])):
        results = record["speed"][way]
        found = {one["method"]: one for one in results}
        assert list(found) == names
        none = found["none"]
        assert none["prefill_ratio"] == none["decode_ratio"] == none["tokens"]["equivalent"] == 1
        assert found["random"]["tokens"]["equivalent"] == pytest.approx(record["speed"]["budget"], abs=0.01)
        for one in results:
            assert one["decode_seconds_per_token"] > 0 and 0 < one["gflops"] <= none["gflops"]
            assert min(one["whole_call"]["processor"]) > 0
            assert one["prefill_ratio"] == pytest.approx(one["prefill_seconds"] / none["prefill_seconds"])
    notes = [record["speed"][way] for way in ("alone_watched", "batch_watched")]
    assert [note["rounds"] for note in notes] == [1, 1] and remark(*notes) in (tmp_path / "README.md").read_text()
    layers = record["importance"]["layers"]
    assert len(layers) == 30
    for one in layers:
        assert 0 < one["entropy"] <= 1 and importance_maps.TOP <= one["top"] <= 1
        assert -1 <= one.get("saliency", 0) <= 1
    for side in ("photographs", "miniature"):
        for features in ("tower", "projected"):
            own = record["selector_inputs"][side][features]
            assert own["none"]["std"] > 0 and abs(own["cosine"]["mean"]) <= 1
            assert own["layer"]["mean"] == pytest.approx(0, abs=1e-4)
            assert own["layer"]["std"] == pytest.approx(1, abs=1e-3)
            for norm in NORMS:
                parts = own[norm]
                assert parts["common"] + parts["level"] + parts["own"] == pytest.approx(1)
                assert min(parts["common"], parts["level"], parts["own"], parts["common_squares"]) >= -1e-6
    assert 10_000 < (tmp_path / "importance-by-layer.png").stat().st_size < 500_000
