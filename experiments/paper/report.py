"""The page: every table beside the paper's, row by row, and what points the same way."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean
from typing import Any

from minifocus.cards import FAMILIES

from ..record import ROOT
from ..timing import remark
from .figures import FIGURES
from .tables import PAPER_COLUMNS, TABLES, Figures, Measured, Table

NOTES = ROOT / "docs/notes.md"
HEAD = """# The paper in miniature

Made by `{command}` at `{commit}`, with torch {torch}, on {cores} cores ({cpu}){asked}.

Every arm was trained for {steps} steps of {batch} conversations and asked {questions} unseen questions about dense scenes. Where
several seeds were run, a row shows their mean and, in brackets, their range; the others are of the first seed. Tokens are
§4.4's equivalent, a share of what LLaVA-NeXT reads. ± is 1.96 standard errors of a difference, from the number of answers
alone: another seed's training would move it, too.

Rows marked * stand for the paper's default. What differs from it here: the balance loss' weights of the scales are {weights}
(Eq. 10; coarse to fine), the selector's learning rate is a third of the paper's, its bias has one of
its own, and of Eq. 2's factor the gradient alone is taken. "read" stands for TextVQA, "perceive" for MME, "reason" for
ScienceQA, "relate" for GQA. The values are not comparable; their order is. What was tried and did not work:
[notes.md]({notes}).
"""


def seeds_of(table: Table, record: dict[str, Any]) -> list[str]:
    """Those that all of a table's arms have, or the first of them: a mean of three beside a single one is no comparison."""
    arms = [record["arms"][row.arm] for row in table.rows if row.arm in record["arms"] and not row.extra]
    return sorted(set(arms[0]).intersection(*arms))[: None if table.spread else 1] if arms else []


def figures_of(name: str, record: dict[str, Any], wanted: list[str]) -> Figures | None:
    """Of those of the `wanted` seeds that an arm has."""
    found = record["arms"].get(name, {})
    seeds = [found[seed] for seed in wanted if seed in found]
    if not seeds:
        return None
    accuracies = [one["accuracy"] for one in seeds]
    speed = record["speed"].get(name)
    return Figures(
        {"all": fmean(accuracies), **{f: fmean(one["families"][f] for one in seeds) for f in FAMILIES}},
        {"all": sum(one["count"] for one in seeds), **{f: sum(one["questions"][f] for one in seeds) for f in FAMILIES}},
        fmean(one["tokens"]["equivalent"] for one in seeds),
        (min(accuracies), max(accuracies)) if len(seeds) > 1 else None,
        None if speed is None else speed["times_as_fast"],
        seeds[0]["where"]["scales"] if seeds[0].get("where") else None,
    )


def write_page(record: dict[str, Any], file: Path) -> None:
    commits = sorted({one["commit"][:12] for own in record["arms"].values() for one in own.values()})
    here = str(record["commit"])[:12] + ("+" if record["dirty"] else "")
    parts = [
        HEAD.format(
            command=record["command"],
            commit=here,
            asked="" if commits in ([], [here]) else f"; arms were asked at {', '.join(f'`{one}`' for one in commits)}",
            torch=record["versions"]["torch"],
            cores=record["machine"]["cores"],
            cpu=record["machine"]["cpu"],
            steps=record["steps"],
            batch=record["batch"],
            questions=record["questions"],
            weights=record["scale_weights"].replace(",", ", "),
            notes=os.path.relpath(NOTES, file.parent),
        )
    ]
    for number in record["tables"]:
        table = TABLES[number]
        seeds = seeds_of(table, record)
        measured = {row.arm: one for row in table.rows if (one := figures_of(row.arm, record, seeds)) is not None}
        parts.append(f"## Table {number}. {table.title}\n")
        parts.append(markdown(table, measured, record))
        if table.timed:
            parts += watched(record["speed"])
        if missing := [row.label for row in table.rows if row.arm not in measured and not row.extra]:
            parts.append(f"Not run here: {'; '.join(missing)}.")
        for claim in () if missing else table.claims:
            parts.append(f"- {claim.text} {claim.check(measured)}")
        parts.append(f"\n{table.notes}\n" if table.notes else "")
    for number, figure in FIGURES.items():
        if str(number) in record["figures"]:
            drawn = record["figures"][str(number)]
            parts.append(
                f"## Figure {number}. {figure.title}\n\n{figure.words}\n\n![{figure.title}]({drawn['file']})\n"
            )
    file.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def watched(speed: dict[str, Any]) -> list[str]:
    """How the rounds went, which are the same for all; nothing of a record that is older than the watch."""
    notes = [one["rounds"] for one in speed.values() if "rounds" in one]
    return [f"Times: {remark(notes[0])}\n"] if notes else []


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
        spread = "" if one.range is None else f" ({100 * one.range[0]:.1f} – {100 * one.range[1]:.1f})"
        cells = [f"{row.label}{' (one seed)' if table.spread and not spread else ''}"]
        cells += [f"{one.accuracy['all']:.1%}{spread}", *(f"{one.accuracy[f]:.1%}" for f in FAMILIES)]
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
