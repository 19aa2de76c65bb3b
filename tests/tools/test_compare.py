"""experiments/compare.py runs, and its counts are right."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forked import python
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minifocus
from experiments import compare, flops, memory
from experiments.timing import remark

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights/tiny"


def test_flops_are_torch_s_count_of_the_same_forward_pass() -> None:
    """PyTorch counts every product of matrices, and of attention the whole square of both."""
    model = minifocus.load(TINY, "none")
    tower, tokens, tiles = model.vision_tower, 77, 3
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):  # of other kernels' operations it knows nothing on a CPU
        with FlopCounterMode(display=False) as counter:
            features = model.multi_modal_projector(tower.features(tower(torch.randn(tiles, 3, 112, 112))))
        assert len(features) == tiles
        assert counter.get_total_flops() == flops.vision_flops(model.config, tiles)
        x = torch.randn(1, tokens, model.config.text.hidden_size)
        cos, sin = model.language_model.model.rope(torch.arange(tokens)[None], x.dtype)
        with FlopCounterMode(display=False) as counter:
            for layer in model.language_model.model.decoder_layers():
                x = layer(x, cos, sin)
            model.language_model.lm_head(x[:, -1])
    assert counter.get_total_flops() == flops.decoder_flops(
        model.config, [tokens] * model.config.text.num_hidden_layers
    )


def test_the_router_s_flops_are_counted() -> None:
    """Written out: a layer's four projections, its two products and its MLP, and then the router's MLP, of each view's slots."""
    model = minifocus.load(TINY, "none")
    model.begin_sampler("avg-llava")
    width, slots, views = 128, 4 + 8 + 16 + 32 + 64 + 32, 3
    layer = 2 * slots * (4 + 2) * width**2 + 4 * slots**2 * width
    votes = 2 * slots * (width**2 + 5 * width) + 2 * slots * 5
    assert flops.router_flops(model.before_llm, views) == views * (layer + votes)
    model.set_sampler("avg-llava", granularity="coarsest")
    assert flops.router_flops(model.before_llm, views) == flops.router_flops(None, views) == 0


def test_every_training_free_method_is_compared() -> None:
    compared = {*compare.KNOWN, *compare.SEARCHED, "vision", "avgpool", "maxpool"} - set(compare.VARIANTS)
    assert compared | {"none", "avg-llava"} == set(minifocus.methods.names())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--timed 0", "--timed: expected a number of at least 1, got 0"),
        ("--methods focus,typo", "got typo"),
        ("--budgets 0.5,half", "--budgets: expected numbers with commas between"),
        ("--image examples/cards.png", "--image: expected --model without --count"),
        ("--random --count 5", "--count: is of accuracy"),
        ("--trained weights/tiny", "--trained: expected NAME=DIR or NAME=DIR:METHOD, got 'weights/tiny'"),
        (
            "--trained focus=weights/tiny",
            "--trained: expected names of their own, no method's and each once, got focus",
        ),
        ("--trained a=x --trained a=y", "--trained: expected names of their own, no method's and each once, got a, a"),
        ("--random --trained a=x", "--trained: expected --model or the embedded model beside it"),
        ("--quick --trained a=nowhere:focus", "nowhere: expected the folder of a model"),
        ("--model weights/tiny --image nowhere.png --methods random", "nowhere.png"),
    ],
)
def test_a_mistyped_argument_is_named(arguments: str, said: str) -> None:
    done = python("-m", "experiments.compare", *arguments.split(), timeout=120)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("slope", [0.5, 1.0, 5.0])
def test_a_budget_is_found_along_any_curve(slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        gamma = 0.0

        def set_sampler(self, method: str, gamma: float) -> None:
            Model.gamma = gamma

    monkeypatch.setattr(compare, "equivalent", lambda model, asked: 0.1 + 0.8 * model.gamma**slope)
    for budget in (0.2, 0.39, 0.75):
        found = compare.search(Model(), "focus", budget, [], {})
        assert 0.1 + 0.8 * found["gamma"] ** slope == pytest.approx(budget, abs=compare.TOLERANCE + 1e-3)
    assert compare.search(Model(), "focus", 0.05, [], {}) is None


@pytest.mark.parametrize("most, finish", [(16, "stop"), (2, "length")])
def test_decoding_steps_are_those_that_were_run(most: int, finish: str) -> None:
    model, rows = minifocus.load(TINY, "none"), []
    model.language_model.lm_head.register_forward_hook(lambda *given: rows.append(1))
    answer = model.generate(ROOT / "examples/cards.png", "What number is on the red card?", max_new_tokens=most)
    assert answer.finish == finish and compare.decoding_steps(answer) == len(rows) - 1


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux shows it")
def test_memory_of_a_call_does_not_depend_on_the_call_before() -> None:
    def blocks(count: int) -> list[torch.Tensor]:
        return [torch.ones(15_000) for _ in range(count)]  # small enough for the C library to keep what is freed

    def call() -> int | None:
        return memory.extra_memory(lambda: blocks(1000), False)[1]

    first = call()
    pin = blocks(3000)[-1]  # above what is freed, which therefore stays with the process
    assert [first, call()] == pytest.approx([60e6, 60e6], rel=0.2)
    assert len(pin)


@pytest.mark.parametrize("of_one_s_own", [False, True])
def test_quick_run(of_one_s_own: bool, tmp_path: Path) -> None:
    """On the embedded model; on another one, which has no selector, beside two that are trained."""
    file = tmp_path / "compare.json"
    command = ["-m", "experiments.compare", "--quick", "--out", file]
    if of_one_s_own:
        folder = shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("selector.safetensors"))
        command += ["--model", folder, "--count", 16, "--jobs", 1]
        minifocus.load(TINY, "avg-llava").save(tmp_path / "a:b")
        command += ["--trained", f"same={TINY}", "--trained", f"routed={tmp_path / 'a:b'}:avg-llava"]
        command += ["--methods", "focus,random"]
    done = python(*command, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    results = {one["method"]: one for one in record["results"]}
    assert set(results) == {"none", "focus", "random", *(("same", "routed") if of_one_s_own else ("fastv",))}
    if of_one_s_own:
        same, routed = results.pop("same"), results.pop("routed")
        for name in ("tokens", "gflops", "accuracy", "families"):
            assert same[name] == results["none"][name]
        assert same["trained"] == "none" and routed["trained"] == "avg-llava" and routed["budget"] < 1
        assert routed["tokens"]["equivalent"] < 1 and routed["gflops"] != same["gflops"]
        assert 0.2 < same["prefill_ratio"] < 5
    for name, one in results.items():
        budget = 1.0 if name == "none" else 0.39
        # Of focus it depends on the four scenes that a quick run asks about; of the others on their options alone.
        assert one["options"].get("selector") == ("variance" if of_one_s_own and name == "focus" else None)
        assert one["tokens"]["equivalent"] == pytest.approx(budget, abs=0.2 if name == "focus" else 0.02)
        assert 0 < one["gflops"] <= results["none"]["gflops"]
        assert one["prefill_seconds"] > 0 and one["decode_seconds_per_token"] > 0
        assert 0 <= one["accuracy"] <= 1 and set(one["families"]) <= {"read", "perceive", "reason", "relate"}
        assert {len(one["whole_call"][clock]) for clock in ("rounds", "processor", "waiting")} == {2}
        assert min(one["whole_call"]["rounds"]) > 0 and min(one["whole_call"]["processor"]) > 0
    assert file.with_suffix(".png").stat().st_size > 10_000
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert page == compare.page(record) and page.startswith(compare.table(record["results"]))
    assert page.rstrip().splitlines()[-1] == remark(record["rounds"]) and record["rounds"]["rounds"] == 2
