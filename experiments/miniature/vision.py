"""The vision tower's pretraining, which stands in for CLIP's: every patch learns to say what it shows.

python -m experiments.miniature.vision --model DIR --out RUN      (DIR as files.py writes it; torchrun shares the work)
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from examples.command_line import expect_numbers
from minifocus import cards
from minifocus.cards.feature_map import GRID, PATCH, View, patch_cover, scene_geometry
from minifocus.cards.plan import BAR_STEP
from minifocus.cpu_memory import keep_freed_memory
from minifocus.distributed.processes import Process
from minifocus.inputs.image_processor import CLIP_MEAN, CLIP_STD
from minifocus.loading.config import Config, load_config
from minifocus.training.loop import fit
from minifocus.training.optimizers import make_optimizers
from minifocus.training.settings import MOST, Settings
from minifocus.vision import VisionTower

FIRST_SCENE = 50_000_000  # place in the training split
POOLS = 2  # parts of the data, each drawn by whoever needs it; micro-batch i is taken from part i % POOLS

NAMES = [(kind, colour) for kind in cards.KINDS for colour in cards.COLOURS]  # what a thing can be called
GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SLOTS = [  # a digit's or letter's place in a text of that length
    (length, place) for length in range(1, cards.MOST_GLYPHS + 1) for place in range(length)
]
LEVELS = 6  # classes of a bar's height
HEADS = {  # classes of what a patch is asked about itself, and the question's weight; class 0 is "none of these"
    "kind": (len(cards.KINDS) + 1, 1.0),
    "colour": (len(cards.COLOURS) + 1, 1.0),
    "glyph": (len(GLYPHS) + 1, 2.0),
    "slot": (len(SLOTS) + 1, 1.0),
    "height": (LEVELS + 1, 1.0),
    "count": (6, 1.0),  # how many things of this kind there are
    **{side: (len(NAMES) + 1, 0.5) for side in cards.SIDES},  # what is directly on that side of this thing
}
UNASKED = -1
TILE = cards.TILE


def view_labels(objects: list[cards.Object], view: View) -> tuple[np.ndarray, np.ndarray]:
    """What the patches of a view are to say: int8 [64, heads] in HEADS' order, and bool [64, names], what is there.

    A patch speaks for the thing that covers most of it; one with the middle of a digit or letter speaks for the thing
    that carries it.
    """
    labels = {head: np.zeros((GRID, GRID), np.int8) for head in HEADS}
    present = np.zeros((GRID, GRID, len(NAMES)), bool)
    for head in ("glyph", "slot", "height") if view.whole else ("count",):
        labels[head][:] = UNASKED
    boxes = view.boxes([thing.box for thing in objects])
    cover = patch_cover(boxes, GRID, GRID)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    visible = cover.sum((1, 2)) * PATCH**2 / area
    owner = cover.argmax(0) if objects else np.zeros((GRID, GRID), int)
    for k, thing in enumerate(objects):
        if view.whole:
            continue
        for i, (x0, y0, x1, y1) in enumerate(view.boxes(list(thing.glyphs))):
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            if 0 <= x < TILE and 0 <= y < TILE:
                patch = int(y // PATCH), int(x // PATCH)
                owner[patch] = k
                readable = min(x, y, TILE - x, TILE - y) > 5
                labels["glyph"][patch] = 1 + GLYPHS.index(thing.text[i]) if readable else UNASKED
                labels["slot"][patch] = 1 + SLOTS.index((len(thing.text), i)) if visible[k] > 0.9 else UNASKED
    for k, thing in enumerate(objects):
        seen = cover[k] >= 0.08
        present[seen, NAMES.index((thing.kind, thing.colour))] = True
        mine = seen & (owner == k)
        labels["kind"][mine] = 1 + cards.KINDS.index(thing.kind)
        labels["colour"][mine] = 1 + list(cards.COLOURS).index(thing.colour)
        if view.whole:
            labels["count"][mine] = min(5, sum(other.kind == thing.kind for other in objects))
        elif thing.kind == "bar":
            level = min((thing.box[3] - thing.box[1]) // BAR_STEP, LEVELS)
            labels["height"][mine] = level if visible[k] > 0.9 else UNASKED
        for side in cards.SIDES:
            other = cards.neighbour(objects, thing, side)
            if other is not None:
                shown = visible[objects.index(other)] > 0.4
                labels[side][mine] = 1 + NAMES.index((other.kind, other.colour)) if shown else UNASKED
    return np.stack(list(labels.values()), -1).reshape(GRID * GRID, -1), present.reshape(GRID * GRID, -1)


def vision_examples(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five views and their labels: uint8 [5, 112, 112, 3], int8 [5, 64, heads], bool [5, 64, names].

    Two crowded crops at a random scale; of a whole scene its thumbnail and, of its tiles, the two that show most.
    """
    rng = np.random.default_rng(index)
    seed = cards.SPLITS["train"] + FIRST_SCENE + index
    examples = []

    def add(image: Image.Image, objects: list[cards.Object], view: View) -> None:
        examples.append((np.asarray(image), *view_labels(objects, view)))

    for dense in (False, True):
        scale = rng.uniform(0.8, 1.5)
        drawn = math.ceil(rng.uniform(115, 165) / scale)
        side = math.ceil(drawn * scale)
        scene = cards.draw(seed, dense, (drawn, drawn))
        x, y = (int(v) for v in rng.integers(0, side - TILE + 1, 2))
        crop = scene.image.resize((side, side), Image.Resampling.BICUBIC).crop((x, y, x + TILE, y + TILE))
        add(crop, scene.objects, View((side / drawn, side / drawn), (-x, -y), whole=False))

    scene = cards.draw(seed, dense=index % 4 == 3)
    width, height = scene.image.size
    thumbnail = scene.image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    add(thumbnail, scene.objects, View((TILE / width, TILE / height), (0, 0), whole=True))

    view, canvas_size = scene_geometry((height, width))
    canvas = Image.new("RGB", canvas_size[::-1])
    resized = (
        min(math.ceil(width * view.scale[0]), canvas.width),
        min(math.ceil(height * view.scale[1]), canvas.height),
    )
    corner = ((canvas.width - resized[0]) // 2, (canvas.height - resized[1]) // 2)
    canvas.paste(scene.image.resize(resized, Image.Resampling.BICUBIC), corner)
    cover = patch_cover(
        view.boxes([thing.box for thing in scene.objects]), canvas.height // PATCH, canvas.width // PATCH
    )
    shown = cover.sum(0).reshape(canvas.height // TILE, GRID, canvas.width // TILE, GRID).sum((1, 3))
    for tile in np.argsort(shown, axis=None, kind="stable")[-2:]:
        y, x = (int(v) * TILE for v in np.unravel_index(tile, shown.shape))
        moved = View(view.scale, (view.offset[0] - x, view.offset[1] - y), whole=False)
        add(canvas.crop((x, y, x + TILE, y + TILE)), scene.objects, moved)
    images, labels, present = zip(*examples, strict=True)
    return np.stack(images), np.stack(labels), np.stack(present)


class VisionPretraining(nn.Module):
    """The vision tower with a linear head for each thing asked of a patch, and one for the CLS token."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.vision.hidden_size
        self.tower = VisionTower(config)
        self.tower.keep_cls = True
        for name, parameter in self.tower.named_parameters():
            if "embedding" in name:
                nn.init.normal_(parameter, std=0.02)
        heads = {head: nn.Linear(width, classes) for head, (classes, _) in HEADS.items()}
        self.heads = nn.ModuleDict(
            {**heads, "present": nn.Linear(width, len(NAMES)), "cls": nn.Linear(width, len(NAMES))}
        )

    def forward(self, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [N, 112, 112, 3] → logits [N, 64, classes] by head; the CLS token's ("cls") are [N, names]."""
        pixels = (tiles.float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        features = self.tower.features(self.tower(pixels.permute(0, 3, 1, 2)))
        logits = {head: self.heads[head](features[:, 1:]) for head in (*HEADS, "present")}
        # As CLIP does: the CLS token is read through post_layernorm, which the patches never pass.
        return logits | {"cls": self.heads["cls"](self.tower.post_layernorm(features[:, 0]))}


@dataclass(frozen=True)
class Views:
    """tiles uint8 [N, 112, 112, 3], labels int8 [N, 64, heads], present bool [N, 64, names]."""

    tiles: torch.Tensor
    labels: torch.Tensor
    present: torch.Tensor

    @property
    def num_targets(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: torch.Tensor | slice) -> Views:
        return Views(self.tiles[index], self.labels[index], self.present[index])


class PatchObjective(nn.Module):
    """The tower with its heads and their losses."""

    def __init__(self, config: Config):
        super().__init__()
        self.pretraining = VisionPretraining(config)
        # "Nothing" is what most patches hold.
        self.weights = {
            head: torch.tensor([0.1 if head in ("glyph", "slot", "height") else 0.2] + [1.0] * (classes - 1))
            for head, (classes, _) in HEADS.items()
        }

    def forward(self, batch: Views, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        """A micro-batch's part of a step's loss, a mean over tiles."""
        logits, inside = self.pretraining(batch.tiles), batch.present.float()
        losses = {}
        for i, head in enumerate(HEADS):
            target = batch.labels[:, :, i].flatten().long()
            loss = F.cross_entropy(logits[head].flatten(0, 1), target, self.weights[head], ignore_index=UNASKED)
            losses[head] = loss.nan_to_num()  # a mean over nothing where no patch is asked
        losses["present"] = F.binary_cross_entropy_with_logits(logits["present"], inside)
        losses["cls"] = F.binary_cross_entropy_with_logits(logits["cls"], inside.amax(1))
        total = (
            sum(weight * losses[head] for head, (_, weight) in HEADS.items()) + 5 * losses["present"] + losses["cls"]
        )
        figures = {"loss": total, "glyph_loss": losses["glyph"], "left_loss": losses["left"]}
        share = batch.num_targets / num_targets
        return total * share, {name: float(value.detach()) for name, value in figures.items()}


def draw_views(scenes: Sequence[int]) -> Views:
    made = [vision_examples(index) for index in scenes]
    return Views(*(torch.from_numpy(np.concatenate(part)) for part in zip(*made, strict=True)))


class ViewBatches:
    """Micro-batches of random tiles from `count` scenes."""

    def __init__(self, count: int, size: int, seed: int):
        self.count, self.size, self.seed = count, size, seed

    @cache  # noqa: B019 (there is one such object a run)
    def pool(self, number: int) -> Views:
        return draw_views(range(number, self.count, POOLS))

    def share(self, numbers: Iterable[int], workers: int = 0) -> Iterator[Views]:
        for number in numbers:
            views = self.pool(number % POOLS)
            drawn = np.random.default_rng([self.seed, number]).integers(0, len(views.tiles), self.size)
            yield views[torch.from_numpy(drawn)]


@torch.inference_mode()
def validate(task: PatchObjective, views: Views) -> dict[str, Any]:
    """Share of the patches that show something which say it rightly, by head."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for begin in range(0, len(views.tiles), 250):
        part = views[slice(begin, begin + 250)]
        logits = task.pretraining(part.tiles)
        for i, head in enumerate(HEADS):
            target = part.labels[:, :, i]
            right[head] += int(((logits[head].argmax(-1) == target) & (target > 0)).sum())
            asked[head] += int((target > 0).sum())
    return {"right": {head: round(right[head] / max(asked[head], 1), 3) for head in HEADS}}


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; gets tower.safetensors")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--scenes", type=int, default=14_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "steps")
    expect_numbers(arguments, 1, "scenes", 1e6)  # they are all in memory
    expect_numbers(arguments, 0, "lr", MOST)
    expect_numbers(arguments, 0, "seed")
    process = Process.join(torch.device("cpu"))
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    task = PatchObjective(load_config(arguments.model))
    settings = Settings(
        steps=arguments.steps,
        batch=64,
        micro_batch=32,
        warmup_steps=arguments.steps // 40,
        final_lr=0.03,
        muon=True,
        weight_decay=0.01,
        save_every=200,
        log_every=50,
    )
    optimizers = make_optimizers(task, lambda name: arguments.lr, settings)
    held_out = range(arguments.scenes, arguments.scenes + min(200, arguments.scenes))
    views = draw_views(held_out) if process.rank == 0 else None
    with process.alone(arguments.out):
        fit(
            task, optimizers, ViewBatches(arguments.scenes, settings.micro_batch, arguments.seed), settings, arguments.out,
            torch.device("cpu"), {"scenes": arguments.scenes, "lr": arguments.lr, "seed": arguments.seed},
            validate=lambda: validate(task, views) if views is not None else {}, validate_every=500, title="vision",
        )  # fmt: skip
        if process.rank == 0:
            save_file(task.pretraining.tower.state_dict(), arguments.out / "tower.safetensors")
    process.leave()


if __name__ == "__main__":
    command_line.run(main)
