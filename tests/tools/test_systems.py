"""experiments/systems: its arms and tables fit together, and it runs and goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from example_scripts import example
from forked import last_line

import minifocus
from examples.command_line import Refused
from experiments.paper.arms import Recipe
from experiments.paper.tables import Figures
from experiments.record import ROOT
from experiments.systems import arms, choices
from experiments.systems import reproduce as reproduction
from experiments.systems.arms import SYSTEMS
from experiments.systems.tables import TABLES, Choosing
from minifocus import cards

PAIRS = [(system, name) for system, arms in SYSTEMS.items() for name in arms]


@pytest.mark.parametrize(("system", "name"), PAIRS)
def test_every_arm_can_be_trained_and_asked(system: str, name: str) -> None:
    """By the programs' own parsers and checks; what it goes on from is an arm or a stage, and every row has an arm."""
    arm, known = SYSTEMS[system][name], SYSTEMS[system]
    assert arm.start == "full" or arm.start in known
    options, trainer, evaluator = example("train_options"), example("train"), example("evaluate")
    if arm.training:
        command = ["train.py", "--out", "somewhere", *arm.training]
        with mock.patch.object(sys, "argv", command):
            arguments = trainer.parse_arguments()
        options.check(arguments)
        arguments.sampler = arguments.sampler or trainer.SAMPLERS[arguments.stage]
        options.options_of_sampler(arguments, {"selector", "router"})
        options.new_projector_of(arguments, set(), True)
        options.ranking_of(arguments)
    with mock.patch.object(sys, "argv", ["evaluate.py", *arm.asked]):
        evaluator.check(evaluator.parse_arguments())
    for table in TABLES[system].values():
        assert {row.arm for row in table.rows} <= known.keys()
        assert all(not row.paper or len(row.paper) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize(("system", "name"), PAIRS)
def test_the_trainer_takes_every_arm_s_command(system: str, name: str, tmp_path: Path) -> None:
    """As it is made, with what the recipe adds."""
    options, trainer, seen = example("train_options"), example("train"), []

    def check(command: list[str], out: Path) -> str:
        with mock.patch.object(sys, "argv", command):
            options.check(trainer.parse_arguments())
        seen.append(command)
        return ""

    with mock.patch.object(arms, "run", check):
        recipe = Recipe(tmp_path, {"full": ROOT / "weights/tiny"}, 200, 6, 0, 16, 1)
        folder = arms.model_of(SYSTEMS[system], name, 2, recipe)
    assert (str(folder).startswith(str(tmp_path)) and seen) or not SYSTEMS[system][name].training


def test_claims_follow_from_the_figures() -> None:
    found = {"control": 0.9, "mbtf": 0.91, "stf": 0.8, "both": 0.85, "avgpool": 0.76}
    measured = {name: Figures({"all": accuracy}, {"all": 3000}, 1.0) for name, accuracy in found.items()}
    verdicts = [claim.check(measured) for claim in TABLES["llava-stf"]["3"].claims]
    assert [one.holds for one in verdicts] == [None, True, False, None, True]
    assert str(verdicts[1]) == "**Here too (+5.0 ± 1.9 points).**"


def chose(tokens: float, least: float, pairs: tuple[int, int, int]) -> dict[str, Any]:
    families = {"all": tokens, "read": tokens + 0.1, "perceive": tokens, "reason": tokens, "relate": tokens - 0.1}
    return {
        "tokens": families,
        "tokens_at_least_loss": dict.fromkeys(families, least),
        "chosen": {family: {"4": 0.25, "64": 0.75} for family in families},
        "pairs": dict(zip(("coarser", "equal", "finer"), pairs, strict=True)),
    }


def test_choices_are_judged_and_shown() -> None:
    """By the means over the seeds; a single finer choice for an easy question is one too many."""
    seeds = {
        "router": [chose(0.95, 0.8, (1, 9, 0)), chose(0.85, 0.8, (6, 4, 0))],
        "price-0.03": [chose(0.5, 0.8, (10, 0, 0))],
        "price-0.1": [chose(0.9, 0.8, (9, 0, 1))],
    }
    table = TABLES["avg-llava"]["Figure 5"]
    measured: dict[str, Figures] = {
        arm: Choosing({"all": 0.5}, {"all": 100}, 1.0, choices=own) for arm, own in seeds.items()
    }
    assert [claim.check(measured).holds for claim in table.claims] == [True, True, True, True, False, True, True, False]
    assert str(table.claims[3].check(measured)) == "**Here too (coarser in 35% of pairs, finer in 0.0%).**"
    record = {arm: {str(i): {"choices": one} for i, one in enumerate(own)} for arm, own in seeds.items()}
    page = reproduction.markdown_of_choices(table, {"arms": record})
    assert (
        "| the router | 25 75 %: 90.0% | 25 75 %: 100.0% |" in page and "| at the least loss | 80.0% | 80.0% |" in page
    )


def test_choices_of_a_router_are_those_of_its_answers(tmp_path: Path) -> None:
    """choices.py goes by the trainer's way to a router; the answers come by the other."""
    model = minifocus.load(ROOT / "weights/tiny", "none")
    torch.manual_seed(3)
    model.begin_sampler("avg-llava")
    with torch.no_grad():
        for parameter in model.before_llm.parameters():  # type: ignore[union-attr]
            parameter.mul_(3)  # so that choices differ
    found = choices.measure(model, 3, 40)
    scenes = [scene for scene in islice(cards.scenes("test", 40), 3) if scene.questions]
    asked = [(scene.image, question) for scene in scenes for question in scene.questions]
    answers = model.generate_batch([image for image, _ in asked], [q.question for _, q in asked], max_new_tokens=1)
    numbers = [int(answer.pictures[0].choice[0, 0]) for answer in answers]  # type: ignore[index]
    assert found["questions"] == len(asked) and len(set(numbers)) > 1
    assert list(found["chosen"]["all"].values()) == [numbers.count(i) / len(numbers) for i in range(5)]
    shares = [answer.tokens.after_vision / answer.tokens.full for answer in answers]
    assert found["tokens"]["all"] == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert sum(found["pairs"].values()) <= 3 and found["regret"] >= 0


def test_a_table_is_made_and_gone_on_with(tmp_path: Path) -> None:
    table = TABLES["llava-stf"]["3"]
    rows = tuple(row for row in table.rows if row.arm in ("stf", "avgpool"))
    few = {"3": replace(table, rows=rows, claims=table.claims[3:4], spread=False)}
    command = ["reproduce.py", "llava-stf", "--quick", "--runs", str(tmp_path), "--seeds", "1"]

    def run() -> dict[str, Any]:
        asked = mock.patch.dict(TABLES, {"llava-stf": few}), mock.patch.object(sys, "argv", command)
        with asked[0], asked[1], mock.patch.object(arms, "run", last_line):
            reproduction.reproduce(reproduction.parse_arguments())
        found: dict[str, Any] = json.loads((tmp_path / "quick-llava-stf/results/results.json").read_text("utf-8"))
        return found

    record = run()
    assert record["arms"].keys() == {"stf", "avgpool"} and record["steps"] == 2 and record["questions"] == 8
    for own in record["arms"].values():
        assert 0.2 < own["1"]["tokens"]["equivalent"] < 0.32
    page = (tmp_path / "quick-llava-stf/results/README.md").read_text(encoding="utf-8")
    assert "## Table 3" in page and "| STF | " in page and "points).**" in page and "| 65.6 |" in page
    trained = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")}
    assert len(trained) == 2 and run()["arms"] == record["arms"]
    assert trained == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")}
    known = tmp_path / "quick-llava-stf/results/results.json"
    record["arms"]["other"], record["tables"] = record["arms"]["stf"], ["9"]
    known.write_text(json.dumps(record), encoding="utf-8")
    recipe = reproduction.Recipe(tmp_path, {}, 2, 2, 0, 8, 1)
    assert reproduction.known_results(known, recipe) == record
    for content in (json.dumps({**record, "steps": 3}), "{}", "["):
        known.write_text(content, encoding="utf-8")
        with pytest.raises(Refused, match="results.json: expected (arms of 2 steps|an earlier run's results)"):
            reproduction.known_results(known, recipe)
