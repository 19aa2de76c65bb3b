"""The page of what was measured on weights/small, out of its record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..record import ROOT
from ..timing import remark
from .importance_maps import TOP
from .selector_inputs import NORMS

FEWEST = 3  # rounds from which a token's time is shown

HEAD = """# Real parts, nothing trained

Made by `{command}` at `{commit}`, with torch {torch}, on {threads} of {cores} cores ({cpu}).

The model is `weights/small/{folder}` (`make small`): a DINOv2-S tower and SmolLM2-135M, both trained, and **a random projector
between them**. Text has never been aligned with these pictures. Sizes, times and the tower's features are real; what the decoder
does with a picture is not what LLaVA's does, and no accuracy is to be had. The photographs are scikit-image's.
"""

SPEED = """## Speed of every method

One equal budget, {budget:.0%} of the visual tokens over the decoder's layers (§4.4). Options were searched for on the first
photograph; "tokens" is what it took in the rounds. `vision`, `avgpool` and `maxpool` have no budget but their own. `focus`
and `vision` have the stand-in for a trained selector, `selector="variance"`. Times are ratios to `none`, which ran in the same
rounds, every method in turn. Memory is what the question or the batch takes beyond what was in use, at its peak.

One question about a photograph, another one in each round: {alone_rounds}. `none` reads {tokens:.0f} visual tokens on average, in
{prefill:.2f} s, and makes a token of the answer in {decode:.0f} ms.

{alone}
A batch of {batch_size} questions about pieces of photographs, each of {batch_tokens:.0f} visual tokens: {batch_rounds}. `none`
reads them in {batch_prefill:.1f} s{batch_decode}{left_out}

{batch}{watched}"""

IMPORTANCE = """## Importance (Eq. 8) by layer (Figure 5)

![Importance maps by layer](importance-by-layer.png)

Each row is a photograph and a question, each map the importance of the map's tokens before a layer, from its least value to its
98th percentile. Nothing was removed (γ = 1). The projector is random: this is what a decoder attends to that was never aligned
with pictures, and no evidence of where an aligned one looks.

Means over {photographs} photographs:

- "entropy": of the importance of all scored tokens, ÷ its maximum (1: all alike)
- "top {top:.0%}": what the {top:.0%} most important tokens have of the importance
- "thumbnail": what the thumbnail has of it, with {thumbnail:.0%} of the tokens
{saliency}

{table}"""

INPUTS = """## What a selector would be given (§3.2)

pool(X_i)·X_gᵀ / √C of every region of 4×4 cells and every token of the thumbnail, before the projector ("tower") and after it
("projected", which is random for the photographs, and trained in the miniature). "Common" is the part of the variance that all
regions of a picture share (of the mean over regions, from token to token), "level" what a region has in all tokens, "own" the
rest; the three sum to 100 %. "Common of squares" is the shared part of the mean square, with the mean in it: where it is near
100 %, a step that is meant for one region moves all alike. "cosine" takes both vectors at length 1, "layer" subtracts the mean
over the thumbnail's tokens and divides by their deviation. Means over {photographs} photographs and {scenes} scenes of cards.

{table}"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def over(rounds: int) -> str:
    return "one round" if rounds == 1 else f"medians over {rounds} rounds"


def watched(found: dict[str, Any]) -> str:
    """How the rounds went; nothing in a record that is older than the watch."""
    went = remark(*(found[key] for key in ("alone_watched", "batch_watched") if key in found))
    return f"\n{went}\n" if went else ""


def speed_table(results: list[dict[str, Any]], rounds: int) -> str:
    """Without the time of a token where there are few rounds: a few seconds that other programs may have had."""
    rows, decoded = [], rounds >= FEWEST
    for one in sorted(results, key=lambda one: one["prefill_ratio"]):
        options = {key: value for key, value in one["options"].items() if key != "selector"}
        named = ", ".join(f"{key} {value:g}" for key, value in options.items() if not isinstance(value, bool))
        memory = "" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 2**20:.0f}"
        cells = [f"`{one['method']}`" + (f" ({named})" if named else "")]
        cells += [f"{one['tokens']['equivalent']:.1%}", f"{one['gflops']:.0f}"]
        cells += [f"{one['prefill_ratio']:.2f}", *([f"{one['decode_ratio']:.2f}"] if decoded else []), memory]
        rows.append(cells)
    times = ["prefill ÷ none", *(["per token ÷ none"] if decoded else [])]
    return table(["method", "tokens", "GFLOPs a question", *times, "MiB"], rows)


def speed(found: dict[str, Any]) -> str:
    none, together = found["alone"][0], found["batch"][0]
    missing = [one["method"] for one in found["alone"] if one["method"] not in {b["method"] for b in found["batch"]}]
    alone_rounds, batch_rounds = found["rounds"]
    return SPEED.format(
        budget=found["budget"],
        alone_rounds=over(alone_rounds),
        tokens=none["tokens"]["full"],
        prefill=none["prefill_seconds"],
        decode=1000 * none["decode_seconds_per_token"],
        alone=speed_table(found["alone"], alone_rounds),
        batch_size=found["batch_size"],
        batch_tokens=together["tokens"]["full"],
        batch_rounds=over(batch_rounds),
        batch_prefill=together["prefill_seconds"],
        batch_decode=f", and makes a token of every answer in {1000 * together['decode_seconds_per_token']:.0f} ms."
        if batch_rounds >= FEWEST
        else ". So few rounds say nothing of a token's time, a few seconds in which the machine had other work: it is left out.",
        left_out=f"\nNot asked in a batch, for the time that it takes: {', '.join(missing)}." if missing else "",
        batch=speed_table(found["batch"], batch_rounds),
        watched=watched(found),
    )


def importance(found: dict[str, Any]) -> str:
    layers = found["layers"]
    known = "saliency" in layers[0]
    rows = [
        [str(number), f"{one['entropy']:.2f}", f"{one['top']:.0%}", f"{one['thumbnail']:.0%}"]
        + ([f"{one['saliency']:.2f}"] if known else [])
        for number, one in enumerate(layers)
    ]
    saliency = (
        '- "saliency": rank correlation of the map\'s importance with what the package of the tower calls salient'
    )
    heads = ["before layer", "entropy", f"top {TOP:.0%}", "thumbnail", *(["saliency"] if known else [])]
    return IMPORTANCE.format(
        photographs=found["photographs"],
        top=TOP,
        thumbnail=found["thumbnail_tokens"],
        saliency=saliency if known else "- saliency was not measured: the package or onnxruntime was not there",
        table=table(heads, rows),
    )


def selector_inputs(found: dict[str, Any]) -> str:
    rows = []
    for model, title in (("photographs", "photographs"), ("miniature", "miniature")):
        for features in ("tower", "projected"):
            own = found[model][features]
            for norm in NORMS:
                one = own[norm]
                mean = 0 if norm == "layer" else one["mean"]  # but for rounding
                cells = [f"{title}, {features} ({own['width']} wide)", norm, f"{mean:.3g}", f"{one['std']:.3g}"]
                rows.append(cells + [f"{one[key]:.1%}" for key in ("common", "level", "own", "common_squares")])
    heads = ["features", "normalised", "mean", "deviation", "common", "level", "own", "common of squares"]
    return INPUTS.format(
        photographs=found["photographs"]["pictures"], scenes=found["miniature"]["pictures"], table=table(heads, rows)
    )


def page(record: dict[str, Any], file: Path) -> str:
    notes = os.path.relpath(ROOT / "docs/notes.md", file.parent)
    parts = [
        HEAD.format(
            command=record["command"],
            commit=str(record["commit"])[:12] + ("+" if record["dirty"] else ""),
            torch=record["versions"]["torch"],
            cores=record["machine"]["cores"],
            cpu=record["machine"]["cpu"],
            folder=record["folder"],
            threads=record["threads"],
        ),
        speed(record["speed"]),
        importance(record["importance"]),
        selector_inputs(record["selector_inputs"]),
        f"What such inputs did to the miniature's training: [notes.md]({notes}#the-selector).",
    ]
    return "\n".join(parts).rstrip() + "\n"
