"""The tables of LLaVA-STF's or AVG-LLaVA's paper in miniature, from the stages of `make weights`, on two cores.

python -m experiments.systems.reproduce llava-stf             # 40 minutes; stopped, it goes on where it was
python -m experiments.systems.reproduce avg-llava --table 3   # or "Figure 5"; may be repeated
python -m experiments.systems.reproduce llava-stf --quick     # every arm for two steps and few questions, to try it out

The arms (arms.py) begin from the first three stages of `make weights`, which are made first where RUNS does not have them.
Results go to OUT: README.md sets each table beside the paper's, results.json has all figures.
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
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from examples.command_line import Refused, expect_numbers, working, write_text
from minifocus.cards import FAMILIES
from minifocus.files.locks import hold

from ..miniature import make as miniature
from ..paper.arms import Recipe
from ..paper.tables import Figures
from ..record import ROOT, environment
from .arms import SEEDS, SYSTEMS, answers_of, choices_of
from .tables import TABLES, Choosing, Table

HEAD = """# {title} in miniature

Made by `{command}` at `{here}`, with torch {torch}, on {cores} cores ({cpu}).

Every arm was trained for {steps} steps of {batch} conversations and asked {questions} unseen questions about dense scenes. Where
several seeds were run, a row shows their mean and, in brackets, their range; the others are of the first seed. Tokens are the
mean over the decoder's layers, as a share of what LLaVA-NeXT reads. ± is 1.96 standard errors of a difference, from the number of
answers alone. The values are not comparable with the paper's; their order is.
"""
TITLES = {"llava-stf": "LLaVA-STF", "avg-llava": "AVG-LLaVA"}


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("system", choices=tuple(SYSTEMS))
    parser.add_argument("--table", action="append", help="this one alone")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of stages and arms, to go on from")
    parser.add_argument("--out", type=Path, help="folder of page and results; default: experiments/results/SYSTEM")
    parser.add_argument("--steps", type=int, default=300, help="of every arm")
    parser.add_argument("--batch", type=int, default=6, help="conversations per step")
    parser.add_argument("--count", type=int, default=1000, help="questions about dense scenes for every arm")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time, each by one thread")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="of the tables that show a spread")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "steps batch count")
    expect_numbers(arguments, 1, "jobs", 1000)
    known = TABLES[arguments.system]
    if unknown := set(arguments.table or ()) - set(known):
        raise Refused(f"--table: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))[:200]}")
    return arguments


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """With --quick the embedded weights stand for the stage that arms begin from."""
    runs, system = arguments.runs.resolve(), arguments.system
    if arguments.quick:
        return Recipe(runs / f"quick-{system}", {"full": ROOT / "weights/tiny"}, 2, 2, 0, 8, arguments.jobs)
    arms = runs / f"{system}/{arguments.steps} steps of {arguments.batch}"
    stages = {"full": runs / "tiny/full/model"}
    return Recipe(arms, stages, arguments.steps, arguments.batch, 0, arguments.count, arguments.jobs)


def wanted_arms(tables: dict[str, Table], seeds: int) -> dict[tuple[str, int], bool]:
    """Arms and seeds, the first seed first, and whether it is asked what it chooses."""
    found: dict[tuple[str, int], bool] = {}
    for table in tables.values():
        for seed in SEEDS[: seeds if table.spread else 1]:
            for row in table.rows:
                found[row.arm, seed] = found.get((row.arm, seed), False) or table.choices
    return dict(sorted(found.items(), key=lambda one: one[0][1]))


def run_arms(system: str, wanted: dict[tuple[str, int], bool], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Arm → seed, as text → what it answered, and under "choices" what it chose."""

    def ask(name: str, seed: int) -> dict[str, Any]:
        found = answers_of(SYSTEMS[system], name, seed, recipe)
        if wanted[name, seed]:
            found |= {"choices": choices_of(SYSTEMS[system], name, seed, recipe)}
        return found

    results: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=len(wanted), desc="arms", unit="arm", disable=None)
    with bar, working(ThreadPoolExecutor(recipe.jobs)) as pool:
        waiting = {pool.submit(ask, *one): one for one in wanted}
        for done in as_completed(waiting):
            name, seed = waiting[done]
            results.setdefault(name, {})[str(seed)] = found = done.result()
            bar.update()
            tokens = found["tokens"]["equivalent"]
            bar.write(f"{name}, seed {seed}: {found['accuracy']:.1%} at {tokens:.1%} of the tokens", file=sys.stderr)
    return results


def page_of(system: str, record: dict[str, Any]) -> str:
    machine, here = record["machine"], str(record["commit"])[:12] + ("+" if record["dirty"] else "")
    parts = [
        HEAD.format(
            title=TITLES[system],
            here=here,
            torch=record["versions"]["torch"],
            **machine,
            **{name: record[name] for name in ("command", "steps", "batch", "questions")},
        )
    ]
    for number in record["tables"]:
        table = TABLES[system][number]
        title = number if number.startswith("Figure") else f"Table {number}"
        body = markdown_of_choices(table, record) if table.choices else markdown(table, record)
        parts.append(f"## {title}. {table.title}\n\n{body}")
        measured = {row.arm: figures_of(seeds_of(table, record["arms"][row.arm])) for row in table.rows}
        parts += [f"- {claim.text} {claim.check(measured)}" for claim in table.claims]
        parts.append(f"\n{table.notes}\n" if table.notes else "")
    return "\n".join(parts).rstrip() + "\n"


def seeds_of(table: Table, own: dict[str, Any]) -> list[Any]:
    """Of an arm, what the table shows: all its seeds or the first."""
    return [own[seed] for seed in sorted(own)[: None if table.spread else 1]]


def figures_of(seeds: list[Any]) -> Figures:
    accuracy, tokens = (
        fmean(of) for of in zip(*((s["accuracy"], s["tokens"]["equivalent"]) for s in seeds), strict=True)
    )
    choices = [one["choices"] for one in seeds if "choices" in one]
    return Choosing({"all": accuracy}, {"all": sum(one["count"] for one in seeds)}, tokens, choices=choices)


def known_results(file: Path, recipe: Recipe) -> dict[str, Any]:
    """What an earlier run wrote, for this one to add its tables to."""
    if not file.exists():
        return {}
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        there = (known["steps"], known["batch"], known["questions"], list(known["tables"]), dict(known["arms"]))[:3]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{file}: expected an earlier run's results: {type(error).__name__}") from error
    if there != (recipe.steps, recipe.batch, recipe.count):
        raise Refused(
            f"{file}: expected arms of {recipe.steps} steps of {recipe.batch} conversations and {recipe.count} questions, as "
            f"these, got {there[0]} of {there[1]} and {there[2]}; name another --out or delete it"
        )
    return known


def markdown(table: Table, record: dict[str, Any]) -> str:
    heads = ["", "exact answers", *FAMILIES, "tokens", *table.columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table.rows:
        seeds = seeds_of(table, record["arms"][row.arm])
        accuracies = [one["accuracy"] for one in seeds]
        spread = f" ({100 * min(accuracies):.1f} – {100 * max(accuracies):.1f})" if len(seeds) > 1 else ""
        cells = [row.label, f"{fmean(accuracies):.1%}{spread}"]
        cells += [f"{fmean(one['families'][family] for one in seeds):.1%}" for family in FAMILIES]
        cells.append(f"{fmean(one['tokens']['equivalent'] for one in seeds):.1%}")
        cells += row.paper or [""] * len(table.columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown_of_choices(table: Table, record: dict[str, Any]) -> str:
    heads = ["", "all questions", *FAMILIES]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table.rows:
        seeds = [one["choices"] for one in seeds_of(table, record["arms"][row.arm])]
        cells = [row.label]
        for family in ("all", *FAMILIES):
            shares = [fmean(one["chosen"][family][level] for one in seeds) for level in seeds[0]["chosen"][family]]
            cells.append(" ".join(f"{100 * share:.0f}" for share in shares))
            cells[-1] += f" %: {fmean(one['tokens'][family] for one in seeds):.1%}"
        lines.append("| " + " | ".join(cells) + " |")
    seeds = [one["choices"] for one in seeds_of(table, record["arms"][table.rows[0].arm])]
    least = [f"{fmean(one['tokens_at_least_loss'][family] for one in seeds):.1%}" for family in ("all", *FAMILIES)]
    lines.append("| " + " | ".join(["at the least loss", *least]) + " |")
    return "\n".join(lines) + "\n"


def reproduce(arguments: argparse.Namespace) -> None:
    begun, system, recipe = time.perf_counter(), arguments.system, recipe_of(arguments)
    tables = {name: TABLES[system][name] for name in arguments.table or TABLES[system]}
    out = arguments.out or (recipe.runs / "results" if arguments.quick else ROOT / "experiments/results" / system)
    record = environment(Path(__file__), "torch", "numpy")
    known = known_results(out / "results.json", recipe) if arguments.table else {}  # or all of it is made again
    with hold(arguments.runs), hold(out):
        if not arguments.quick:
            miniature.run_stages(arguments.runs.resolve() / "tiny", miniature.STEPS, until="full")
        results = run_arms(system, wanted_arms(tables, arguments.seeds), recipe)
        record |= {
            "seconds": round(time.perf_counter() - begun),
            "steps": recipe.steps,
            "batch": recipe.batch,
            "questions": recipe.count,
            "tables": sorted({*known.get("tables", []), *tables}),
            "arms": {name: known.get("arms", {}).get(name, {}) | own for name, own in results.items()}
            | {name: own for name, own in known.get("arms", {}).items() if name not in results},
        }
        write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
        write_text(out / "README.md", page_of(system, record))
        print(f"{time.perf_counter() - begun:.0f} s; see {out / 'README.md'}")


@command_line.guarded
def main() -> None:
    reproduce(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
