"""What the selector learns from: Eq. 2 and its derivative, alone and through the whole model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_examples import DEPTH, random_example
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import minifocus
from minifocus.cards import CardScenes
from minifocus.samplers.hooks import PictureFeatures
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler, pools_for
from minifocus.training.examples import Batches, collate
from minifocus.training.objective import AnswerObjective, Objective, draw_guidance
from minifocus.training.packed import Guidance, forward
from minifocus.training.sampler_loss import balance_loss

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"

pytestmark = pytest.mark.usefixtures("one_thread")

GATED = [dict(), dict(branches=7), dict(window=2), dict(thumbnail="compress"), dict(score_pool="mean")]
GATED += [dict(score_norm="layer"), dict(score_norm="cosine", branches=7)]
MAP, THUMBNAIL = (9, 6), (4, 4)  # regions at the map's edges are not whole


class Gated:
    """A picture's tokens as a function of its map, thumbnail and newline and the selector's weight and bias."""

    def __init__(self, options: dict[str, Any], straight_through: bool = False, training: bool = True):
        self.options = VisionGuidedOptions(straight_through=straight_through, **options)
        self.branches = len(pools_for(self.options.window, self.options.branches))
        selector = LinearSelector(16, self.branches, self.options.score_pool, self.options.score_norm).double()
        self.sampler = VisionGuidedSampler(selector, self.options).train(training)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        x, small, newline, weight, bias = inputs
        picture = PictureFeatures(x, small, small.flatten(0, 1), newline, None, small[None], (9, 9), 16)
        parameters = {"selector.weight": weight, "selector.bias": bias}
        visual = torch.func.functional_call(self.sampler, parameters, (picture, x.new_zeros(0, 2)))
        self.logits = visual.logits
        return visual.tokens

    def inputs(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(46)  # for which regions differ in their scale, and none is a tie
        shapes = ((*MAP, 2), (*THUMBNAIL, 2), (2,), (self.branches, 16), (self.branches,))
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)

    def probability_of_tokens(self) -> torch.Tensor:
        """[n, 1], each token's branch's probability by the last call's logits; 1 for newlines and whole thumbnails."""
        window, pools = self.options.window, pools_for(self.options.window, self.options.branches)
        chosen = [(row.index(max(row)), max(row)) for row in self.logits.softmax(dim=-1).tolist()]
        assert len({branch for branch, _ in chosen}) > 1  # else the test says little
        regions = iter(chosen)

        def sampled(height: int, width: int, newlines: bool) -> list[float]:
            factors: list[float] = []
            for top in range(0, height, window):
                for left in range(0, width, window):
                    branch, p = next(regions)
                    rows = math.ceil(min(window, height - top) / pools[branch][0])
                    factors += [p] * (rows * math.ceil(min(window, width - left) / pools[branch][1]))
                factors += [1.0] * newlines
            return factors

        of_map = sampled(*MAP, True)
        compressed = self.options.thumbnail == "compress"
        leading = sampled(*THUMBNAIL, False) if compressed else [1.0] * math.prod(THUMBNAIL)
        assert next(regions, None) is None
        return torch.tensor(leading + of_map, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("options", GATED)
def test_eq_2_and_its_gradient(options: dict[str, Any]) -> None:
    """As printed: p times the pooled tokens, and autograd's derivative is the finite difference."""
    literal, plain = Gated(options), Gated(options, training=False)
    inputs = literal.inputs()
    tokens = literal(*inputs)
    assert torch.allclose(tokens, plain(*inputs) * literal.probability_of_tokens(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(literal, inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", GATED)
def test_straight_through_keeps_values_and_passes_a_gradient(options: dict[str, Any]) -> None:
    """Bit for bit the tokens of inference, with the derivative of p·x/p₀ where p₀ is what p is there."""
    literal, straight, plain = Gated(options), Gated(options, True), Gated(options, True, training=False)
    inputs = literal.inputs()
    tokens = straight(*inputs)
    assert torch.equal(tokens, plain(*inputs))
    scaled = literal(*inputs) / literal.probability_of_tokens()
    cotangent = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad(scaled, inputs, cotangent)
    for got, wanted in zip(torch.autograd.grad(tokens, inputs, cotangent), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)
        assert float(wanted.abs().max()) > 1e-3


def test_the_selector_learns_from_the_answers_through_the_whole_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient from the answers' loss alone is what that loss changes by when the selector is moved."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # Llama's norms are in float32 otherwise
    model = minifocus.load(folder, "focus", straight_through=False).double().train()
    assert isinstance(model.before_llm, VisionGuidedSampler)
    batch = collate([random_example(model, [(57, 91)], 0), random_example(model, [(30, 90)], 1)])
    guidance = Guidance([True] * 2, [2, None], [0.8, 1.0])
    parameters = list(model.before_llm.parameters())
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss() -> torch.Tensor:
        output = forward(model, batch, guidance)
        return F.cross_entropy(output.logits, output.targets)

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    there, step = parameters_to_vector(parameters).detach(), 1e-6
    moved = []
    for sign in (1, -1):
        vector_to_parameters(there + sign * step * parameters_to_vector(direction), parameters)
        with torch.no_grad():
            moved.append(float(loss()))
    measured = (moved[0] - moved[1]) / (2 * step)
    assert slope == pytest.approx(measured, rel=1e-6) and abs(slope) > 1e-3


@pytest.mark.parametrize("straight_through", [False, True])
def test_what_the_embedded_model_s_selector_learns_from(straight_through: bool) -> None:
    """From the answers alone (alpha 0), and beside them the balance loss' own gradient, times its share of the step."""
    model = minifocus.load(TINY, "focus", straight_through=straight_through)
    assert isinstance(model.before_llm, VisionGuidedSampler)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("before_llm."))
    batch = Batches(model.processor, CardScenes(count=4), 2, 0, independent=True, max_turns=2)[0]
    weight = model.before_llm.selector.weight
    gradients = []
    for alpha in (0.0, 0.1):
        task = AnswerObjective(model, Objective(alpha=alpha, independent=True), 0).train()
        (own,) = torch.autograd.grad(task(batch, batch.num_targets, 4)[0], weight)
        gradients.append(own)
    output = forward(model, batch, draw_guidance(Objective(), DEPTH, 0, 0, 2, model), True)
    logits = torch.cat([p.logits for own in output.pictures for p in own if p.logits is not None])
    (balance,) = torch.autograd.grad(balance_loss(logits, 0.1), weight)
    assert float(gradients[0].norm()) > 1e-5 and float(balance.norm()) > 1e-5
    assert torch.allclose(gradients[1] - gradients[0], balance / 4, rtol=1e-3, atol=1e-3 * float(balance.abs().max()))
