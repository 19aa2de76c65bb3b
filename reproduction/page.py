"""The page: every table beside the paper's, row by row, and what points the same way."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import FIGURES
from tables import PAPER_COLUMNS, TABLES, Figures, Measured, Table

from minifocus.cards import FAMILIES

NOTES = Path(__file__).resolve().parent / "notes.md"
HEAD = """# The paper in miniature

Made by `{command}` at `{commit}`{dirty}, with torch {torch}, on {cores} cores ({cpu}). Every arm was trained for
{steps} steps of {batch} conversations and asked {questions} unseen questions about dense scenes (± {interval:.1f} points at
95 %). Tables with a spread show the mean over at most {seeds} seeds, ± half their range. Rows marked * are the paper's default.
Tokens are §4.4's equivalent, a share of what LLaVA-NeXT reads.

What stands for what: "read" for TextVQA, "perceive" for MME, "reason" for ScienceQA, "relate" for GQA. The values are not
comparable; their order is. What was tried and did not work: [notes.md]({notes}).
"""


def figures_of(name: str, record: dict[str, Any]) -> Figures | None:
    seeds = list(record["arms"].get(name, {}).values())
    if not seeds:
        return None
    accuracies = [one["accuracy"] for one in seeds]
    speed = record["speed"].get(name)
    return Figures(
        fmean(accuracies),
        {family: fmean(one["families"][family] for one in seeds) for family in FAMILIES},
        fmean(one["tokens"]["equivalent"] for one in seeds),
        max(accuracies) - min(accuracies),
        None if speed is None else speed["times_as_fast"],
        seeds[0]["where"]["scales"] if seeds[0].get("where") else None,
    )


def write_page(record: dict[str, Any], file: Path) -> None:
    seeds = max(len(own) for own in record["arms"].values()) if record["arms"] else 0
    share = 0.95
    parts = [
        HEAD.format(
            command=record["command"],
            commit=str(record["commit"])[:12],
            dirty=" with changes" if record["dirty"] else "",
            torch=record["versions"]["torch"],
            cores=record["machine"]["cores"],
            cpu=record["machine"]["cpu"],
            steps=record["steps"],
            batch=record["batch"],
            questions=record["questions"],
            interval=196 * (share * (1 - share) / record["questions"]) ** 0.5,
            seeds=seeds,
            notes=os.path.relpath(NOTES, file.parent),
        )
    ]
    for number in record["tables"]:
        table = TABLES[number]
        measured = {row.arm: one for row in table.rows if (one := figures_of(row.arm, record)) is not None}
        parts.append(f"## Table {number}. {table.title}\n")
        parts.append(markdown(table, measured, record))
        if missing := [row.label for row in table.rows if row.arm not in measured and not row.extra]:
            parts.append(f"Not run here: {'; '.join(missing)}.")
        for claim in () if missing else table.claims:
            parts.append(f"- {claim.text} **{'Here too.' if claim.holds(measured) else 'Not here.'}**")
        parts.append(f"\n{table.notes}\n" if table.notes else "")
    for number, figure in FIGURES.items():
        if str(number) in record["figures"]:
            drawn = record["figures"][str(number)]
            parts.append(
                f"## Figure {number}. {figure.title}\n\n{figure.words}\n\n![{figure.title}]({drawn['file']})\n"
            )
    file.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def markdown(table: Table, measured: Measured, record: dict[str, Any]) -> str:
    costs = any(row.cost for row in table.rows)
    heads = ["", "exact answers", *FAMILIES, "tokens"]
    heads += ["GFLOPs", "samples/s", "one by one"] if table.timed else []
    heads += [*(["its tokens", "its samples/s"] if costs and table.timed else []), *(f"its {c}" for c in PAPER_COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table.rows:
        if row.arm not in measured:
            continue
        one = measured[row.arm]
        many = len(record["arms"][row.arm]) > 1
        spread = "" if not table.spread else f" ± {50 * one.spread:.1f}" if many else " (one seed)"
        cells = [row.label, f"{one.accuracy:.1%}{spread}", *(f"{one.families[f]:.1%}" for f in FAMILIES)]
        cells.append(f"{one.tokens:.1%}")
        if table.timed:
            speed = record["speed"].get(row.arm)
            if speed is None:
                cells += [""] * 3
            else:
                cells.append(f"{speed['gflops']:.2f}")
                for way in ("", "_alone"):
                    ratio = f"{speed['times_as_fast' + way]:.2f}"
                    cells.append(f"{speed['samples_per_second' + way]:.1f} (× {ratio})")
            if costs:
                cells += [f"{row.cost[0]:.0%}", f"{row.cost[1]:.2f}"] if row.cost else ["", ""]
        cells += [f"{value:g}" for value in row.paper] if row.paper else [""] * len(PAPER_COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
