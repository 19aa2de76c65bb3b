"""AVG-LLaVA's stages 3 and 4: their losses, the language model's feedback, and what a run changes and leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import Forked
from random_examples import SIZES, at_answers, close, plain_inputs, random_example, turn_alone
from training_runs import (
    ROOT,
    TINY,
    by_two,
    changed,
    figures,
    largest_difference,
    part_of,
    train,
    trainer,
    weights,
)

import minifocus
from minifocus import cards
from minifocus.avg_llava.sampler import AVGLLaVA
from minifocus.samplers.hooks import BeforeLLM, PictureFeatures, VisualTokens, Words, uncompressed
from minifocus.training.checkpoint import save_checkpoint
from minifocus.training.examples import NO_LABEL, Batch, Batches, Example, collate
from minifocus.training.feedback import Feedback, ask
from minifocus.training.granularities import GranularityObjective
from minifocus.training.objective import AnswerObjective, Objective
from minifocus.training.parts import load_to_train
from minifocus.training.router import Ranking, RouterObjective, ranking_loss

pytestmark = pytest.mark.usefixtures("one_thread")

GRANULARITIES = (1, 2, 4, 8, 16)


@pytest.fixture
def model(folder: Path) -> minifocus.Llava:
    """A random model with a random router, in training mode."""
    model = minifocus.load(folder, "none")
    torch.manual_seed(5)
    model.begin_sampler("avg-llava")
    return model.train()


def sampler_of(model: minifocus.Llava) -> AVGLLaVA:
    assert isinstance(model.before_llm, AVGLLaVA)
    return model.before_llm


def examples_of(model: minifocus.Llava, independent: bool) -> list[Example]:
    """One to four turns, with none, one and two pictures; one has pictures in later turns, which must be a chat's."""
    found = [random_example(model, sizes, 10 + i, 1 + i, independent) for i, sizes in enumerate(SIZES)]
    if not independent:
        found.append(random_example(model, [(57, 91)], 20, turns=3, in_turns=[[], [(30, 90)], [(20, 20), (50, 60)]]))
    silent = random_example(model, [(57, 91)], 30, 3, independent)
    labels = silent.labels.masked_fill(silent.turn == 1, NO_LABEL)  # a turn without an answer
    return [*found, replace(silent, labels=labels)]


# ---- the ranking loss ----


def ranking_by_hand(logits: Sequence[float], losses: Sequence[float], ranking: Ranking) -> float:
    """One question, by spec A5's sentences."""
    total = math.log(sum(math.exp(one) for one in logits))
    order = sorted(range(len(losses)), key=lambda g: (losses[g], g))
    s, ell = [logits[g] - total for g in order], [losses[g] for g in order]
    if ranking.form == "paper":
        ranks = sum(max(0.0, s[j] - s[i] + (ell[j] - ell[i])) for i, j in combinations(range(len(s)), 2))
    else:
        ranks = 0.0
        for d in range(1, len(s)):
            pairs = [max(0.0, s[i + d] - s[i] + ranking.margin * d * (ell[i + d] - ell[i])) for i in range(len(s) - d)]
            ranks += sum(pairs) / len(pairs)
    return ranking.rank_weight * ranks - ranking.choice_weight * s[0]


RANKINGS = [
    Ranking(),
    Ranking("released", 0.1, 1.0, 0.1),
    Ranking("released", 2.5, 0.3, 1.7),
    Ranking(rank_weight=0.5, choice_weight=0.0),
    Ranking(rank_weight=0.0, choice_weight=2.0),
]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("choices", [1, 2, 5])
def test_the_ranking_loss_is_its_formula(ranking: Ranking, choices: int) -> None:
    """And its gradient that formula's, by finite differences."""
    generator = torch.Generator().manual_seed(choices)
    logits = 2 * torch.randn(7, choices, generator=generator, dtype=torch.float64)
    losses = torch.rand(7, choices, generator=generator, dtype=torch.float64)
    losses[0] = 0.5  # all equal: the coarsest is the best
    if choices > 1:
        losses[1, 1] = losses[1, 0]

    def by_hand(logits: torch.Tensor) -> float:
        every = [ranking_by_hand(*row, ranking) for row in zip(logits.tolist(), losses.tolist(), strict=True)]
        return sum(every) / len(every)

    given = logits.clone().requires_grad_()
    loss = ranking_loss(given, losses, ranking)
    assert float(loss.detach()) == pytest.approx(by_hand(logits), rel=1e-12, abs=1e-12)
    loss.backward()
    assert given.grad is not None
    step = 1e-6
    for row in range(7):
        for column in range(choices):
            up, down = logits.clone(), logits.clone()
            up[row, column] += step
            down[row, column] -= step
            slope = (by_hand(up) - by_hand(down)) / (2 * step)
            assert float(given.grad[row, column]) == pytest.approx(slope, abs=1e-6)


def test_settings_of_the_ranking() -> None:
    for name in ("margin", "rank_weight", "choice_weight", "token_price"):
        for wrong in (-1, math.nan, math.inf, "1", 1e9):
            with pytest.raises(minifocus.InputError, match=f"^{name}: expected a"):
                Ranking(**{name: wrong})
    with pytest.raises(minifocus.InputError, match="^form: expected 'paper' or 'released', got 'code'"):
        Ranking(form="code")  # type: ignore[arg-type]
    with pytest.raises(minifocus.InputError, match="expected one above 0"):
        Ranking(rank_weight=0, choice_weight=0)


# ---- the language model's feedback ----


def losses_by_turn(model: minifocus.Llava, example: Example, turns: int, independent: bool) -> list[list[float]]:
    """[granularities][turns], each from `model(...)` with the granularity forced; NaN where there is no answer."""
    found = []
    for tokens in GRANULARITIES:
        model.set_sampler("avg-llava", granularity=tokens)
        own = []
        for turn in range(turns):
            alone = turn_alone(example, turn) if independent else example
            batch = collate([alone])
            mine = (alone.labels != NO_LABEL) & ((alone.turn == turn) | independent)
            if not mine.any() or turn > int(example.turn.max()):
                own.append(math.nan)
                continue
            with torch.inference_mode():
                logits = model(**plain_inputs(model, batch))
            chances = at_answers(logits, batch).double().log_softmax(dim=1)
            targets = alone.labels[alone.labels != NO_LABEL]
            of_tokens = -chances.gather(1, targets[:, None]).squeeze(1)
            own.append(float(of_tokens[mine[alone.labels != NO_LABEL]].mean()))
        found.append(own)
    return found


@pytest.mark.parametrize("independent", [False, True])
def test_feedback_is_the_loss_of_each_turn_at_each_granularity(model: minifocus.Llava, independent: bool) -> None:
    examples = examples_of(model, independent)
    batch, sampler = collate(examples), sampler_of(model)
    assert sampler.forced is None
    losses, shares = ask(model, batch, model.encode_pictures(batch.tiles, batch.sizes), independent)
    assert sampler.forced is None and not losses.requires_grad
    assert losses.dtype == shares.dtype == torch.float32
    turns = batch.num_turns
    assert losses.shape == (len(examples), turns, 5) and shares.shape == (len(examples), 5)
    model.eval()
    spread = 0.0
    for row, example in enumerate(examples):
        expected = torch.tensor(losses_by_turn(model, example, turns, independent)).T
        assert torch.equal(expected.isnan(), losses[row].isnan())
        assert torch.allclose(losses[row].nan_to_num(), expected.nan_to_num().float(), rtol=1e-4, atol=1e-5)
        spread = max(spread, float((expected.amax(1) - expected.amin(1)).nan_to_num().max()))
    assert spread > 0.1 and bool(losses[-1][1].isnan().all()) and bool(losses[0][1:].isnan().all())
    assert bool((shares[2] == 1).all()) and bool((shares[0].diff() > 0).all()) and shares[0, -1] == 1


@pytest.mark.parametrize("independent", [False, True])
def test_shares_are_of_what_plain_llava_reads(model: minifocus.Llava, independent: bool) -> None:
    examples = examples_of(model, independent)
    batch = collate(examples)
    features = model.encode_pictures(batch.tiles, batch.sizes)
    _, shares = ask(model, batch, features, independent)
    for number, tokens in enumerate(GRANULARITIES):
        model.set_sampler("avg-llava", granularity=tokens)
        first = 0
        for row, count in enumerate(batch.pictures):
            own, first = features[first : first + count], first + count
            none = Words(torch.zeros(0, 32), torch.zeros(0, 32))
            entered = sum(len(sampler_of(model)(picture, none).tokens) for picture in own)
            full = sum(picture.num_plain for picture in own)
            assert float(shares[row, number]) == pytest.approx(entered / full if full else 1.0, rel=1e-6)


def feedback(folder: Path, **identity: Any) -> Feedback:
    return Feedback(folder, {"model": "m", "seed": 0, **identity}, 5)


def test_feedback_is_written_once_and_read_again(model: minifocus.Llava, tmp_path: Path) -> None:
    examples = examples_of(model, True)
    batch = collate(examples[:3], position=7)
    features = model.encode_pictures(batch.tiles, batch.sizes)
    losses, shares = ask(model, batch, features, True)
    first = feedback(tmp_path)
    got = first.of(model, batch, features, True)
    for row in range(3):
        assert torch.equal(got[row][0].nan_to_num(9), losses[row].nan_to_num(9)) and torch.equal(
            got[row][1], shares[row]
        )
    (file,) = tmp_path.glob("*.jsonl")
    content = file.read_bytes()
    assert content.count(b"\n") == 4
    with mock.patch("minifocus.training.feedback.ask", side_effect=AssertionError("asked")):
        first.of(model, batch, features, True)
        again = feedback(tmp_path)
        assert set(again.known) == {7, 8, 9}
        for ours, theirs in zip(again.of(model, batch, features, True), got, strict=True):  # bit for bit, NaN too
            assert torch.equal(ours[0].isnan(), theirs[0].isnan()) and torch.equal(ours[1], theirs[1])
            assert torch.equal(ours[0].nan_to_num(9), theirs[0].nan_to_num(9))
    assert file.read_bytes() == content

    # A process that is killed leaves part of a line, of a record or of the header. The next one computes what is missing.
    for cut in (len(content) - 1, len(content) - 30):
        file.write_bytes(content[:cut])
        torn = feedback(tmp_path)
        assert set(torn.known) == {7, 8}
    torn.of(model, batch, features, True)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2 and set(feedback(tmp_path).known) == {7, 8, 9}
    for cut in (0, 5, content.index(b"\n")):
        file.write_bytes(content[:cut])
        assert set(feedback(tmp_path).known) == {7, 8, 9}  # from the other file
    repeated = collate(examples[:3], position=21, first=7)  # a run that takes its examples again
    with mock.patch("minifocus.training.feedback.ask", side_effect=AssertionError("asked")):
        feedback(tmp_path).of(model, repeated, features, True)


def test_feedback_of_something_else_is_refused(tmp_path: Path) -> None:
    first = feedback(tmp_path)
    first.add({0: (torch.ones(1, 5), torch.ones(5))})
    (file,) = tmp_path.glob("*.jsonl")
    for identity, names in (
        ({"seed": 1}, r"\['seed'\]"),
        ({"more": 1}, r"\['more'\]"),
        ({"model": None}, r"\['model'\]"),
    ):
        with pytest.raises(
            minifocus.InputError, match=rf"^{file}: expected the feedback of this model .*{names} differ"
        ):
            feedback(tmp_path, **identity)
    header = file.read_bytes().splitlines(keepends=True)[0]

    def record(**changes: Any) -> bytes:
        return json.dumps({"example": 1, "losses": [[1.0] * 5], "shares": [1.0] * 5, **changes}).encode() + b"\n"

    assert file.write_bytes(header + record()) and set(feedback(tmp_path).known) == {1}
    hostile = {
        "no JSON": header + b"{\n",
        "no text": header + b"\xff\xfe\n",
        "no object": header + b"[1]\n",
        "no header": b"[]\n" + record(),
        "half a header of another kind": b"{nonsense",
        "no losses": header + b'{"example": 1, "shares": [1, 1, 1, 1, 1]}\n',
        "ragged": header + record(losses=[[1.0] * 5, [1.0] * 4]),
        "too few granularities": header + record(losses=[[1.0] * 4]),
        "too few shares": header + record(shares=[1.0] * 4),
        "flat": header + record(losses=[1.0] * 5),
        "words": header + record(losses=[["a"] * 5]),
        "infinite": header + record(losses=[[1e400] * 5]),
        "shares that are no numbers": header + record(shares=[math.nan] * 5),
        "huge": header + record(losses=[[10**400] * 5]),
        "an example before the first": header + record(example=-1),
        "an example of a word": header + record(example="1"),
        "an infinite example": header + record(example=math.inf),
        "deep": header + b"[" * 100000 + b"\n",
    }
    for name, content in hostile.items():
        file.write_bytes(content)
        with pytest.raises(minifocus.InputError, match=rf"^{file}: expected a file of feedback: ") as refused:
            feedback(tmp_path)
        assert len(str(refused.value)) < 1000, name
    file.unlink()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(minifocus.InputError, match=r"folder.jsonl: expected a file, found a folder"):
        feedback(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(minifocus.InputError, match=r"file: expected a folder for feedback: File exists"):
        feedback(tmp_path / "file")
    gone = feedback(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(minifocus.InputError, match=r"jsonl: cannot be written: No such file"):
        gone.add({0: (torch.ones(1, 5), torch.ones(5))})


# ---- stage 3 ----


@pytest.mark.parametrize("independent", [False, True])
def test_stage_3_is_the_mean_over_granularities(model: minifocus.Llava, independent: bool) -> None:
    """Of five losses that are computed apart, with their gradient, in one pass of the tower."""
    batch = collate(examples_of(model, independent))
    sampler, parameters = sampler_of(model), dict(model.named_parameters())
    expected: dict[str, torch.Tensor] = {}
    parts = []
    for number in range(5):
        sampler.forced = number
        loss, said = AnswerObjective(model, Objective(independent=independent), 0)(batch, 11, 3)
        parts.append((float(loss.detach()), said["loss"]))
        loss.backward()
    sampler.forced = None
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            expected[name] = parameter.grad / 5
        parameter.grad = None
    calls = []
    handle = model.vision_tower.register_forward_hook(lambda *given: calls.append(1))
    loss, said = GranularityObjective(model, independent)(batch, 11, 3)
    handle.remove()
    assert len(calls) == 1 and sampler.forced is None
    assert float(loss.detach()) == pytest.approx(sum(one for one, _ in parts) / 5, rel=1e-5)
    assert said["loss"] == pytest.approx(sum(one for _, one in parts) / 5, rel=1e-5)
    assert said.keys() == {"loss", *(f"loss_{tokens}" for tokens in GRANULARITIES)}
    for tokens, (_, one) in zip(GRANULARITIES, parts, strict=True):
        assert said[f"loss_{tokens}"] == pytest.approx(one, rel=1e-5)
    loss.backward()
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert found.keys() == expected.keys() and not any("before_llm" in name for name in found)
    assert any("vision_tower" in name for name in found)
    for name, gradient in found.items():
        assert close(gradient, expected[name], 1e-5), name


def test_stage_3_with_text_alone_behind_a_frozen_decoder(model: minifocus.Llava) -> None:
    """It reaches nothing that is trained, and adds nothing."""
    model.language_model.requires_grad_(False)
    model.vision_tower.requires_grad_(False)
    loss, said = GranularityObjective(model, True)(collate([random_example(model, [], 3, 2, True)]), 5, 1)
    loss.backward()
    assert said["loss"] > 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_other_samplers_are_refused(folder: Path, tmp_path: Path) -> None:
    model = minifocus.load(folder, "vision")
    with pytest.raises(minifocus.InputError, match="sampler: expected avg-llava, got VisionGuidedSampler"):
        GranularityObjective(model, True)
    model.set_sampler("avg-llava", granularity="finest")
    with pytest.raises(minifocus.InputError, match="sampler: expected avg-llava with a router, got one whose"):
        RouterObjective(model, Ranking(), feedback(tmp_path), 0, True)


# ---- stage 4 ----


class Listening(BeforeLLM):
    """Keeps the words that a method is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Words] = []

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        self.heard.append(text)
        return uncompressed(picture)


def words_at_inference(model: minifocus.Llava, example: Example, turn: int, independent: bool) -> Words:
    """What a method is given for a turn, when the prompt is asked without its answer, as `generate` does."""
    asked = turn_alone(example, turn) if independent else example
    keep = asked.labels == NO_LABEL
    keep &= asked.turn <= (0 if independent else turn)
    instruction = asked.instruction & ((asked.turn == turn) | independent)
    ids, instruction = asked.input_ids[keep][None], instruction[keep][None]
    ear = Listening()
    batch = collate([example])
    features = model.encode_pictures(batch.tiles, batch.sizes)
    used, left = [], int((ids == model.config.image_token_id).sum())
    for picture in features:
        if left >= picture.layout.num_tokens:
            used.append(picture)
            left -= picture.layout.num_tokens
    model.embed(ids, used, None, instruction, ear)
    return ear.heard[0]


@pytest.mark.parametrize("text", ["question", "prompt", "nothing"])
@pytest.mark.parametrize("independent", [False, True])
def test_the_router_s_words_are_those_of_inference(folder: Path, tmp_path: Path, text: Any, independent: bool) -> None:
    """But for earlier answers of a chat, which the public code does not give it in training either."""
    model = minifocus.load(folder, "none")
    model.begin_sampler("avg-llava", text=text)
    examples = examples_of(model, independent)
    objective = RouterObjective(model, Ranking(), feedback(tmp_path), 0, independent)
    with torch.no_grad():
        for example, own in zip(examples, objective.questions(collate(examples)), strict=True):
            assert len(own) == int(example.turn.max()) + 1
            for turn, words in enumerate(own if example.tiles else []):
                heard = words_at_inference(model, example, turn, independent)
                if text == "nothing":
                    assert not len(words)
                else:
                    assert torch.equal(words, heard.question if text == "question" else heard.prompt) and len(words)


@pytest.mark.parametrize("independent", [False, True])
def test_stage_4_ranks_by_the_feedback(model: minifocus.Llava, tmp_path: Path, independent: bool) -> None:
    """Its loss is the ranking loss over every question and picture that it can see; figures say what the router chooses."""
    examples, ranking = examples_of(model, independent), Ranking(token_price=0.7)
    batch, sampler = collate(examples), sampler_of(model)
    model.eval()  # without dropout
    objective = RouterObjective(model, ranking, feedback(tmp_path), 0, independent)
    loss, said = objective(batch, 11, 3)
    features = model.encode_pictures(batch.tiles, batch.sizes)
    losses, shares = ask(model, batch, features, independent)
    words = objective.questions(batch)
    logits, wanted, entered, number = [], [], [], 0
    for row, example in enumerate(examples):
        placeholders = (example.input_ids == model.config.image_token_id).nonzero().squeeze(1).tolist()
        for picture in features[number : number + batch.pictures[row]]:
            begin = placeholders[0]
            placeholders = placeholders[picture.layout.num_tokens :]
            for turn in range(int(example.turn.max()) + 1):
                if turn >= int(example.turn[begin]) and not losses[row, turn].isnan().any():
                    logits.append(sampler.route(picture.views, [words[row][turn]])[0])
                    wanted.append(losses[row, turn] + 0.7 * shares[row])
                    entered.append(shares[row, int(logits[-1].argmax())])
        number += batch.pictures[row]
    # One, two and four turns about one, two and two pictures; three turns but for the one without an answer; and pictures
    # that come with the first, the second and (two) the third of three turns.
    assert len(logits) == 1 + 4 + 8 + 2 + (0 if independent else 3 + 2 + 1 + 1)
    scores, table = torch.stack(logits), torch.stack(wanted)
    expected = ranking_loss(scores, table, ranking)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()) / 3, rel=1e-4)
    chosen = scores.argmax(1)
    assert said["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert said["tokens_entered"] == pytest.approx(float(torch.stack(entered).mean()), rel=1e-5)
    regret = table.gather(1, chosen[:, None])[:, 0] - table.amin(1)
    assert said["regret"] == pytest.approx(float(regret.mean()), abs=1e-5)
    assert said["agrees"] == pytest.approx(float((chosen == table.argmin(1)).float().mean()))

    parameters = dict(sampler.named_parameters())
    loss.backward()
    given = torch.autograd.grad(expected / 3, list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), given, strict=True):
        assert parameter.grad is not None and close(parameter.grad, gradient, 1e-4), name
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("before_llm."))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_features_are_kept_up_to_a_limit(model: minifocus.Llava, tmp_path: Path, kept: int) -> None:
    """Of examples that are taken again, the tower sees the pictures once, and the loss is the same."""
    examples = [random_example(model, [(57, 91)], seed, 2, True) for seed in range(2)]
    batches = [collate([one], position, position % 2) for position, one in enumerate(examples + examples)]
    sizes = [sum(p.views.nbytes + p.map.nbytes for p in model.encode_pictures(b.tiles, b.sizes)) for b in batches[:2]]
    objective = RouterObjective(model, Ranking(), feedback(tmp_path), 0, True, sum(sizes[:kept]))
    with mock.patch.object(model.vision_tower, "forward", wraps=model.vision_tower.forward) as tower:
        found = [float(objective(batch, 1, 1)[0].detach()) for batch in batches]
    assert tower.call_count == 4 - kept
    fresh = RouterObjective(model, Ranking(), feedback(tmp_path), 0, True)
    assert found == [float(fresh(batch, 1, 1)[0].detach()) for batch in batches]


def test_dropout_follows_from_seed_and_position(model: minifocus.Llava, tmp_path: Path) -> None:
    def loss(seed: int, position: int, noise: int) -> float:
        torch.manual_seed(noise)
        batch = collate([random_example(model, [(57, 91)], 1, 2, True)], position)
        return float(RouterObjective(model, Ranking(), feedback(tmp_path), seed, True)(batch, 1, 1)[0].detach())

    first = loss(0, 4, 1)
    assert first == loss(0, 4, 2) and len({first, loss(1, 4, 1), loss(0, 5, 1)}) == 3


def test_stage_4_without_a_question_about_a_picture(model: minifocus.Llava, tmp_path: Path) -> None:
    model.requires_grad_(False)
    sampler_of(model).requires_grad_(True)
    silent = random_example(model, [(57, 91)], 3, 1, True)
    silent = replace(silent, labels=torch.full_like(silent.labels, NO_LABEL))
    for number, example in enumerate((random_example(model, [], 3, 2, True), silent)):
        batch: Batch = collate([example])
        loss, said = RouterObjective(model, Ranking(), feedback(tmp_path / str(number)), 0, True)(batch, 5, 1)
        loss.backward()
        assert float(loss.detach()) == 0 and said == {}
        assert any(p.grad is not None and not p.grad.any() for p in sampler_of(model).parameters())
        assert len(list((tmp_path / str(number)).iterdir())) == number  # of text alone, nothing is asked


def test_a_router_is_trained_in_float32(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    model = minifocus.load(tmp_path / "model", "none")
    model.begin_sampler("avg-llava")
    sampler_of(model).to(torch.bfloat16)
    model.save(tmp_path / "model")
    loaded = load_to_train(tmp_path / "model", "avg-llava", torch.device("cpu"), {})
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


# ---- runs ----

ROUTER = ["--stage", "router", "--examples", 4, "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--warmup", 0]
ROUTER += ["--log-every", 1, "--save-every", 2, "--device", "cpu"]
GOES_ON, ROUTER = ROUTER, [*ROUTER, "--fresh", "router"]  # the embedded model has one
LEVELS = ["--stage", "granularities", "--batch", 2, "--micro-batch", 1, "--max-turns", 2, "--warmup", 0]
LEVELS += ["--log-every", 1, "--save-every", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 4 that nothing interrupted: 16 steps on four examples."""
    out = tmp_path_factory.mktemp("stage4") / "run"
    done = train("--out", out, *ROUTER, "--steps", 16)
    assert done.code == 0, done.err
    return out


def test_stage_4_trains_the_router_alone(routed: Path) -> None:
    before, after = weights(TINY), weights(routed / "model")
    kept = {name: value for name, value in after.items() if part_of(name) != "router"}
    assert not changed({name: value for name, value in before.items() if part_of(name) != "selector"}, kept)
    start = minifocus.load(TINY, "none")
    torch.manual_seed(0)
    start.begin_sampler("avg-llava")
    fresh = {f"router.{name}": value for name, value in sampler_of(start).router.state_dict().items()}  # type: ignore[union-attr]
    own = {name: value for name, value in after.items() if part_of(name) == "router"}
    assert changed(fresh, own) == set(own)
    lines = figures(routed)
    assert len(lines) == 16 and lines[0].keys() == {"step", "lr", "loss", "tokens_entered", "regret", "agrees"}
    (file,) = (routed / "feedback").glob("*.jsonl")
    assert file.read_bytes().count(b"\n") == 5  # the four examples are asked about once


def test_stage_4_lowers_its_loss(routed: Path, tmp_path: Path) -> None:
    """On the same examples, without dropout."""
    held: list[Any] = []
    make = trainer.task_of

    def kept(*given: Any) -> Any:
        held.append(make(*given))
        return held[-1]

    for folder, fresh in ((TINY, ["--fresh", "router"]), (routed / "model", [])):
        with (
            mock.patch.object(trainer, "fit", return_value=0.0),
            mock.patch.object(trainer, "leave_results"),
            mock.patch.object(trainer, "task_of", side_effect=kept),
        ):
            feedback = ["--feedback", tmp_path / folder.name]
            done = train("--out", tmp_path, *GOES_ON, *fresh, "--model", folder, *feedback)
        assert done.code == 0, done.err
    losses = []
    for task in held:
        batches = Batches(task.model.processor, cards.CardScenes(), 1, 0, True, 2, shuffle=False)
        with torch.no_grad():
            losses.append(sum(task.eval()(batches[number], 1, 4)[1]["loss"] for number in range(4)) / 4)
    assert losses[1] < 0.8 * losses[0]


def killed_after(out: Path, arguments: list[Any], marks: str) -> None:
    """Start a run and kill it as soon as a file of this name has been written into its folder."""
    with Forked([ROOT / "examples/train.py", "--out", out, *arguments], [{}]) as process:
        while not any(file.stat().st_size for file in out.glob(marks)):
            assert process.running(), process.err()
        os.kill(process.pids[0], signal.SIGKILL)
        assert process.wait(60) == [-signal.SIGKILL]


@pytest.mark.slow
def test_stage_4_goes_on_after_a_kill(routed: Path, tmp_path: Path) -> None:
    """Killed between the first feedback and the first step, then after a checkpoint: bit for bit the same."""
    out = tmp_path / "run"
    arguments = [*ROUTER, "--steps", 16]
    killed_after(out, arguments, "feedback/*.jsonl")
    (file,) = (out / "feedback").glob("*.jsonl")
    first = file.read_bytes()
    file.write_bytes(first[:-7])  # as if it had been killed while it wrote
    with mock.patch("minifocus.training.loop.save_checkpoint", side_effect=stop_at(4)):
        assert train("--out", out, *arguments).code == 2
    done = train("--out", out, *arguments)
    assert done.code == 0, done.err
    for name in ("model.safetensors", "router.safetensors"):
        assert (out / "model" / name).read_bytes() == (routed / "model" / name).read_bytes()
    assert figures(out) == figures(routed)


def stop_at(step: int) -> Any:
    """A `save_checkpoint` that ends the run when it has saved so many steps."""

    def save(*given: Any) -> None:
        save_checkpoint(*given)
        if given[4] >= step:
            raise minifocus.InputError("stopped")

    return save


def test_stage_3_goes_on_after_a_stop_and_leads_to_stage_4(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    arguments = [*LEVELS, "--steps", 3]
    done = train("--out", whole, *arguments)
    assert done.code == 0, done.err
    with mock.patch("minifocus.training.loop.save_checkpoint", side_effect=stop_at(1)):
        assert train("--out", out, *arguments).code == 2
    assert train("--out", out, *arguments).code == 0
    frugal = tmp_path / "frugal"
    assert train("--out", frugal, *arguments, "--gradient-checkpointing").code == 0
    for other in (out, frugal):
        assert (other / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
        assert figures(other) == figures(whole)
    assert {part_of(name) for name in changed(start_of(), weights(whole / "model"))} == {"projector", "llm"}
    assert not (whole / "model/router.safetensors").exists()
    assert {"loss", *(f"loss_{n}" for n in tokens_of_tiny())} <= figures(whole)[0].keys()

    done = train("--out", tmp_path / "router", *ROUTER, "--steps", 1, "--model", whole / "model")
    assert done.code == 0, done.err
    router = weights(tmp_path / "router/model")
    assert {part_of(name) for name in router.keys() - weights(whole / "model").keys()} == {"router"}
    minifocus.load(tmp_path / "router/model", "avg-llava")


def start_of() -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(TINY).items() if part_of(name) != "selector"}


def tokens_of_tiny() -> tuple[int, ...]:
    model = minifocus.load(TINY, "avg-llava", granularity="finest")
    return sampler_of(model).granularities


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["router", "granularities"])
def test_two_processes_equal_one(data: Path, tmp_path: Path, stage: str) -> None:
    """Of four conversations, those that are about no picture teach the router nothing."""
    arguments = [*(ROUTER if stage == "router" else LEVELS), "--batch", 4, "--steps", 2, "--data", data]
    arguments += ["--seed", 20] if stage == "router" else ["--lr-projector", 1e-4, "--lr-llm", 1e-4]
    done = train("--out", tmp_path / "one", *arguments)
    assert done.code == 0, done.err
    by_two("--out", tmp_path / "two", *arguments)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert largest_difference(one, two) <= 1e-5
    for ours, theirs in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    if stage == "router":
        asked = [
            sorted(file.read_bytes().count(b"\n") - 1 for file in (tmp_path / name / "feedback").glob("*.jsonl"))
            for name in ("one", "two")
        ]
        assert sum(asked[1]) == sum(asked[0]) < 4 and len(asked[1]) > len(asked[0])  # each process asked for its own
        assert {part_of(name) for name in two.keys() - start_of().keys()} == {"router"}
    else:
        assert {part_of(name) for name in changed(start_of(), two)} == {"vision", "projector", "llm"}


GUMBEL = ["--stage", "instruct", "--sampler", "avg-llava", "--fresh", "router", "--lr-router", 1e-3]
GUMBEL += ["--freeze", "llm,projector", "--max-turns", 1, "--batch", 2, "--micro-batch", 1, "--warmup", 0]
GUMBEL += ["--log-every", 1, "--save-every", 1, "--steps", 3]


def test_the_router_can_learn_by_the_answers_alone(tmp_path: Path) -> None:
    """By Gumbel-Softmax: the paper's Table 4e. It stops and goes on like any other run."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    done = train("--out", whole, *GUMBEL)
    assert done.code == 0, done.err
    with mock.patch("minifocus.training.loop.save_checkpoint", side_effect=stop_at(2)):
        assert train("--out", out, *GUMBEL).code == 2
    assert train("--out", out, *GUMBEL).code == 0
    for name in ("model.safetensors", "router.safetensors"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    after = weights(whole / "model")
    assert not changed(start_of(), {name: value for name, value in after.items() if part_of(name) != "router"})
    assert {"loss", "tokens", "tokens_entered"} <= figures(whole)[0].keys()
    start = minifocus.load(TINY, "none")
    torch.manual_seed(0)
    start.begin_sampler("avg-llava")
    assert not torch.equal(sampler_of(start).router.voter, after["router.voter"])  # type: ignore[union-attr]


def test_gumbel_s_gradient_goes_through_the_probability_of_what_was_drawn(model: minifocus.Llava) -> None:
    """The tokens are those of the granularity, times one; the draw differs, and every part of the router gets a gradient."""
    sampler = sampler_of(model)
    batch = collate([random_example(model, [(57, 91)], 1, 1, True)])
    (picture,) = model.encode_pictures(batch.tiles, batch.sizes)
    words = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    drawn = set()
    for seed in range(12):
        torch.manual_seed(seed)
        visual = sampler(picture, Words(words, words))
        assert visual.choice is not None
        number = int(visual.choice)
        drawn.add(number)
        sampler.forced = number
        assert torch.allclose(visual.tokens, sampler(picture, Words(words, words)).tokens, rtol=1e-6, atol=0)
        sampler.forced = None
    assert len(drawn) > 2
    visual.tokens.square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.any()) for n, p in sampler.named_parameters() if n != "router.norm.bias"
    )
    sampler.eval()
    assert len({int(sampler(picture, Words(words, words)).choice) for _ in range(5)}) == 1


BAD: list[tuple[list[Any], str]] = [
    *(
        ([option, value], f"{option}: expected --stage router beside it, got {value}")
        for option, value in (
            ("--examples", 4), ("--feedback", "x"), ("--keep-features", 1.0), ("--ranking", "paper"), ("--ranking-margin", 0.1),
            ("--rank-weight", 1.0), ("--choice-weight", 0.1), ("--token-price", 0.5),
        )
    ),
    (["--stage", "router", "--examples", 0], "--examples: expected a number of at least 1, got 0"),
    (["--stage", "router", "--examples", 5, "--micro-batch", 2, "--batch", 2], "examples: expected a multiple of micro_b"),
    (["--stage", "router", "--feedback", ""], "--feedback: expected the name of a folder"),
    (["--stage", "router", "--ranking-margin", 0.5], "--ranking-margin: expected --ranking released beside it, got 0.5"),
    (["--stage", "router", "--ranking", "released", "--ranking-margin", -1], "margin: expected a number of at least 0"),
    (["--stage", "router", "--rank-weight", 0, "--choice-weight", 0], "rank_weight, choice_weight: expected one above 0"),
    (["--stage", "router", "--token-price", "nan"], "token_price: expected a number of at least 0"),
    (["--stage", "router", "--keep-features", 1], "--keep-features: expected --examples beside it, got 1.0"),
    (["--stage", "router", "--examples", 4, "--keep-features", -1], "--keep-features: expected a number of at least 0"),
    (["--stage", "router", "--lr-llm", 1e-3], "--stage: router trains the router alone: expected no other learning rate"),
    (["--stage", "router", "--fresh", "router", "--freeze", "router"], "--lr-router: a new router has to be trained: exp"),
    (["--stage", "router", "--lr-router", -1], "--lr-router: expected a number of at least 0, got -1.0"),
    (["--stage", "router", "--projector", "stf"], "--projector: expected none, as --stage router trains the router alone"),
    (["--stage", "router", "--fresh", "projector"], "--fresh: router trains the router alone: expected no new projector"),
    (["--stage", "router", "--sampler", "focus"], "--sampler: expected avg-llava, as --stage router trains it, got focus"),
    (["--stage", "router", "--sampler-dropout", 0.5], "--sampler-dropout: expected none with --stage router, got 0.5"),
    (["--stage", "router", "--option", "granularity=finest"], "sampler: expected avg-llava with a router, got one whose"),
    (["--stage", "router", "--option", "attention=all"], "attention: expected 'tokens' or 'views', got 'all'"),
    (["--stage", "router", "--window", 2], "--window: sampler 'avg-llava' has no such option"),
    (["--stage", "router", "--alpha", 0.5], "--alpha: sampler 'avg-llava' has no selector to balance"),
    (["--stage", "router", "--selector-bias", 2], "--selector-bias: expected a new selector to give it to"),
    (["--stage", "granularities", "--sampler", "none"], "--sampler: expected avg-llava, as --stage granularities trains it"),
    (["--stage", "granularities", "--sampler-dropout", 0.5], "--sampler-dropout: expected none with --stage granularities"),
    (["--stage", "granularities", "--option", "granularity=5"], "granularity: expected one of "),
    (["--stage", "granularities", "--option", "ratio=0.5"], "ratio: not an option of sampler 'avg-llava'"),
    (["--sampler", "avg-llava", "--fresh", "router"], "--lr-router: a new router has to be trained: expected a rate above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(map(str, arguments))[:60] for arguments, _ in BAD])
def test_bad_arguments(tmp_path: Path, arguments: list[Any], words: str) -> None:
    done = train("--out", tmp_path / "run", "--steps", 1, *arguments)
    assert done.code == 2 and not done.out
    assert done.err.startswith(f"error: {words}") and done.err.count("\n") == 1, done.err


def test_feedback_of_another_run(routed: Path, tmp_path: Path) -> None:
    """It can be shared by runs that ask the same, with other rates and rankings; one that asks otherwise is refused."""
    shared = ["--feedback", routed / "feedback", *ROUTER, "--steps", 1]
    with mock.patch("minifocus.training.feedback.ask", side_effect=AssertionError("asked")):
        done = train(
            "--out", tmp_path / "a", *shared, "--ranking", "released", "--lr-router", 1e-4, "--option", "text=prompt"
        )
    assert done.code == 0, done.err
    done = train("--out", tmp_path / "bf16", *ROUTER, "--steps", 1, "--bf16")
    assert done.code == 0, done.err
    for other, name in ((["--max-turns", 1], "max_turns"), (["--seed", 1], "seed"), (["--bf16"], "bf16")):
        done = train("--out", tmp_path / "b", *shared, *other)
        assert done.code == 2 and f"got another's (['{name}'] differ)" in done.err
