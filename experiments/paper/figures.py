"""The paper's figures, of the miniature's arms."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minifocus import cards
from minifocus.figure import draw_answers
from minifocus.trace import PictureTrace

from .arms import SEEDS, Recipe, model_of, once
from .speed import load, time_models

FIRST_SCENE = 700_000  # place in the test split of the pictures that are shown: not among those of tables and times


def plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def scenes_with(family: str, count: int) -> list[tuple[Image.Image, cards.Question]]:
    """Dense scenes, each with its first question of a family."""
    asked = (
        (scene.image, next((q for q in scene.questions if q.family == family), None))
        for scene in cards.scenes("test", FIRST_SCENE, dense=True)
    )
    return list(islice(((image, q) for image, q in asked if q is not None), count))


def score_and_speed_by_layer(recipe: Recipe, file: Path) -> dict[str, Any]:
    depth = load("text", recipe).config.text.num_hidden_layers

    def answers(layer: int) -> dict[str, Any]:
        command = ["examples/evaluate.py", "--sampler", "text", "--layer", str(layer), "--dense", "--json"]
        command += ["--count", str(recipe.count)]
        out = recipe.runs / f"text-{SEEDS[0]}"
        found = once(command, model_of("text", SEEDS[0], recipe), out, f"layer-{layer}")
        return {**{name: found[name] for name in ("accuracy", "interval_95")}, "tokens": found["tokens"]["equivalent"]}

    with ThreadPoolExecutor(recipe.jobs) as pool:
        points = {str(layer): found for layer, found in enumerate(pool.map(answers, range(depth)))}
    models = {str(layer): load("text", recipe, layer=layer) for layer in reversed(range(depth))}
    for layer, found in time_models(models, 12 if recipe.count > 100 else 1).items():
        points[layer] |= {key: found[key] for key in ("samples_per_second", "rounds")}
    pyplot = plots()
    figure, left = pyplot.subplots(figsize=(6, 4), layout="constrained")
    accuracy = np.array([points[str(i)]["accuracy"] for i in range(depth)])
    low, high = np.array([points[str(i)]["interval_95"] for i in range(depth)]).T
    error = 100 * np.stack([accuracy - low, high - accuracy])
    left.errorbar(range(depth), 100 * accuracy, error, fmt="o-", color="tab:blue", capsize=4)
    left.set_xlabel("layer before which the text-guided sampler acts")
    left.set_ylabel("exact answers, %", color="tab:blue")
    left.set_xticks(range(depth))
    right = left.twinx()
    right.plot(range(depth), [points[str(i)]["samples_per_second"] for i in range(depth)], "s--", color="tab:red")
    right.set_ylabel("samples/s", color="tab:red")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return {"layers": points}


def share_of_scales(recipe: Recipe, file: Path) -> dict[str, Any]:
    model = load("vision", recipe)
    pools = model.before_llm.pools  # type: ignore[union-attr]
    shares = []
    for scene in islice(cards.scenes("test", FIRST_SCENE), min(recipe.count, 40)):
        choice = model.generate(scene.image, "Is there a red card?", max_new_tokens=1).pictures[0].choice
        assert choice is not None
        shares.append(np.bincount(choice.flatten().numpy(), minlength=len(pools)) / choice.numel())
    ordered = np.array(sorted(shares, key=lambda own: own[-1]))
    pyplot = plots()
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    bottom = np.zeros(len(ordered))
    for (down, across), own in zip(pools, ordered.T, strict=True):
        axes.bar(range(len(ordered)), 100 * own, bottom=bottom, label=f"{down}×{across}", width=1.0)
        bottom += 100 * own
    axes.set_xlabel("picture, by its share of the finest scale")
    axes.set_ylabel("regions, %")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return {"mean": dict(zip([f"{d}x{a}" for d, a in pools], ordered.mean(0).round(4).tolist(), strict=True))}


def grid(sheets: list[Image.Image], across: int) -> Image.Image:
    """Sheets of any size in rows of `across`."""
    rows = [sheets[i : i + across] for i in range(0, len(sheets), across)]
    width = max(sum(sheet.width for sheet in row) for row in rows)
    whole = Image.new("RGB", (width, sum(max(sheet.height for sheet in row) for row in rows)), (255, 255, 255))
    top = 0
    for row in rows:
        left = 0
        for sheet in row:
            whole.paste(sheet, (left, top))
            left += sheet.width
        top += max(sheet.height for sheet in row)
    return whole


def both_samplers(recipe: Recipe, file: Path) -> dict[str, Any]:
    model, sheets, right = load("focus", recipe), [], 0
    for image, question in scenes_with("read", 4):
        answer = model.generate(image, question.question)
        right += answer.text == question.answer
        sheets.append(draw_answers([image], [(question.question, answer)]))
    grid(sheets, 2).quantize(256).save(file)
    return {"right": right, "asked": len(sheets)}


def same_picture_other_questions(recipe: Recipe, file: Path) -> dict[str, Any]:
    model = load("focus", recipe)
    scene = next(s for s in cards.scenes("test", FIRST_SCENE, dense=True) if len(s.questions) >= 4)
    asked = [(question, model.generate(scene.image, question.question)) for question in scene.questions[:4]]
    draw_answers([scene.image], [(q.question, answer) for q, answer in asked]).quantize(256).save(file)
    return {"right": sum(answer.text == question.answer for question, answer in asked), "asked": len(asked)}


def importance_map(trace: PictureTrace) -> np.ndarray:
    """[H, W] scores of a picture of which nothing was pooled or removed."""
    cells = trace.layout.cells(trace.entered)
    found = torch.zeros(trace.layout.height * trace.layout.width)
    found[cells[cells >= 0]] = trace.importance[cells >= 0]
    return found.view(trace.layout.height, trace.layout.width).numpy()


def importance_by_layer(recipe: Recipe, file: Path) -> dict[str, Any]:
    """Nothing is removed at γ = 1, so that every layer is reached by all tokens."""
    model = load("text", recipe)
    depth, asked = model.config.text.num_hidden_layers, scenes_with("read", 3)
    pyplot = plots()
    figure, axes = pyplot.subplots(len(asked), depth + 1, figsize=(3 * depth + 3, 3 * len(asked)), layout="constrained")
    for row, (image, question) in zip(axes, asked, strict=True):
        row[0].imshow(image)
        row[0].set_title(question.question, fontsize=9)
        for layer in range(depth):
            model.set_sampler("text", layer=layer, gamma=1.0)
            row[1 + layer].imshow(
                importance_map(model.generate(image, question.question, max_new_tokens=1).pictures[0])
            )
            row[1 + layer].set_title(f"before layer {layer}", fontsize=9)
    for ax in axes.flat:
        ax.axis("off")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    return {}


@dataclass(frozen=True)
class Figure:
    """`make` draws to a file and returns figures; it needs the arms named in `arms`, first seed."""

    title: str
    words: str
    arms: tuple[str, ...]
    make: Callable[[Recipe, Path], dict[str, Any]]

    def draw(self, recipe: Recipe, out: Path) -> dict[str, Any]:
        name = "figures/" + self.make.__name__.replace("_", "-") + ".png"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        return {"file": name, **self.make(recipe, out / name)}


FIGURES: dict[int, Figure] = {
    2: Figure(
        "Accuracy and speed by the text-guided sampler's layer",
        "The paper: the later the layer, the better the score and the slower. Bars are 95 % intervals.",
        ("text",),
        score_and_speed_by_layer,
    ),
    3: Figure(
        "Share of each scale, picture by picture",
        "The paper: pictures differ; those with much detail take the finest scale more often.",
        ("vision",),
        share_of_scales,
    ),
    4: Figure(
        "What both samplers select (Figures 4, 6 and 7)",
        "Left the scale of every region (red 1×1, blue 2×2, grey 4×4), right the importance of the tokens that stay.",
        ("focus",),
        both_samplers,
    ),
    5: Figure(
        "Importance (Eq. 8) by layer (Figures 5 and 10)",
        "The paper: early layers look anywhere, later ones at the answer.",
        ("text",),
        importance_by_layer,
    ),
    8: Figure(
        "Other questions about the same picture (Figures 8 and 9)",
        "The scales stay, what the text keeps changes.",
        ("focus",),
        same_picture_other_questions,
    ),
}
SAME = {6: 4, 7: 4, 9: 8, 10: 5}  # figures of the paper that show what another does
