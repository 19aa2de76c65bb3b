"""Whole conversations in one forward pass: masks hide what inference takes out, and every turn is asked as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import IMAGE_TOKEN
from hypothesis import given, settings
from hypothesis import strategies as st
from random_examples import DEPTH, SIZES, at_answers, close, plain_inputs, random_example, turn_alone

import minifocus
from minifocus.samplers.hooks import Context, Selection
from minifocus.samplers.text_guided import TextGuidedOptions, TextGuidedSampler
from minifocus.trace import count_tokens
from minifocus.training.examples import NO_LABEL, Example, collate
from minifocus.training.objective import AnswerObjective, Objective
from minifocus.training.packed import Guidance, PackedRows, forward

pytestmark = pytest.mark.usefixtures("one_thread")


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
