"""examples/reproduce.py: its arms and tables fit together, what it says follows from figures, and it runs and goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts_as_modules import scripts

ROOT = Path(__file__).resolve().parent.parent
trained, drawn, page, tables, record_of = scripts(
    "reproduction benchmarks weights examples", "arms figures page tables record"
)
ARMS, CommandFailed, once, run = trained.ARMS, trained.CommandFailed, trained.once, trained.run
FIGURES, SAME, TABLES, Figures = drawn.FIGURES, drawn.SAME, tables.TABLES, tables.Figures
FAMILIES = ("read", "perceive", "reason", "relate")


def figures(accuracy: float, tokens: float = 1.0, spread: float = 0.0, **more: object) -> Figures:
    return Figures(accuracy, dict.fromkeys(FAMILIES, accuracy), tokens, spread, **more)  # type: ignore[arg-type]


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
        assert words <= allowed | {"--lr-selector", "--straight-through"}
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
        (
            figures(0.93, 0.40, 0.0, speed=1.40),
            [False, False, False],
        ),  # below by more than the control's spread of 1 point
        (figures(0.93, 0.39, 0.02, speed=1.42), [True, True, True]),
    ],
)
def test_claims_about_both_samplers(focus: Figures, holds: list[bool]) -> None:
    control = figures(0.945, 1.0, 0.01, speed=1.0)
    measured = {"control": control, "focus": focus, "vision": figures(0.9, 0.5), "text": figures(0.94, 0.8)}
    claims = TABLES[2].claims
    assert [claim.holds(measured) for claim in claims[:3]] == holds
    assert [claim.holds(measured) for claim in claims[3:]] == [False, True, True]


def test_claim_of_a_collapse() -> None:
    even = {kind: {"4x4": 0.4, "2x2": 0.3, "1x1": 0.3} for kind in ("empty", "text")}
    one = {kind: {"4x4": 0.0, "2x2": 0.02, "1x1": 0.98} for kind in ("empty", "text")}
    split = {"empty": {"4x4": 1.0, "1x1": 0.0}, "text": {"4x4": 0.0, "1x1": 1.0}}
    claim = TABLES[5].claims[0]
    assert [claim.holds({"alpha-0": figures(0.5, scales=s)}) for s in (even, one, split)] == [False, True, False]


def test_a_table_s_markdown() -> None:
    arms = {
        "control": {str(seed): answer for seed, answer in enumerate([0.94, 0.96], 1)},
        "vision": {"1": 0.9},
    }
    record = {
        "arms": {
            name: {
                seed: {
                    "accuracy": a,
                    "families": dict.fromkeys(FAMILIES, a),
                    "tokens": {"equivalent": a},
                    "where": None,
                }
                for seed, a in own.items()
            }
            for name, own in arms.items()
        },
        "speed": {
            "control": {
                "samples_per_second": 20.0,
                "times_as_fast": 1.0,
                "samples_per_second_alone": 9.5,
                "times_as_fast_alone": 1.0,
                "gflops": 3.25,
            }
        },
    }
    table = TABLES[2]
    short = type(table)(table.title, table.rows[:2], (), table.spread, table.timed)
    measured = {row.arm: found for row in short.rows if (found := page.figures_of(row.arm, record)) is not None}
    lines = page.markdown(short, measured, record).splitlines()
    assert lines[2].startswith(
        "| LLaVA-NeXT (control) | 95.0% ± 1.0 | 95.0% | 95.0% | 95.0% | 95.0% | 95.0% | 3.25 | 20.0 (× 1.00) | 9.5 (× 1.00) |"
    )
    assert lines[2].endswith("| 100% | 2.85 | 65.5 | 1562 | 76.4 | 61.7 |")
    assert lines[3].startswith("| vision-guided sampler* | 90.0% (one seed) |")
    assert len({line.count("|") for line in lines}) == 1


def test_a_table_without_all_of_its_arms_claims_nothing(tmp_path: Path) -> None:
    answer = {"accuracy": 0.9, "families": dict.fromkeys(FAMILIES, 0.9), "tokens": {"equivalent": 0.4}, "where": None}
    record = record_of.environment(ROOT / "examples/reproduce.py", "torch") | {
        "steps": 2,
        "batch": 4,
        "questions": 16,
        "tables": [2, 7],
    }
    record |= {"arms": {"control": {"1": answer}, "focus": {"1": answer}}, "speed": {}, "figures": {}}
    page.write_page(record, tmp_path / "README.md")
    written = (tmp_path / "README.md").read_text()
    assert re.findall(r"^## (\w+ \d)", written, flags=re.MULTILINE) == ["Table 2", "Table 7"]
    assert "\nNot run here: vision-guided sampler*; text-guided sampler*; 2×2 average pooling; random" in written
    link = re.search(r"\[notes.md\]\((.*)\)", written)
    assert link is not None and (tmp_path / link[1]).resolve() == ROOT / "reproduction/notes.md"
    assert "| both* | 90.0% (one seed) |" in written and "Here too" not in written and "Not here." not in written


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
    assert first["of"] == "a" and once([str(script), "a"], Path("model"), tmp_path, "answers") == first
    assert once([str(script), "b"], Path("model"), tmp_path, "answers")["of"] == "b"


def test_results_of_other_steps_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"steps": 400, "batch": 12, "questions": 4000, "arms": {}}))
    command = [sys.executable, "examples/reproduce.py", "--quick", "--table", "5", "--out", str(tmp_path)]
    command += ["--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not (tmp_path / "runs").exists()
    assert (
        "expected arms of 2 steps of 4 conversations and 16 questions, as these, got 400 of 12 and 4000" in done.stderr
    )


@pytest.mark.timeout(1200)
def test_quick_run_of_everything_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "examples/reproduce.py", "--quick", "--runs", str(tmp_path / "runs")]
    command += ["--out", str(tmp_path / "out"), "--seeds", "1"]

    def reproduce(*arguments: str) -> dict:
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1100)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "out/results.json").read_text())

    record = reproduce("--table", "5", "--figure", "3")
    assert set(record["arms"]) == {"vision", "alpha-0", "alpha-0.01", "alpha-0.5"} and list(record["figures"]) == ["3"]
    written = (tmp_path / "out/README.md").read_text()
    assert re.findall(r"^## (\w+ \d)", written, flags=re.MULTILINE) == ["Table 5", "Figure 3"]
    assert written.count("| 0.1* |") == 1 and written.count("**Here too.**") + written.count("**Not here.**") == 2
    checkpoint = tmp_path / "runs/quick/vision-1/checkpoint.pt"
    made = checkpoint.stat().st_mtime_ns

    whole = reproduce()
    assert checkpoint.stat().st_mtime_ns == made and whole["arms"]["vision"] == record["arms"]["vision"]
    extra = {row.arm for table in TABLES.values() for row in table.rows if row.extra}
    assert extra == {"printed", "single"} and set(whole["arms"]) == set(ARMS) - extra
    assert whole["speed"]["focus"]["times_as_fast_alone"] > 0
    written = (tmp_path / "out/README.md").read_text()
    titles = [*(f"Table {number}" for number in TABLES), *(f"Figure {number}" for number in FIGURES)]
    assert re.findall(r"^## (\w+ \d)", written, flags=re.MULTILINE) == titles
    pictures = re.findall(r"\]\((figures/[^)]+)\)", written)
    assert len(pictures) == len(FIGURES)
    for picture in pictures:
        assert (tmp_path / "out" / picture).stat().st_size > 5000

    assert set(reproduce("--table", "2", "--arms", "printed,single")["arms"]) == set(ARMS)
    assert "| both, Eq. 2's factor as printed | " in (tmp_path / "out/README.md").read_text()
