"""experiments/paper: its arms and tables fit together, what it says follows from figures, and it runs and goes on."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from example_scripts import example
from forked import python

from examples.command_line import Refused
from experiments import record as record_of
from experiments.paper import arms as trained
from experiments.paper import report as page
from experiments.paper import reproduce as reproduction
from experiments.paper import speed
from experiments.paper.arms import ARMS, CommandFailed, once, run
from experiments.paper.figures import FIGURES, SAME
from experiments.paper.tables import TABLES, Figures
from experiments.timing import remark
from minifocus import cards

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("read", "perceive", "reason", "relate")


def figures(accuracy: float, tokens: float = 1.0, range: float = 0.0, **more: Any) -> Figures:
    """Of 1000 questions; families by name in `more`."""
    families = {family: more.pop(family, accuracy) for family in FAMILIES}
    return Figures(
        {"all": accuracy, **families}, {"all": 1000, **dict.fromkeys(FAMILIES, 250)}, tokens, (0.9, 0.9 + range), **more
    )


def test_every_arm_is_in_a_table_and_every_row_and_figure_has_its_arms() -> None:
    rows = [row.arm for table in TABLES.values() for row in table.rows]
    assert set(rows) == set(ARMS)
    assert {arm for figure in FIGURES.values() for arm in figure.arms} <= set(ARMS)
    assert sorted(TABLES) == [2, 3, 4, 5, 6, 7, 8]
    assert sorted({*FIGURES, *SAME}) == [2, 3, 4, 5, 6, 7, 8, 9, 10] and set(SAME.values()) <= set(FIGURES)


def test_arms_differ_in_what_they_are_about_alone() -> None:
    """Steps, scenes and seeds come from the recipe; arms change samplers and how selectors are trained."""
    allowed = {"--sampler", "--option", "--window", "--branches", "--scale-weights", "--alpha", "--layers", "--gamma"}
    for arm in ARMS.values():
        words = {word for word in arm.training if word.startswith("--")}
        assert words <= allowed | {"--lr-selector", "--printed-factor"}
    weights = {
        name: [float(w) for w in arm.training[arm.training.index("--scale-weights") + 1].split(",")]
        for name, arm in ARMS.items()
        if "--scale-weights" in arm.training
    }
    assert all(sum(own) == pytest.approx(len(own)) for own in weights.values())
    assert [len(weights[name]) for name in ("window-1", "window-2", "branches-7", "window-12")] == [2, 2, 7, 3]


@pytest.mark.parametrize(
    ("focus", "holds"),
    [
        (figures(0.95, 0.38, 0.0, speed=1.5), [True, True, True]),
        (figures(0.935, 0.40, 0.0, speed=1.40), [True, False, False]),  # within the control's range of a point
        (figures(0.93, 0.39, 0.05, speed=1.42), [None, True, True]),  # its own range is no excuse
        (figures(0.91, 0.39, 0.05, speed=1.42), [False, True, True]),
    ],
)
def test_claims_about_both_samplers(focus: Figures, holds: list[bool | None]) -> None:
    control = figures(0.945, 1.0, 0.01, speed=1.0)
    measured = {"control": control, "focus": focus, "vision": figures(0.9, 0.5), "text": figures(0.94, 0.8)}
    measured |= {"avgpool": figures(0.5), "random": figures(focus.accuracy["all"] + 0.001)}
    verdicts = [claim.check(measured) for claim in TABLES[2].claims]
    assert [one.holds for one in verdicts[:3]] == holds
    assert [one.holds for one in verdicts[3:]] == [False, True, True, True, None]
    assert str(verdicts[3]) == "**Not here (-4.5 ± 2.3 points).**" and str(verdicts[7]).startswith("**Too close to say")


def test_seeds_that_differ_much_decide_nothing() -> None:
    """A difference that chance does not explain may be within the range of the control's seeds."""
    claim = TABLES[2].claims[0]
    for spread, holds in ((0.04, None), (0.01, False)):
        measured = {"control": figures(0.95, 1.0, spread), "focus": figures(0.92, 0.4)}
        assert claim.check(measured).holds is holds


def test_a_family_s_claim_is_about_its_own_questions() -> None:
    claim = TABLES[3].claims[0]
    for read, holds in ((0.96, None), (0.99, True), (0.85, False)):
        assert claim.check({"vision": figures(0.94), "branches-7": figures(0.5, read=read)}).holds is holds


def test_the_best_is_the_best_of_those_that_leave_something_out() -> None:
    claim = next(claim for claim in TABLES[4].claims if "4×4 regions answer best" in claim.text)
    others = {"control": figures(0.99), "window-1": figures(0.5), "window-2": figures(0.9)}
    for vision, holds in ((0.96, True), (0.91, None), (0.85, False)):
        assert claim.check({**others, "vision": figures(vision)}).holds is holds


def test_a_loss_at_every_share_is_one_at_each() -> None:
    claim = TABLES[7].claims[0]
    for worst, holds in (([0.8, 0.8, 0.8], True), ([0.8, 0.949, 0.8], None), ([0.99, 0.949, 0.8], False)):
        arms = {f"like-{share}": figures(one) for share, one in zip((80, 60, 40), worst, strict=True)}
        assert claim.check({"control": figures(0.95), **arms}).holds is holds


def test_claim_of_a_collapse() -> None:
    even = {kind: {"4x4": 0.4, "2x2": 0.3, "1x1": 0.3} for kind in ("empty", "text")}
    one = {kind: {"4x4": 0.0, "2x2": 0.02, "1x1": 0.98} for kind in ("empty", "text")}
    split = {"empty": {"4x4": 1.0, "1x1": 0.0}, "text": {"4x4": 0.0, "1x1": 1.0}}
    claim = TABLES[5].claims[0]
    verdicts = [claim.check({"alpha-0": figures(0.5, scales=s)}) for s in (even, one, split)]
    assert [one.holds for one in verdicts] == [False, True, False]
    assert str(verdicts[1]) == "**Here too (1×1 for 98%).**"


def answers(accuracy: float) -> dict[str, Any]:
    own = {"count": 16, "accuracy": accuracy, "families": dict.fromkeys(FAMILIES, accuracy), "where": None}
    own |= {"questions": dict.fromkeys(FAMILIES, 4), "tokens": {"equivalent": 0.4}}
    return {**own, "commit": "0123456789ab"}


def test_a_table_compares_the_seeds_that_all_its_arms_have() -> None:
    own = {"like-80": {"1": answers(0.9), "2": answers(0.6)}, "control": {str(s): answers(s / 10) for s in (3, 2, 1)}}
    record = {"arms": own, "speed": {}}
    assert page.seeds_of(TABLES[7], record) == ["1", "2"] and page.seeds_of(TABLES[3], record) == ["1"]
    both = page.figures_of("control", record, ["1", "2"])
    assert both.accuracy["all"] == pytest.approx(0.15) and both.range == (0.1, 0.2)
    assert (both.answers["all"], both.answers["read"]) == (32, 8)
    assert page.figures_of("like-80", record, ["1"]).range is None
    assert page.figures_of("vision", record, ["1"]) is None


def test_a_table_s_markdown() -> None:
    arms = {"control": {"1": answers(0.94), "2": answers(0.96)}, "vision": {"1": answers(0.9)}}
    control = {"samples_per_second": 20.0, "times_as_fast": 1.0, "gflops": 3.25}
    control |= {"samples_per_second_alone": 9.5, "times_as_fast_alone": 1.0}
    record = {"arms": arms, "speed": {"control": control}}
    table = TABLES[2]
    short = type(table)(table.title, table.rows[:2], (), table.spread, table.timed)
    measured = {row.arm: page.figures_of(row.arm, record, ["1", "2"]) for row in short.rows}
    lines = page.markdown(short, measured, record).splitlines()
    begin = (
        "| LLaVA-NeXT (control) | 95.0% (94.0 – 96.0) | 95.0% | 95.0% | 95.0% | 95.0% | 40.0% | 3.25 | 20.0 (× 1.00) |"
    )
    assert lines[2].startswith(begin + " 9.5 (× 1.00) |")
    assert lines[2].endswith("| 100% | 2.85 | 65.5 | 1562 | 76.4 | 61.7 |")
    assert lines[3].startswith("| vision-guided sampler* (one seed) | 90.0% | 90.0% |")
    assert len({line.count("|") for line in lines}) == 1


def test_models_are_timed_in_turn_on_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    picture = SimpleNamespace(height=1, width=1)
    monkeypatch.setattr(speed, "vision_flops", lambda *_: 1e9)
    monkeypatch.setattr(speed, "decoder_flops", lambda *_: 2e9)
    monkeypatch.setattr(cards, "questions", lambda *_, **__: ((picture, str(n), "", "") for n in itertools.count()))

    class Model:
        def __init__(self, name: str):
            self.name, self.config = name, None

        def num_tiles(self, size: tuple[int, int]) -> int:
            return 3

        def generate_batch(self, images: Any, questions: Any, max_new_tokens: int) -> list[SimpleNamespace]:
            asked.append((self.name, tuple(questions)))
            return [SimpleNamespace(layer_tokens=[7])] * len(questions)

        def generate(self, image: Any, question: str, max_new_tokens: int) -> None:
            asked.append((self.name, question))

    found = speed.time_models({name: Model(name) for name in ("control", "focus")}, 2)
    rounds = [asked[begin : begin + 4] for begin in range(0, len(asked), 4)]
    note = found["control"]["rounds"]
    assert len(rounds) == 1 + note["rounds"] + note["repeated"] and note["rounds"] == 2  # one to warm up
    for one in rounds:
        (first, batch), (second, single) = one[:2]
        assert [*one[2:]] == [("focus", batch), ("focus", single)] and first == second == "control"
        assert len(batch) == 16 and single in batch
    assert len({one[0] for one in rounds}) == 3
    assert found["focus"]["rounds"] == note and found["control"]["times_as_fast"] == 1
    assert found["focus"]["gflops"] == 3
    assert len(found["focus"]["batches"]["processor"]) == len(found["focus"]["alone"]["rounds"]) == 2
    assert page.watched(found) == [f"Times: {remark(note)}\n"] and page.watched({"control": {"gflops": 3}}) == []


def test_a_table_without_all_of_its_arms_claims_nothing(tmp_path: Path) -> None:
    record = record_of.environment(ROOT / "experiments/paper/reproduce.py", "torch")
    record |= {
        "steps": 2,
        "batch": 4,
        "questions": 16,
        "scale_weights": "1,2,3",
        "tables": [2, 7],
        "speed": {},
        "figures": {},
    }
    record |= {"arms": {"control": {"1": answers(0.9)}, "focus": {"1": answers(0.9)}}}
    page.write_page(record, tmp_path / "README.md")
    written = (tmp_path / "README.md").read_text()
    assert re.findall(r"^## (\w+ \d)", written, flags=re.MULTILINE) == ["Table 2", "Table 7"]
    assert "weights of the scales are 1, 2, 3\n" in written
    assert "\nNot run here: vision-guided sampler*; text-guided sampler*; 2×2 average pooling; random" in written
    assert "arms were asked at `0123456789ab`" in written
    link = re.search(r"\[notes.md\]\((.*)\)", written)
    assert link is not None and (tmp_path / link[1]).resolve() == ROOT / "docs/notes.md"
    assert "| both* (one seed) | 90.0% |" in written and "Here too" not in written and "Not here." not in written


def test_a_selector_s_bias_goes_as_far_whatever_the_steps() -> None:
    assert [trained.bias_rate(steps) for steps in (650, 300, 2)] == ["3.0e-03", "6.5e-03", "1.0e-02"]


def test_a_command_that_fails_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=rf"examples/train.py ended with 2; see {tmp_path}/progress.txt"):
        run(["examples/train.py", "--out", str(tmp_path), "--steps", "0"], tmp_path)
    assert "--steps: expected a number of at least 1, got 0" in (tmp_path / "progress.txt").read_text()


def test_what_was_run_is_not_run_again_unless_it_is_another_command(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, sys, time; print('x'); print(json.dumps({'at': time.time(), 'of': sys.argv[1]}))")
    first = once([str(script), "a"], Path("model"), tmp_path, "answers")
    assert (
        first["of"] == "a"
        and first["commit"] == record_of.commit()
        and once([str(script), "a"], Path("model"), tmp_path, "answers") == first
    )
    assert once([str(script), "b"], Path("model"), tmp_path, "answers")["of"] == "b"


def test_results_of_other_steps_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"steps": 400, "batch": 12, "questions": 4000, "arms": {}}))
    places = ["--out", tmp_path, "--runs", tmp_path / "runs"]
    done = python("-m", "experiments.paper.reproduce", "--quick", "--table", 5, *places)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert (
        "expected arms of 2 steps of 2 conversations and 4 questions, as these, got 400 of 12 and 4000" in done.stderr
    )


def test_results_from_other_stages_are_not_added_to(tmp_path: Path) -> None:
    """Such as those of the scenes before, whose records did not name them."""
    recipe = reproduction.recipe_of(argparse.Namespace(quick=True, runs=tmp_path, jobs=1))
    own, file = recipe.record(), tmp_path / "results.json"
    file.write_text(json.dumps(own | {"arms": {}}))
    assert reproduction.known_results(file, recipe)["arms"] == {}
    for name, other in (("scale_weights", "1,1,1"), ("stages", {**own["stages"], "full": 500}), ("stages", None)):
        known = own | {"arms": {}, name: other}
        file.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
        with pytest.raises(Refused, match=f"results.json: {name}: expected .*, as these arms have, got"):
            reproduction.known_results(file, recipe)


def test_weights_of_other_numbers_of_scales() -> None:
    """With three they are the embedded model's; always they sum to the number of scales, and the coarsest has the least."""
    assert [float(w) for w in trained.scale_weights(3).split(",")] == pytest.approx(
        [float(w) for w in trained.miniature.SCALE_WEIGHTS.split(",")]
    )
    for branches in (2, 3, 7):
        own = [float(w) for w in trained.scale_weights(branches).split(",")]
        assert len(own) == branches and sum(own) == pytest.approx(branches) and min(own) == own[0] > 0


@pytest.mark.parametrize(
    "option, said", [("--arms", "--arms: expected some of alpha-0, alpha-0.01, "), ("--seeds", "--seeds")]
)
def test_a_mistyped_argument_is_named(tmp_path: Path, option: str, said: str) -> None:
    done = python("-m", "experiments.paper.reproduce", "--table", 5, "--runs", tmp_path / "runs", option, 0)
    assert done.returncode != 0 and said in done.stderr and not (tmp_path / "runs").exists()


def in_this_process(command: list[str], out: Path) -> str:
    """What `arms.run` does, without a new Python for each of the 90 commands, most of whose time is its imports."""
    name = command[1] if command[0] == "-m" else Path(command[0]).stem
    module = importlib.import_module(name) if command[0] == "-m" else script(name)
    arguments = command[2:] if command[0] == "-m" else command[1:]
    out.mkdir(parents=True, exist_ok=True)
    printed = io.StringIO()
    with ONE_AT_A_TIME, mock.patch.object(sys, "argv", [name, *arguments]), contextlib.redirect_stdout(printed):
        assert module.main() == 0, command
    return printed.getvalue().strip().splitlines()[-1]


ONE_AT_A_TIME = threading.Lock()
script = functools.cache(example)


@pytest.mark.timeout(1200)
def test_quick_run_of_everything_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--seeds", "1"]

    def reproduce(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["reproduce", *command, *arguments])
        assert reproduction.main() == 0, capsys.readouterr().err
        return json.loads((tmp_path / "out/results.json").read_text())

    record = reproduce("--table", "6", "--arms", "text")  # each command of it in a process of its own, as users have it
    assert set(record["arms"]) == {"text"}
    assert {"progress.txt", "curve.png"} <= {file.name for file in (tmp_path / "runs/quick/text-1").iterdir()}
    monkeypatch.setattr(trained, "run", in_this_process)
    monkeypatch.setattr(script("train"), "draw_curve", mock.Mock())  # one was drawn above
    monkeypatch.setattr(speed, "BATCH", 2)  # the times are not looked at
    record = reproduce("--table", "5", "--figure", "3")
    assert set(record["arms"]) == {"text", "vision", "alpha-0", "alpha-0.01", "alpha-0.5"}
    assert list(record["figures"]) == ["3"] and record["tables"] == [5, 6]
    written = (tmp_path / "out/README.md").read_text()
    assert re.findall(r"^## (\w+ \d)", written, flags=re.MULTILINE) == ["Table 5", "Table 6", "Figure 3"]
    table_5 = written[: written.index("## Table 6")]
    assert table_5.count("| 0.1* |") == 1 and len(re.findall(r"\*\*(Here too|Not here|Too close)", table_5)) == 3
    made = {arm: (tmp_path / f"runs/quick/{arm}-1/checkpoint.pt").stat().st_mtime_ns for arm in ("text", "vision")}

    whole = reproduce()
    for arm, then in made.items():
        assert (tmp_path / f"runs/quick/{arm}-1/checkpoint.pt").stat().st_mtime_ns == then
        assert whole["arms"][arm] == record["arms"][arm]
    extra = {row.arm for table in TABLES.values() for row in table.rows if row.extra}
    assert extra == {"printed", "single", "cosine"} and set(whole["arms"]) == set(ARMS) - extra
    assert whole["speed"]["focus"]["times_as_fast_alone"] > 0
    written = (tmp_path / "out/README.md").read_text()
    titles = [*(f"Table {number}" for number in TABLES), *(f"Figure {number}" for number in FIGURES)]
    assert re.findall(r"^## (\w+ \d)", written, flags=re.MULTILINE) == titles
    pictures = re.findall(r"\]\((figures/[^)]+)\)", written)
    assert len(pictures) == len(FIGURES)
    for picture in pictures:
        assert (tmp_path / "out" / picture).stat().st_size > 5000

    assert set(reproduce("--table", "2", "--arms", "printed,single,cosine")["arms"]) == set(ARMS)
    assert "| both, Eq. 2's factor as printed (one seed) | " in (tmp_path / "out/README.md").read_text()
