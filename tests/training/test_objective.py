"""The loss: the balance loss (Eq. 3 to 5 and 10), how samplers are drawn (Eq. 9), and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_examples import DEPTH, random_example

import minifocus
from minifocus.cards import CardScenes
from minifocus.training.examples import Batches, collate
from minifocus.training.objective import AnswerObjective, Objective, draw_guidance
from minifocus.training.packed import forward
from minifocus.training.sampler_loss import balance_loss

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"


def brute_force_balance(
    z: list[list[float]], alpha: float, weights: Sequence[float], shares: Sequence[float] | None = None
) -> float:
    """Eq. 3 to 5 and 10 by loops, with `shares` in place of f_s if given."""
    total = 0.0
    for s in range(len(z[0])):
        first_largest = [min(i for i, value in enumerate(row) if value == max(row)) for row in z]
        f = sum(chosen == s for chosen in first_largest) / len(z) if shares is None else shares[s]
        p = sum(math.exp(row[s] - max(row)) / sum(math.exp(value - max(row)) for value in row) for row in z) / len(z)
        total += weights[s] * f * p
    return alpha * total


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[list[float]], list[float], float]:
    """Logits, of which many are equal, weights that sum to their number, and alpha."""
    branches = draw(st.sampled_from([2, 3, 7]))
    value = st.one_of(st.integers(-2, 2).map(float), st.floats(-30, 30, width=32))
    row = st.lists(value, min_size=branches, max_size=branches)
    z = draw(st.lists(row, min_size=1, max_size=4))
    raw = draw(st.lists(st.floats(0, 4), min_size=branches, max_size=branches).filter(lambda w: sum(w) > 0.1))
    return z, [branches * w / sum(raw) for w in raw], draw(st.floats(0, 2))


@settings(max_examples=40)
@given(routings())
def test_balance_loss_and_its_gradient_are_the_equations(case: tuple[list[list[float]], list[float], float]) -> None:
    """The gradient goes through P_s alone: f_s counts, and is a constant of it. (f_s is a float32 whatever the logits are.)"""
    z, weights, alpha = case
    logits = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    loss = balance_loss(logits, alpha, torch.tensor(weights, dtype=torch.float64))
    assert float(loss.detach()) == pytest.approx(brute_force_balance(z, alpha, weights), rel=2e-7, abs=1e-15)
    even = balance_loss(logits.detach(), alpha)
    assert float(even) == pytest.approx(brute_force_balance(z, alpha, [1] * len(z[0])), rel=2e-7, abs=1e-15)

    (gradient,) = torch.autograd.grad(loss, logits)
    chosen = [row.index(max(row)) for row in z]
    shares = [chosen.count(s) / len(z) for s in range(len(z[0]))]
    step = 1e-5
    for r in range(len(z)):
        for s in range(len(z[0])):
            above, below = [list(row) for row in z], [list(row) for row in z]
            above[r][s] += step
            below[r][s] -= step
            rise = brute_force_balance(above, alpha, weights, shares) - brute_force_balance(
                below, alpha, weights, shares
            )
            assert float(gradient[r, s]) == pytest.approx(rise / (2 * step), rel=1e-6, abs=1e-8)


def test_the_objective_s_balance_loss(folder: Path) -> None:
    """Its weights are made to sum to their number; over all regions of the micro-batch, in equal parts of a step's."""
    model = minifocus.load(folder, "focus")
    batch = collate([random_example(model, [(57, 91)], 0), random_example(model, [(30, 90)], 1)])
    measured = []
    for alpha, weights in ((0.0, None), (0.3, None), (0.3, (2.0, 1.0, 3.0)), (0.3, (4.0, 2.0, 6.0))):
        task = AnswerObjective(model, Objective(alpha=alpha, scale_weights=weights), 0).train()
        loss, figures = task(batch, 7, 5)
        measured.append(float(loss.detach()))
        output = forward(model, batch, draw_guidance(task.objective, DEPTH, 0, 0, 2, model))
        z = torch.cat([p.logits for own in output.pictures for p in own if p.logits is not None])
        expected = brute_force_balance(z.double().tolist(), alpha, [1.0, 0.5, 1.5] if weights else [1.0] * 3)
        assert figures["balance_loss"] == pytest.approx(expected, rel=1e-5)
        shares = [figures[name] for name in ("scale_4x4", "scale_2x2", "scale_1x1")]
        assert shares == pytest.approx([float((z.argmax(1) == s).float().mean()) for s in range(3)])
        assert measured[-1] == pytest.approx(measured[0] + expected / 5, rel=1e-5)
        answers = F.cross_entropy(output.logits, output.targets, reduction="sum")
        assert measured[0] == pytest.approx(float(answers.detach()) / 7, rel=1e-5)
        # The mean over a step's micro-batches of what is logged is what is minimised, however uneven they are.
        assert figures["loss"] / 5 == pytest.approx(measured[0], rel=1e-5)
    assert measured[2] == pytest.approx(measured[3])
    with pytest.raises(minifocus.InputError, match="scale_weights: expected 3, one per scale, got 2"):
        AnswerObjective(model, Objective(scale_weights=(1.0, 1.0)), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-0.1), "alpha: expected .* got -0.1"),
        (dict(alpha=math.nan), "alpha: "),
        (dict(scale_weights=(0.0, 0.0, 0.0)), "scale_weights: "),
        (dict(scale_weights=(1.0, -1.0, 3.0)), "scale_weights: "),
        (dict(gamma=(0.0, 0.5)), "gamma: expected a range between 0 and 1, got 0.0 to 0.5"),
        (dict(gamma=(0.9, 0.5)), "gamma: "),
        (dict(gamma=(0.5, 1.1)), "gamma: "),
        (dict(layers=(-0.1, 0.5)), "layers: "),
        (dict(layers=(0.5, math.nan)), "layers: "),
        (dict(sampler_dropout=1.5), "sampler_dropout: expected a probability, got 1.5"),
    ],
)
def test_objective_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        Objective(**options)


def test_maps_without_regions_have_no_balance_loss(folder: Path) -> None:
    model = minifocus.load(folder, "focus")
    if model.config.anyres:
        task = AnswerObjective(model, Objective(), 0).train()
        loss, figures = task(collate([random_example(model, [(1, 400)], 0)]), 7, 5)
        assert bool(loss.isfinite()) and "balance_loss" not in figures


def test_samplers_that_are_not_for_training_are_refused(folder: Path) -> None:
    for name in ("fastv", "aim"):
        with pytest.raises(minifocus.InputError, match="sampler: .* acts inside the language model and is not for"):
            AnswerObjective(minifocus.load(folder, name), Objective(), 0)


BOTH = SimpleNamespace(before_llm=object(), inside_llm=object())


def test_guidance_is_drawn_from_the_paper_s_range() -> None:
    drawn = draw_guidance(Objective(), 32, seed=3, position=0, size=3000, model=BOTH)  # type: ignore[arg-type]
    layers = np.bincount([-1 if layer is None else layer for layer in drawn.layer], minlength=33)
    assert not layers[:8].any() and not layers[25:].any()  # 8 … 24 of 32, both ends included, all alike
    assert layers[8:25].min() > 120 and layers[8:25].max() < 240
    assert 0.75 <= min(drawn.gamma) < 0.752 and 0.948 < max(drawn.gamma) <= 0.95
    assert np.mean(drawn.gamma) == pytest.approx(0.85, abs=0.005)
    assert all(drawn.pooled)

    other = Objective(layers=(0.0, 1.0), gamma=(0.3, 0.3))
    small = draw_guidance(other, 4, 0, 0, 200, BOTH)  # type: ignore[arg-type]
    assert set(small.layer) == {0, 1, 2, 3} and set(small.gamma) == {0.3}
    assert set(draw_guidance(Objective(), 4, 0, 0, 200, BOTH).layer) == {1, 2, 3}  # type: ignore[arg-type]
    for share in (0.9, 1.0):  # a range above the last layer is the last layer
        last = Objective(layers=(share, 1.0))
        assert set(draw_guidance(last, 4, 0, 0, 20, BOTH).layer) == {3}  # type: ignore[arg-type]


def test_sampler_dropout() -> None:
    for share, of_map, of_all in ((0.0, 0, 0), (1.0, 1, 1), (0.3, 0.3, 0.3)):
        drawn = draw_guidance(Objective(sampler_dropout=share), 32, 0, 0, 2000, BOTH)  # type: ignore[arg-type]
        without_map = [not pooled for pooled in drawn.pooled]
        without_text = [layer is None for layer in drawn.layer]
        both = [a and b for a, b in zip(without_map, without_text, strict=True)]
        assert np.mean(without_map) == pytest.approx(of_map, abs=0.04)
        assert np.mean(without_text) == pytest.approx(of_all, abs=0.04)
        assert np.mean(both) == pytest.approx(of_map * of_all, abs=0.03)  # each for itself
    for before, inside in ((None, object()), (object(), None)):
        part = SimpleNamespace(before_llm=before, inside_llm=inside)
        drawn = draw_guidance(Objective(), 32, 0, 0, 20, part)  # type: ignore[arg-type]
        assert all(pooled == (before is not None) for pooled in drawn.pooled)
        assert all((layer is None) == (inside is None) for layer in drawn.layer)


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_guidance_follows_from_seed_and_position(seed: int, position: int, sizes: list[int]) -> None:
    """The same however the examples are shared out among micro-batches."""
    objective = Objective(sampler_dropout=0.5)

    def draw(seed: int, position: int, size: int) -> list[Any]:
        drawn = draw_guidance(objective, 32, seed, position, size, BOTH)  # type: ignore[arg-type]
        return list(zip(drawn.pooled, drawn.layer, drawn.gamma, strict=True))

    whole = draw(seed, position, sum(sizes))
    at, pieces = position, []
    for size in sizes:
        pieces += draw(seed, at, size)
        at += size
    assert pieces == whole
    assert draw(seed + 1, position, sum(sizes)) != whole
    assert draw(seed, position + 1, sum(sizes)) != whole


def test_a_selector_trained_alone_survives_a_batch_without_pooled_pictures() -> None:
    """Neither decoder nor projector has a gradient then: the loss must still have one to go back from."""
    model = minifocus.load(TINY, "focus")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("selector" in name)
    task = AnswerObjective(model, Objective(sampler_dropout=1.0, independent=True), 0).train()
    batch = Batches(model.processor, CardScenes(), 1, 0, independent=True, max_turns=1, shuffle=False)[0]
    loss, _ = task(batch, batch.num_targets, 1)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 2 and all(g is not None and not g.any() for g in gradients)
