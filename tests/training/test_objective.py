"""Training's parts one by one: Eq. 2 to 5, 9 and 10, conversations as tokens, masks beside gathering, what is drawn."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import IMAGE_TOKEN, add_chat_tokenizer, build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import minifocus
from minifocus.cards import CardScenes
from minifocus.inputs.conversations import Conversation, Turn, asked_alone
from minifocus.inputs.prompt import TEMPLATES, build_prompt
from minifocus.inputs.template_writer import IMAGE
from minifocus.samplers.hooks import Context, PictureFeatures, Selection
from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.text_guided import TextGuidedOptions, TextGuidedSampler
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler, pools_for
from minifocus.trace import count_tokens
from minifocus.training.examples import NO_LABEL, Batch, Batches, Example, UnusableConversation, collate, encode
from minifocus.training.objective import AnswerObjective, Objective, balance_loss, draw_guidance
from minifocus.training.packed import Guidance, PackedRows, forward

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"
END = 2
DEPTH = 4  # of the random models and of the embedded one

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without a tokenizer, and beside it a selector that gives different regions different scales."""
    folder = save(build(request.param, seed=1), tmp_path_factory.mktemp(request.param))
    save_selector(folder / "selector.safetensors", random_selector(16, 3), VisionGuidedOptions())
    return folder


def random_selector(num_thumbnail_tokens: int, branches: int, seed: int = 4) -> LinearSelector:
    selector = LinearSelector(num_thumbnail_tokens, branches)
    generator = torch.Generator().manual_seed(seed)
    for value in selector.parameters():
        value.data = torch.randn(value.shape, generator=generator)
    return selector


# ------------------------------------------------------------------------------------------------------ the balance loss


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


# ------------------------------------------------------------------------------------------------ Eq. 2, the gated tokens

GATED = [dict(), dict(branches=7), dict(window=2), dict(thumbnail="compress"), dict(score_pool="mean")]
MAP, THUMBNAIL = (9, 6), (4, 4)  # regions at the map's edges are not whole


class Gated:
    """A picture's tokens as a function of its map, thumbnail and newline and the selector's weight and bias."""

    def __init__(self, options: dict[str, Any], straight_through: bool = False, training: bool = True):
        self.options = VisionGuidedOptions(straight_through=straight_through, **options)
        self.branches = len(pools_for(self.options.window, self.options.branches))
        selector = LinearSelector(16, self.branches, self.options.score_pool).double()
        self.sampler = VisionGuidedSampler(selector, self.options).train(training)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        x, small, newline, weight, bias = inputs
        picture = PictureFeatures(x, small, small.flatten(0, 1), newline)
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
    model = minifocus.load(folder, "focus").double().train()
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


# ------------------------------------------------------------------------------------- the answers' loss, masks, gathering


def random_example(
    model: minifocus.Llava,
    sizes: Sequence[tuple[int, int]],
    seed: int,
    turns: int = 1,
    independent: bool = False,
    in_turns: Sequence[Sequence[tuple[int, int]]] = (),
) -> Example:
    """Random words and pictures of (h, w) in front, or before the question of the turn that `in_turns` names."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision.image_size
    columns: list[tuple[int, int, bool, int]] = []  # id, turn, instruction, label
    tiles: list[torch.Tensor] = []
    every = list(sizes)

    def words(count: int, turn: int, instruction: bool = False) -> None:
        ids = torch.randint(3, IMAGE_TOKEN, (count,), generator=generator).tolist()
        columns.extend((i, turn, instruction, NO_LABEL) for i in ids)

    def picture(size: tuple[int, int], turn: int) -> None:
        columns.extend([(IMAGE_TOKEN, turn, False, NO_LABEL)] * model.num_visual_tokens(size))
        tiles.append(torch.randn(model.num_tiles(size), 3, side, side, generator=generator))

    shared = -1 if independent else 0
    columns.append((1, shared, False, NO_LABEL))
    words(2, shared)
    for number, size in enumerate(sizes):
        if number:
            words(2, shared, not independent)  # where turns are independent, all pictures are in front of the words
        picture(size, shared)
    for turn in range(turns):
        words(1, turn)
        for size in in_turns[turn] if in_turns else ():
            words(1, turn, True)
            picture(size, turn)
            every.append(size)
        words(3, turn, True)
        words(2, turn)
        answer = torch.randint(3, IMAGE_TOKEN, (2 + turn,), generator=generator).tolist()
        columns.extend((i, turn, False, i) for i in [*answer, END])
    ids, turn_of, instruction, labels = (torch.tensor(c) for c in zip(*columns, strict=True))
    if not model.config.anyres:
        every = [(side, side)] * len(every)
    return Example(ids, turn_of, instruction, labels, tiles, every)


def plain_inputs(model: minifocus.Llava, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as `model(...)` takes it."""
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, instruction_mask=batch.instruction)
    if not batch.tiles:
        return inputs
    most = max(len(own) for own in batch.tiles)
    padded = torch.stack([F.pad(own, (0, 0, 0, 0, 0, 0, 0, most - len(own))) for own in batch.tiles])
    if not model.config.anyres:
        return dict(**inputs, pixel_values=padded[:, 0])
    return dict(**inputs, pixel_values=padded, image_sizes=torch.tensor(batch.sizes))


def at_answers(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, S, V] → those from which the answers' tokens are predicted [targets, V]."""
    row, column = (batch.labels != NO_LABEL).nonzero(as_tuple=True)
    return logits[row, column - 1]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest number."""
    assert got.shape == expected.shape and bool(expected.isfinite().all())
    return bool((got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


def turn_alone(example: Example, turn: int) -> Example:
    """An independent turn asked by itself."""
    mine = (example.turn < 0) | (example.turn == turn)
    columns = {name: getattr(example, name)[mine] for name in ("input_ids", "instruction", "labels")}
    return replace(example, **columns, turn=example.turn[mine].clamp(max=0))


SIZES = [[(57, 91)], [(30, 90), (100, 31)], [], [(50, 50), (1, 400)]]  # the last leaves a map without rows


def test_maps_without_regions_have_no_balance_loss(folder: Path) -> None:
    model = minifocus.load(folder, "focus")
    if model.config.anyres:
        task = AnswerObjective(model, Objective(), 0).train()
        loss, figures = task(collate([random_example(model, [(1, 400)], 0)]), 7, 5)
        assert bool(loss.isfinite()) and "balance_loss" not in figures


def test_chat_turns_are_the_plain_causal_forward(folder: Path) -> None:
    """Every answer's token counts and nothing else: against cross-entropy token by token from `model(...)`."""
    model = minifocus.load(folder, "none")
    examples = [random_example(model, sizes, 10 + i, turns=1 + i) for i, sizes in enumerate(SIZES)]
    examples.append(random_example(model, [(57, 91)], 20, turns=2, in_turns=[[], [(30, 90)]]))
    batch = collate(examples)
    with torch.inference_mode():
        logits = model(**plain_inputs(model, batch))
        output = forward(model, batch, Guidance.none(5))
        step = AnswerObjective(model, Objective(), 0)(batch, 11, 3)
    assert close(output.logits, at_answers(logits, batch))
    total, count = 0.0, 0
    for row in range(5):
        for column in range(batch.input_ids.shape[1]):
            if int(batch.labels[row, column]) != NO_LABEL:
                assert batch.labels[row, column] == batch.input_ids[row, column]
                total -= float(logits[row, column - 1].double().log_softmax(0)[batch.input_ids[row, column]])
                count += 1
    assert count == batch.num_targets == len(output.targets) == sum(3 + t for n in (1, 2, 3, 4, 2) for t in range(n))
    assert float(step[0]) == pytest.approx(total / 11, rel=1e-5)
    assert step[1] == pytest.approx({"loss": 3 * total / 11, "tokens": 1.0, "tokens_entered": 1.0})


def test_independent_turns_are_each_asked_alone(folder: Path) -> None:
    """The same logits as of one conversation per turn, and so the same sum."""
    model = minifocus.load(folder, "none")
    examples = [random_example(model, sizes, 30 + i, 1 + i, independent=True) for i, sizes in enumerate(SIZES)]
    batch = collate(examples)
    alone = [collate([turn_alone(example, t)]) for i, example in enumerate(examples) for t in range(1 + i)]
    with torch.inference_mode():
        packed = forward(model, batch, Guidance.none(4), independent=True)
        singly = [at_answers(model(**plain_inputs(model, one)), one) for one in alone]
        chat = forward(model, batch, Guidance.none(4))
    assert close(packed.logits, torch.cat(singly))
    assert packed.targets.tolist() == [label for one in alone for label in one.labels[0].tolist() if label != NO_LABEL]
    losses = [
        F.cross_entropy(z, one.labels[one.labels != NO_LABEL], reduction="sum")
        for z, one in zip(singly, alone, strict=True)
    ]
    assert float(F.cross_entropy(packed.logits, packed.targets, reduction="sum")) == pytest.approx(
        float(sum(losses)), rel=1e-5
    )
    assert not close(chat.logits, packed.logits, 1e-2)  # turns that see those before are another matter


class PromptAlone:
    """A sampler inside the decoder as it acts on a prompt, where the answer already stands behind it."""

    def __init__(self, samplers: Sequence[Any], answer: torch.Tensor):
        self.samplers, self.answer = samplers, answer  # a sampler for each row, and bool by column of input_ids

    def __call__(self, index: int, layer: Any, rows: Any, context: Context) -> Selection | None:
        answer = self.answer.gather(1, rows.source.clamp(min=0)) & rows.valid
        prompt, kept = rows.keep(~answer), rows.valid.clone()
        for row, sampler in enumerate(self.samplers):
            selection = sampler(index, layer, prompt, context) if sampler is not None else None
            if selection is not None:
                kept[row] = torch.isin(rows.source[row], prompt.source[row, selection.kept[row]]) | answer[row]
        return Selection(kept & rows.valid, torch.full_like(kept, float("nan"), dtype=torch.float32))


@pytest.mark.parametrize("text", ["instruction", "all", "last"])
@pytest.mark.parametrize("independent", [False, True])
def test_masks_equal_gathering(folder: Path, text: Any, independent: bool) -> None:
    """What is hidden in training is what inference takes out: every row with a layer and gamma of its own, or with all
    its tokens; one or two pictures, none, a question in front of its picture, no question."""
    model = minifocus.load(folder, "focus", text=text)
    inside = model.inside_llm
    assert isinstance(inside, TextGuidedSampler)
    examples = [
        random_example(model, sizes, 50 + i, 1, independent) for i, sizes in enumerate([*SIZES, SIZES[0], SIZES[1]])
    ]
    examples[0].instruction[:] = False
    examples[4].instruction[:] = examples[4].input_ids != IMAGE_TOKEN
    examples[4].instruction[examples[4].labels != NO_LABEL] = False
    batch = collate(examples)
    guidance = Guidance([True] * 6, [1, 0, 2, 3, 2, None], [0.5, 0.7, 0.8, 0.3, 0.6, 0.5])
    samplers = [
        None
        if at is None
        else TextGuidedSampler(TextGuidedOptions(gamma=gamma, layer=at, text=text), model.config.text)
        for at, gamma in zip(guidance.layer, guidance.gamma, strict=True)
    ]
    with torch.no_grad():
        packed = forward(model, batch, guidance, independent)
        model.inside_llm = PromptAlone(samplers, batch.labels != NO_LABEL)
        expected = at_answers(model(**plain_inputs(model, batch)), batch)
        assert close(packed.logits, expected)
        model.inside_llm = inside
        all_kept = forward(model, batch, replace_layers(guidance), independent)
        assert not close(all_kept.logits, expected, 1e-2)  # it does matter what is hidden

        # The accounts of §4.4, as inference makes them of the prompt.
        rows, pictures = model.embed(
            batch.input_ids, model.encode_pictures(batch.tiles, batch.sizes), batch.attention_mask, batch.instruction,
            model.before_llm,
        )  # fmt: skip
        model.inside_llm = PromptAlone(samplers, batch.labels != NO_LABEL)
        done = model.prefill(rows, pictures)
    for row in range(6):
        counts = count_tokens(done, row)
        assert float(packed.share[row]) == pytest.approx(counts.equivalent)
        assert float(packed.entered[row]) == pytest.approx(counts.after_vision / counts.full if counts.full else 1)
    assert float(packed.share[0]) < float(packed.entered[0]) <= 1
    assert float(packed.entered[0]) < 1 or not model.config.anyres


def replace_layers(guidance: Guidance) -> Guidance:
    return replace(guidance, layer=[None] * len(guidance.layer))


@pytest.mark.parametrize("text", ["instruction", "all", "last"])
def test_masks_and_gathering_have_the_same_gradients(folder: Path, text: Any) -> None:
    """Of all that is learned behind the selector, at one layer and gamma for all rows: the model's own at inference."""
    model = minifocus.load(folder, "focus", selector="variance", gamma=0.6, layer=1, text=text)
    batch = collate([random_example(model, sizes, 70 + i) for i, sizes in enumerate(SIZES)])
    parameters = {
        name: p for name, p in model.named_parameters() if name.startswith(("language_model", "multi_modal", "image_"))
    }

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = F.cross_entropy(logits, batch.labels[batch.labels != NO_LABEL])
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    masked = gradients(forward(model, batch, Guidance([True] * 4, [1] * 4, [0.6] * 4)).logits)
    model.inside_llm = PromptAlone([model.inside_llm] * 4, batch.labels != NO_LABEL)
    gathered = gradients(at_answers(model(**plain_inputs(model, batch)), batch))
    for name, expected in gathered.items():
        assert float(expected.abs().max()) > 1e-4, name
        assert (masked[name] - expected).abs().max() <= 2e-5 * float(expected.abs().max()), name


def test_a_sample_without_pooling_reads_the_plain_picture(folder: Path) -> None:
    """Dropout of either sampler, example by example, beside others that are sampled."""
    model = minifocus.load(folder, "focus")
    batch = collate([random_example(model, [(57, 91)], 80), random_example(model, [(57, 91), (30, 90)], 81)])
    with torch.no_grad():
        mixed = forward(model, batch, Guidance([True, False], [None, None], [0.5, 0.5]))
        both = forward(model, batch, Guidance([True, True], [None, None], [0.5, 0.5]))
        neither = forward(model, batch, Guidance.none(2))
    first = 3
    assert close(mixed.logits[:first], both.logits[:first]) and close(mixed.logits[first:], neither.logits[first:])
    assert float(mixed.entered[0]) < 1 == float(mixed.entered[1])
    assert [p.choice is None for own in mixed.pictures for p in own] == [False, True, True]


@pytest.mark.parametrize("independent", [False, True])
def test_each_turn_is_guided_by_its_own_question(folder: Path, independent: bool) -> None:
    """Before the last layer, where hidden pictures' tokens are read by nobody else: as if every turn were the prompt."""
    model = minifocus.load(folder, "focus", gamma=0.4, layer=DEPTH - 1)
    inside = model.inside_llm
    examples = [random_example(model, sizes, 90 + i, 3, independent) for i, sizes in enumerate(SIZES)]
    if not independent:
        examples[0] = random_example(model, [(57, 91)], 99, 3, in_turns=[[], [(30, 90)], []])
    with torch.no_grad():
        packed = forward(model, collate(examples), Guidance([True] * 4, [DEPTH - 1] * 4, [0.4] * 4), independent)
        expected = []
        for example in examples:
            for turn in range(3):
                if independent:
                    one = turn_alone(example, turn)
                else:  # its own words guide it, those of earlier turns and their answers are only read
                    before = example.turn <= turn
                    pictures = int((example.input_ids[before] == IMAGE_TOKEN).sum())
                    count = 0
                    while pictures > 0:
                        pictures -= model.num_visual_tokens(example.sizes[count])
                        count += 1
                    columns = {
                        name: getattr(example, name)[before] for name in ("input_ids", "turn", "instruction", "labels")
                    }
                    one = Example(**columns, tiles=example.tiles[:count], sizes=example.sizes[:count])
                    one.labels[one.turn != turn] = NO_LABEL
                    one.instruction[one.turn != turn] = False
                batch = collate([one])
                model.inside_llm = PromptAlone([inside], batch.labels != NO_LABEL)
                expected.append(at_answers(model(**plain_inputs(model, batch)), batch))
    assert close(packed.logits, torch.cat(expected))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_who_looks_at_whom(seed: int, size: int, turns: int, independent: bool) -> None:
    """The mask of any rows, cell by cell: a picture that turns share looks at what any of them has kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    none = torch.zeros(2, size, dtype=torch.int64)
    turn, picture = draw(-1, turns, 2, size), draw(-1, 1, 2, size)
    valid, seen = draw(0, 4, 2, size) > 0, draw(0, 2, 2, turns, size).bool()
    rows = PackedRows(
        hidden=none[..., None].float(),
        valid=valid,
        positions=none,
        source=none,
        picture=picture,
        newline=none.bool(),
        instruction=none.bool(),
        turn=turn,
        seen=seen,
        independent=independent,
    )
    mask = rows.attention_mask()
    assert mask.shape == (2, 1, size, size)
    for row in range(2):
        for who in range(size):
            own = int(turn[row, who])
            is_text_of_a_turn = own >= 0 and int(picture[row, who]) < 0
            for whom in range(size):
                views = [own] if is_text_of_a_turn else range(turns)
                looks = valid[row, whom] and any(seen[row, view, whom] for view in views)
                if independent and int(turn[row, whom]) not in (-1, own):
                    looks = False
                assert mask[row, 0, who, whom] == (who == whom or (whom < who and bool(looks)))


def test_the_share_of_tokens_is_that_of_an_example_s_own_turns(folder: Path) -> None:
    model = minifocus.load(folder, "text")
    one, three = (random_example(model, [(57, 91)], 70, turns=turns) for turns in (1, 3))
    with torch.no_grad():
        alone = forward(model, collate([one]), Guidance([False], [1], [0.4]))
        beside = forward(model, collate([one, three]), Guidance([False] * 2, [1, 1], [0.4] * 2))
    assert float(alone.share[0]) < 1
    assert float(beside.share[0]) == pytest.approx(float(alone.share[0]))


def test_samplers_that_are_not_for_training_are_refused(folder: Path) -> None:
    for name in ("fastv", "aim"):
        with pytest.raises(minifocus.InputError, match="sampler: .* acts inside the language model and is not for"):
            AnswerObjective(minifocus.load(folder, name), Objective(), 0)


class DropFirst:
    """Another method inside the decoder: before layer 2, the first token of every picture goes."""

    def __call__(self, index: int, layer: Any, rows: Any, context: Context) -> Selection | None:
        if index != 2:
            return None
        first = (rows.picture >= 0) & (rows.picture != F.pad(rows.picture, (1, 0), value=-1)[:, :-1])
        return Selection(rows.valid & ~first, torch.full(first.shape, float("nan")))


def test_another_method_s_selection_is_hidden_too(folder: Path) -> None:
    model = minifocus.load(folder, "none")
    model.inside_llm = DropFirst()
    batch = collate([random_example(model, sizes, 110 + i) for i, sizes in enumerate(SIZES)])
    with torch.no_grad():
        packed = forward(model, batch, Guidance.none(4))
        assert close(packed.logits, at_answers(model(**plain_inputs(model, batch)), batch))
    assert float(packed.share[0]) < 1


# --------------------------------------------------------------------------------------------------------- what is drawn

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


def test_examples_follow_from_seed_and_position() -> None:
    """Micro-batches of other sizes hold the same examples in the same order; an epoch is a permutation."""
    model = minifocus.load(TINY, "none")
    source = [Conversation(str(i), (), tuple(Turn(f"{i} {t}", "yes") for t in range(3))) for i in range(7)]

    def order(size: int, count: int, **options: Any) -> list[Conversation]:
        batches = Batches(model.processor, source, size, **{"seed": 5, **options})
        return [batches.conversation(i * size + j) for i in range(count // size) for j in range(size)]

    drawn = order(1, 14, max_turns=2, independent=True)
    assert drawn == order(7, 14, max_turns=2, independent=True)
    for epoch in (drawn[:7], drawn[7:]):
        assert sorted(c.id for c in epoch) == [str(i) for i in range(7)]
        assert all(len(c.turns) == 2 and {t.question.split()[0] for t in c.turns} == {c.id} for c in epoch)
    assert [c.id for c in drawn[:7]] != [c.id for c in drawn[7:]] != [str(i) for i in range(7)]
    assert len({c.turns[0].question.split()[1] for c in drawn}) == 3  # independent turns are shuffled
    assert all([t.question.split()[1] for t in c.turns] == ["0", "1"] for c in order(1, 7, max_turns=2))  # others not
    assert [c.id for c in order(1, 14, shuffle=False)] == [str(i) for i in range(7)] * 2
    assert [c.id for c in order(1, 7)] != [c.id for c in order(1, 7, seed=6)]
    batch = Batches(model.processor, source, 3, 5)[4]
    assert batch.position == 12 and len(batch.input_ids) == 3
    with pytest.raises(minifocus.InputError, match="data: expected at least one conversation"):
        Batches(model.processor, [], 1, 0)


def test_the_next_conversation_takes_the_place_of_one_that_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = minifocus.load(TINY, "none")
    words = ["stars", "circles", "squares", "triangles"]
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no picture")
    source = [Conversation(word, (), (Turn(f"How many {word}?", "two"),)) for word in words]
    source.insert(1, Conversation("torn", (torn,), (Turn("<image> What is it?", "one"),)))
    source.insert(2, Conversation("long", (), (Turn("7 " * 5000, "one"),)))

    def read(count: int, **options: Any) -> list[str]:
        batches = Batches(model.processor, source, 1, 5, skip_unusable=True, **options)
        assert model.tokenizer is not None
        texts = [model.tokenizer.decode(batches[i].input_ids[0].tolist()) for i in range(count)]
        return [next(word for word in words if word in text) for text in texts]

    assert read(7, shuffle=False) == ["stars", "circles", "circles", *words[1:], "stars"]
    for name, why in (("torn", "torn.png: not a picture"), ("long", "its first turn takes ")):
        assert f"left out: conversation '{name}': " in caplog.text and why in caplog.text
    caplog.clear()
    shuffled = read(12)
    assert shuffled == read(12) and shuffled[:6] != shuffled[6:] and len(set(shuffled[:6])) == 4
    batches = Batches(model.processor, source, 2, 5, shuffle=False)
    with pytest.raises(UnusableConversation, match=r"'torn': .*torn.png: not a .* \(skip_unusable leaves such"):
        batches[0]
    # A fault of the whole is none of a conversation.
    with pytest.raises(
        minifocus.InputError, match="data: expected a usable conversation, got 2 that are not, one after"
    ):
        Batches(model.processor, source[1:3], 1, 0, skip_unusable=True)[0]


# --------------------------------------------------------------------------------------------------- tokens of a template

ENDS = {"vicuna": "</s>", "vicuna_v1": "</s>", "mistral": "</s>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
FORMS = {  # a first turn with the pictures in front, and a later one: (before the question, between, after the answer)
    "vicuna": ("USER: ", " ASSISTANT: ", "</s>", ""),
    "vicuna_v1": ("USER: ", " ASSISTANT: ", "</s>", TEMPLATES["vicuna_v1"].split("USER")[0]),
    "mistral": ("[INST] ", " [/INST] ", "</s>", ""),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
    ),
    "chatml": (
        "<|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
    ),
}


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def chat_model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> minifocus.Llava:
    """A random model whose tokenizer knows every printable character and the templates' own tokens."""
    folder = save(build(request.param, seed=1, text_vocab_size=128), tmp_path_factory.mktemp("chat"))
    add_chat_tokenizer(folder)
    return minifocus.load(folder, "none")


@pytest.fixture(params=list(FORMS))
def model(request: Any, chat_model: minifocus.Llava, monkeypatch: pytest.MonkeyPatch) -> minifocus.Llava:
    monkeypatch.setattr(chat_model, "template", request.param)
    return chat_model


def picture(width: int = 70, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


PICTURES = (picture(), picture(30, 90))
TURNS = (Turn("<image>\nWhat is it?", "a cat"), Turn("And [this]: <image>, too?", " no\n"), Turn("Why?", "So. It is"))


def as_ids(model: minifocus.Llava, text: str, images: Sequence[Image.Image]) -> list[int]:
    """`text` with each place filled, as the tokenizer reads it at one go."""
    assert model.tokenizer is not None and model.image_processor is not None
    counts = iter([model.num_visual_tokens(model.image_processor(image)[1]) for image in images])
    ids: list[int] = []
    for token in model.tokenizer.encode(text).ids:
        ids += [token] * (next(counts) if token == IMAGE_TOKEN else 1)
    return ids


def asked(model: minifocus.Llava, images: Sequence[Image.Image], question: str) -> tuple[list[int], list[bool]]:
    """What generation feeds the model."""
    prepared = model.processor(list(images), question)
    return prepared.input_ids.tolist(), prepared.instruction.tolist()


def end_id(model: minifocus.Llava) -> int:
    assert model.tokenizer is not None
    token = model.tokenizer.token_id(ENDS[model.template])
    assert token is not None
    return token


def answer_ids(model: minifocus.Llava, answer: str) -> list[int]:
    """Of character tokens, with the space that some templates put in front."""
    assert model.tokenizer is not None
    space = " " if model.template in ("vicuna", "vicuna_v1", "mistral") else ""
    return [*model.tokenizer.encode(space + answer.strip()).ids[1:], end_id(model)]


@pytest.mark.parametrize("images", [1, 2, 0])
def test_a_turn_is_the_prompt_that_generation_feeds_and_its_answer(model: minifocus.Llava, images: int) -> None:
    for question in (
        "What is it?",
        " Is <image> it, or\n <image> ? ",
        "<image>\n<image>\nWhere [is] it",
        "<image> Is it?",
    ):
        if question.count(IMAGE) not in (0, images):
            continue
        question = question if IMAGE in question or not images else f"{IMAGE}\n" * images + question
        conversation = Conversation("c", PICTURES[:images], (Turn(question, "a cat "),))
        example = encode(model.processor, conversation)
        ids, instruction = asked(model, PICTURES[:images], question)
        answer = answer_ids(model, "a cat")
        assert example.input_ids.tolist() == ids + answer
        assert example.instruction.tolist() == instruction + [False] * len(answer)
        assert example.labels.tolist() == [NO_LABEL] * len(ids) + answer
        assert set(example.turn.tolist()) == {0}
        assert len(example.tiles) == len(example.sizes) == images
        counts = [model.num_visual_tokens(size) for size in example.sizes]
        assert int((example.input_ids == IMAGE_TOKEN).sum()) == sum(counts)
        assert [len(tiles) for tiles in example.tiles] == [model.num_tiles(size) for size in example.sizes]


def test_chat_turns_follow_one_another(model: minifocus.Llava) -> None:
    """The whole text at one go; the user's words, and no others, guide; the answers, and no others, are learned."""
    before, between, after, system = FORMS[model.template]
    text, spans, answers = system, [], []
    for turn in TURNS:
        text += before
        words = turn.question.removeprefix("<image>\n")
        begin = len(text) + len(turn.question) - len(words)
        spans.append((begin, begin + len(words)))
        text += turn.question + between
        begin = len(text) - (model.template in ("vicuna", "vicuna_v1", "mistral"))
        text += turn.answer.strip() + after
        answers.append((begin, len(text)))
    assert model.tokenizer is not None and model.image_processor is not None
    counts = iter([model.num_visual_tokens(model.image_processor(image)[1]) for image in PICTURES])
    encoded = model.tokenizer.encode(text)
    example = encode(model.processor, Conversation("c", PICTURES, TURNS))
    expected = []
    for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
        turn = sum(first >= end for _, end in answers)
        in_words = any(begin <= first < last <= end for begin, end in spans)
        in_answer = any(begin <= first < last <= end for begin, end in answers)
        one = (token, turn, in_words and token != IMAGE_TOKEN, token if in_answer else NO_LABEL)
        expected += [one] * (next(counts) if token == IMAGE_TOKEN else 1)
    columns = (example.input_ids, example.turn, example.instruction, example.labels)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
    assert len(example.tiles) == 2
    assert text[slice(*spans[1])] == "And [this]: <image>, too?" and text[slice(*answers[0])].strip().startswith(
        "a cat"
    )


@pytest.mark.parametrize("images", [2, 0])
def test_independent_turns_share_what_is_in_front_of_the_questions(model: minifocus.Llava, images: int) -> None:
    """The shared part and a turn's own are the prompt of that turn alone, and the pictures are in it once."""
    turns = TURNS if images else tuple(Turn(t.question.replace("<image>", "it"), t.answer) for t in TURNS)
    conversation = Conversation("c", PICTURES[:images], turns)
    example = encode(model.processor, conversation, independent=True)
    for number, (pictures, question, answer, _) in enumerate(asked_alone(conversation)):
        question = question.replace(IMAGE, "").strip()
        mine = (example.turn < 0) | (example.turn == number)
        ids, instruction = asked(model, pictures, question)  # type: ignore[arg-type]
        ending = answer_ids(model, answer)
        assert example.input_ids[mine].tolist() == ids + ending
        assert example.instruction[mine].tolist() == instruction + [False] * len(ending)
        assert example.labels[mine].tolist() == [NO_LABEL] * len(ids) + ending
    assert example.turn.tolist() == sorted(example.turn.tolist())
    counts = [model.num_visual_tokens(size) for size in example.sizes]
    placeholders = example.input_ids == IMAGE_TOKEN
    assert int(placeholders.sum()) == sum(counts) and not bool((placeholders & (example.turn >= 0)).any())
    assert len(example.tiles) == images


@pytest.mark.parametrize("independent", [False, True])
def test_turns_that_do_not_fit_are_left_out_whole(model: minifocus.Llava, independent: bool) -> None:
    conversation = Conversation("the second", PICTURES, TURNS)
    wholes = [encode(model.processor, replace(conversation, turns=TURNS[:n]), independent) for n in (1, 2, 3)]
    lengths = [len(example.input_ids) for example in wholes]
    for limit, turns in ((lengths[2], 3), (lengths[2] - 1, 2), (lengths[1], 2), (lengths[1] - 1, 1), (lengths[0], 1)):
        example = encode(model.processor, conversation, independent, limit)
        expected = wholes[turns - 1]
        for name in ("input_ids", "turn", "instruction", "labels"):
            assert torch.equal(getattr(example, name), getattr(expected, name)), name
        assert example.sizes == expected.sizes == ([(50, 70), (90, 30)][: 2 if independent or turns > 1 else 1])
        forward(model, collate([example]), Guidance.none(1), independent)  # its pictures are as many as its places
    labelled = int((wholes[0].labels == NO_LABEL).sum())  # what stands before the first answer
    for limit in (lengths[0] - 1, labelled + 1):  # the first turn is cut off in its answer
        cut = encode(model.processor, conversation, independent, limit)
        for name in ("input_ids", "turn", "instruction", "labels"):
            assert torch.equal(getattr(cut, name), getattr(wholes[0], name)[:limit]), name
        assert cut.sizes == wholes[0].sizes
    with pytest.raises(
        UnusableConversation, match=rf"'the second': .* takes {lengths[0]} tokens; .* begin within {labelled}$"
    ):
        encode(model.processor, conversation, independent, labelled)
    limit = model.config.text.max_position_embeddings
    with pytest.raises(UnusableConversation, match=rf"'c': its first turn takes \d+ tokens; .* begin within {limit}$"):
        encode(model.processor, Conversation("c", (), (Turn("a" * limit, "b"),)), independent, 10 * limit)
    (long,) = [encode(model.processor, Conversation("c", (), (Turn("a", "b" * limit),)), independent, 10 * limit)]
    assert len(long.input_ids) == limit


def test_what_cannot_be_encoded(chat_model: minifocus.Llava, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation("c", PICTURES[:1], TURNS[:1])
    with pytest.raises(minifocus.InputError, match=r"needs a folder with a tokenizer; .* has none"):
        encode(minifocus.load(folder, "none").processor, conversation)
    tokenizer = chat_model.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(chat_model.processor, "template", "vicuna")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "eos_token_id", None)
        with pytest.raises(minifocus.InputError, match="has no token that ends a turn of 'vicuna'"):
            encode(chat_model.processor, conversation)
    with pytest.raises(minifocus.InputError, match="'d'.* more <image> places than pictures"):
        encode(chat_model.processor, replace(conversation, id="d", turns=(TURNS[0], TURNS[1])))
    with pytest.raises(UnusableConversation, match="^conversation 'c': none.png: expected a picture file"):
        encode(chat_model.processor, replace(conversation, images=(Path("none.png"),)))
    for independent in (False, True):  # a tokenizer to which <image> is something else would train on no picture at all
        with monkeypatch.context() as patch:
            patch.setattr(chat_model, "config", replace(chat_model.config, image_token_id=89))
            with pytest.raises((minifocus.InputError, minifocus.CheckpointError), match="<image>"):
                encode(chat_model.processor, conversation, independent)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("template", ["vicuna", "mistral"])
def test_prompts_of_a_subword_vocabulary(file: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The embedded model's, read by either library: the answer's first piece never reaches into the prompt."""
    folder = tmp_path_factory.mktemp("tiny")
    for own in TINY.iterdir():
        if own.name != {"tokenizer.json": "tokenizer.model", "tokenizer.model": "tokenizer.json"}[file]:
            shutil.copy(own, folder)
    model = minifocus.load(folder, "none")
    model.template = template
    assert model.tokenizer is not None
    words = st.text("abZ 09.,:?!é日😀\n", min_size=1, max_size=12).filter(lambda text: text.strip())

    @settings(max_examples=30)
    @given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
    def check(pairs: list[tuple[str, str]], independent: bool) -> None:
        turns = tuple(Turn(question.strip() if independent else question, answer) for question, answer in pairs)
        example = encode(model.processor, Conversation("c", (), turns), independent)
        assert model.tokenizer is not None
        text = ""
        for number, turn in enumerate(turns):
            mine = (example.turn == number) | ((example.turn < 0) & torch.tensor(independent))
            got, labels = example.input_ids[mine].tolist(), example.labels[mine].tolist()
            if independent or not number:
                ids, instruction = asked(model, (), turn.question)
                assert got[: len(ids)] == ids
                assert example.instruction[mine].tolist()[: len(ids)] == instruction
            else:  # read at one go, of which "▁" at the start of a text is not a part
                words = model.tokenizer.decode(example.input_ids[mine & example.instruction].tolist())
                assert words.strip() == turn.question.strip()
            begin = next(i for i, label in enumerate(labels) if label != NO_LABEL)
            assert labels == [NO_LABEL] * begin + got[begin:] and labels[-1] == END
            assert model.tokenizer.decode(labels[begin:]).strip() == turn.answer.strip()
            text += build_prompt(turn.question, 0, template).text + f" {turn.answer.strip()}</s>"
        if not independent:
            assert example.input_ids.tolist() == model.tokenizer.encode(text).ids

    check()


def test_a_process_that_reads_ahead_is_not_sent_the_weights() -> None:
    model = minifocus.load(TINY, "focus")
    batches = Batches(model.processor, CardScenes(count=8), 2, 0, independent=True, max_turns=2)
    sent = pickle.dumps(batches)
    assert len(sent) < 100_000 and len(list(model.parameters())) > 100
    ours, theirs = batches[3], pickle.loads(sent)[3]
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.tiles[0], theirs.tiles[0])


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
