"""Where the samplers look on the miniature's scenes: scales by what a region shows, and whether the asked text survives.

python -m experiments.scales_by_content --model weights/tiny --count 500
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import minifocus
from examples.command_line import expect_numbers
from minifocus import cards
from minifocus.cards.feature_map import GRID, locate
from minifocus.trace import PictureTrace

ROOT = Path(__file__).resolve().parent.parent


def region_kinds(scene: cards.Scene, window: int) -> np.ndarray:
    """Of each region of the map: 2 where a digit's or letter's middle is in it, 1 where some other thing, 0 where nothing is
    that can be asked about."""
    places = locate(scene)
    rows, cols = places.grid
    text = np.zeros(places.things.shape[1], bool)
    for thing, glyphs in zip(scene.objects, places.glyphs, strict=True):
        text[glyphs[: len(thing.text)]] = True
    kinds = np.where(text, 2, places.foreground.astype(int))[GRID * GRID :].reshape(rows, cols + 1)[:, :cols]
    padded = np.pad(kinds, ((0, -rows % window), (0, -cols % window)))
    return padded.reshape(padded.shape[0] // window, window, -1, window).max(axis=(1, 3))


def asked_thing(question: str) -> str:
    """The name of the card, the sign or the row of the table that a "read" question is about."""
    match = re.search(r"the (\w+ (?:card|sign))|beside (\w+) in", question)
    assert match is not None, question
    return match[1] or f"{match[2]} row"


def covered(trace: PictureTrace, places: np.ndarray) -> bool:
    """Whether every one of these places of the uncompressed sequence is a cell that some kept token stands for."""
    layout = trace.layout
    extent = dict(zip(trace.entered.tolist(), trace.extent.tolist(), strict=True))
    cells = set()
    for place in trace.kept.tolist():
        row, col = divmod(place - layout.leading, layout.row_length)
        if place < layout.leading or col >= layout.width:
            continue
        down, across = extent[place]
        cells |= {(row + i, col + j) for i in range(down) for j in range(across)}
    return all(divmod(int(place) - layout.leading, layout.row_length) in cells for place in places)


def measure(model: minifocus.Llava, count: int, seed: int, dense: bool) -> dict[str, Any]:
    """Over `count` "read" questions, one a scene."""
    regions = np.zeros((3, 8), int)  # kind of region, scale
    survived, kept_share = [], []
    scenes = cards.scenes("test", seed, dense or None)
    with tqdm(total=count, disable=None) as bar:
        while len(survived) < count:
            scene = next(scenes, None)
            if scene is None:
                raise minifocus.InputError(f"count: the split has only {len(survived)} such scenes from {seed} on")
            asked = [q for q in scene.questions if q.family == "read"][:1]
            for q in asked:
                answer = model.generate(scene.image, q.question, max_new_tokens=1)
                trace = answer.pictures[0]
                if trace.choice is not None:
                    kinds = region_kinds(scene, model.before_llm.options.window)  # type: ignore[union-attr]
                    np.add.at(regions, (kinds.ravel(), trace.choice.numpy().ravel()), 1)
                number = next(i for i, thing in enumerate(scene.objects) if thing.name == asked_thing(q.question))
                survived.append(covered(trace, locate(scene).glyphs[number][: len(q.answer)]))
                kept_share.append(answer.tokens.after_text / answer.tokens.full)
                bar.update()
    result: dict[str, Any] = {
        "questions": count,
        "asked_text_covered": float(np.mean(survived)),
        "tokens_kept": float(np.mean(kept_share)),
    }
    if regions.any():
        before = model.before_llm
        names = [f"{down}x{across}" for down, across in before.pools]  # type: ignore[union-attr]
        shares = regions[:, : len(names)] / regions.sum(1, keepdims=True).clip(1)
        result["regions"] = dict(zip(("empty", "things", "text"), regions.sum(1).tolist(), strict=True))
        result["scales"] = {
            kind: dict(zip(names, row.round(4).tolist(), strict=True))
            for kind, row in zip(("empty", "things", "text"), shares, strict=True)
        }
    return result


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "weights/tiny"))
    parser.add_argument("--sampler", default="focus", choices=("focus", "vision", "text"))
    parser.add_argument("--count", type=int, default=500, help="scenes, with one question each")
    parser.add_argument("--seed", type=int, default=0, help="the test split's scene to begin with")
    parser.add_argument("--line", action="store_true", help="print the result on one line")
    parser.add_argument("--mixed", action="store_true", help="every fourth scene dense, instead of all")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "count")
    expect_numbers(arguments, 0, "seed", cards.SPLIT_SIZE - 1)
    model = minifocus.load(arguments.model, arguments.sampler)
    result = measure(model, arguments.count, arguments.seed, not arguments.mixed)
    print(json.dumps(result, indent=None if arguments.line else 1))


if __name__ == "__main__":
    command_line.run(main)
