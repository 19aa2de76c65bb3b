"""The paper's tables and figures in miniature, from nothing, on two cores.

python -m experiments.paper.reproduce                    # everything, about three hours; stopped, it goes on where it was
python -m experiments.paper.reproduce --table 2          # one table (2 to 8); may be repeated, as may --figure (2 to 10)
python -m experiments.paper.reproduce --quick            # every arm for two steps and few questions, to try it out: minutes

The arms (arms.py) begin from the first three stages of `make weights`, which are made first where RUNS does
not have them. Results go to OUT: README.md sets each table beside the paper's, results.json has all figures.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.command_line import Refused, expect_numbers, working, write_text
from minifocus.arguments import shown
from minifocus.files.locks import hold

from ..miniature import make as miniature
from ..record import ROOT, environment
from .arms import SEEDS, Recipe, answers_of, model_of, scales_of
from .figures import FIGURES, SAME
from .report import write_page
from .speed import measure_speed
from .tables import TABLES


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--table", type=int, action="append", choices=sorted(TABLES), help="this one alone")
    parser.add_argument("--figure", type=int, action="append", choices=sorted({*FIGURES, *SAME}), help="this one alone")
    parser.add_argument("--arms", help="with commas between: of those that could be, these alone")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of stages and arms, to go on from")
    parser.add_argument(
        "--out", type=Path, help="folder of page and results; default: experiments/results/paper (--quick: RUNS/quick)"
    )
    parser.add_argument("--steps", type=int, default=300, help="of every arm")
    parser.add_argument("--batch", type=int, default=6, help="conversations per step")
    parser.add_argument("--count", type=int, default=1000, help="questions about dense scenes for every arm")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time, each by one thread")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="of the tables that show a spread")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """With --quick the embedded weights stand for both stages that arms begin from."""
    runs = arguments.runs.resolve()
    if arguments.quick:
        tiny = ROOT / "weights/tiny"
        stages = {"full": tiny, "warmup": tiny}
        return Recipe(runs / "quick", stages, steps=2, batch=2, earlier=2, count=4, jobs=arguments.jobs)
    stages = {stage: runs / "tiny" / stage / "model" for stage in ("full", "warmup")}
    arms = runs / f"paper/{arguments.steps} steps of {arguments.batch}"
    earlier = miniature.STEPS["full"] * miniature.BATCH // arguments.batch
    return Recipe(arms, stages, arguments.steps, arguments.batch, earlier, arguments.count, arguments.jobs)


def wanted_arms(tables: list[int], figures: list[int], seeds: int, named: list[str] | None) -> list[tuple[str, int]]:
    """(arm, seed), those first that most depends on, or in the order in which they were named."""
    found: dict[tuple[str, int], None] = {}
    for number in tables:
        table = TABLES[number]
        for seed in SEEDS[: seeds if table.spread else 1]:
            found |= {(row.arm, seed): None for row in table.rows if named is not None or not row.extra}
    found |= {(arm, SEEDS[0]): None for number in figures for arm in FIGURES[number].arms}
    if named is None:
        return sorted(found, key=lambda one: one[1])
    if unknown := set(named) - {arm for arm, _ in found}:
        known = dict.fromkeys(arm for arm, _ in found)
        raise Refused(f"--arms: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))[:200]}")
    return sorted((one for one in found if one[0] in named), key=lambda one: named.index(one[0]))


def run_arms(wanted: list[tuple[str, int]], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Arm → seed, as text → what it answered, and where its selector looks."""

    def result(name: str, seed: int) -> dict[str, Any]:
        answers = answers_of(name, seed, recipe)
        has_selector = (model_of(name, seed, recipe) / "selector.safetensors").exists()
        return {**answers, "where": scales_of(name, seed, recipe) if has_selector else None}

    results: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=len(wanted), desc="arms", unit="arm", disable=None)
    with bar, working(ThreadPoolExecutor(recipe.jobs)) as pool:
        waiting = {pool.submit(result, *one): one for one in wanted}
        for done in as_completed(waiting):
            name, seed = waiting[done]
            found = done.result()
            results.setdefault(name, {})[str(seed)] = found
            bar.update()
            tokens = found["tokens"]["equivalent"]
            bar.write(f"{name}, seed {seed}: {found['accuracy']:.1%} at {tokens:.1%} of the tokens", file=sys.stderr)
    return results


def known_results(file: Path, recipe: Recipe) -> dict[str, Any]:
    """What an earlier run wrote, for this one to add to."""
    if not file.exists():
        return {}
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        own = recipe.record()
        there, here = ((one["steps"], one["batch"], one["questions"]) for one in (known, own))
        other = [name for name in own if known.get(name) != own[name]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{file}: expected an earlier run's results: {type(error).__name__}") from error
    if there != here:
        raise Refused(
            f"{file}: expected arms of {here[0]} steps of {here[1]} conversations and {here[2]} questions, as these, got "
            f"{there[0]} of {there[1]} and {there[2]}; name another --out or delete it"
        )
    for name in other:
        raise Refused(
            f"{file}: {name}: expected {own[name]}, as these arms have, got {shown(known.get(name))}; name another --out or "
            "delete it"
        )
    return known


def reproduce(arguments: argparse.Namespace) -> None:
    begun = time.perf_counter()
    expect_numbers(arguments, 1, "steps batch count")
    expect_numbers(arguments, 1, "jobs", 1000)
    some = bool(arguments.table or arguments.figure)
    tables = sorted(set(arguments.table or ([] if some else TABLES)))
    figures = sorted({SAME.get(number, number) for number in arguments.figure or ([] if some else FIGURES)})
    named = None if arguments.arms is None else arguments.arms.split(",")
    out = arguments.out or (arguments.runs / "quick" if arguments.quick else ROOT / "experiments/results/paper")
    file = out / "results.json"
    record = environment(Path(__file__), "torch", "numpy", "matplotlib")

    if figures and find_spec("matplotlib") is None:
        raise Refused("figures need matplotlib, which is not installed: pip install '.[train]'")
    wanted = wanted_arms(tables, figures, arguments.seeds, named)
    figures = [number for number in figures if named is None or set(FIGURES[number].arms) <= set(named)]
    recipe = recipe_of(arguments)
    known = known_results(file, recipe) if some or named is not None else {}  # or all of it is made again
    with hold(arguments.runs), hold(out):
        if not arguments.quick:
            miniature.run_stages(arguments.runs.resolve() / "tiny", miniature.STEPS, until="full")
        results = run_arms(wanted, recipe)
        timed = [
            row.arm for number in tables for row in TABLES[number].rows if TABLES[number].timed and row.arm in results
        ]
        speed = measure_speed(list(dict.fromkeys(timed)), recipe)
        pictures = {str(number): FIGURES[number].draw(recipe, out) for number in figures}
        arms = known.get("arms", {})
        record |= {
            "seconds": round(time.perf_counter() - begun),
            **recipe.record(),
            "tables": sorted({*known.get("tables", []), *tables}),
            "arms": {name: arms.get(name, {}) | results.get(name, {}) for name in {**arms, **results}},
            "speed": speed or known.get("speed", {}),  # one clock for all of them
            "figures": {**known.get("figures", {}), **pictures},
        }
        write_text(file, json.dumps(record, indent=1) + "\n")
        write_page(record, out / "README.md")
        print(f"{time.perf_counter() - begun:.0f} s; see {out / 'README.md'}")


@command_line.guarded
def main() -> None:
    reproduce(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
