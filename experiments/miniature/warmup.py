"""The decoder's warm-up: what stands in for a pretrained language model and an aligned projector.

python -m experiments.miniature.warmup --model DIR --tower FILE --out RUN      (torchrun shares the work)

A decoder of random weights that reads hundreds of visual tokens finds no hold: left to itself it had not left its first
plateau after 500 steps. Two aids, neither of them the paper's, are given here and nowhere else: most tokens of empty
patches are left out (which makes steps cheap as well), and two heads of two layers are shown where to look.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from examples.command_line import expect_numbers
from minifocus import cards
from minifocus.cards.feature_map import GRID, Places, locate
from minifocus.cpu_memory import keep_freed_memory
from minifocus.distributed.processes import Process
from minifocus.inputs.conversations import Conversation, Turn
from minifocus.inputs.processor import Processor
from minifocus.inputs.tokenizer import Tokenizer
from minifocus.llama import DecoderLayer, rotate
from minifocus.load import Llava
from minifocus.loading.config import load_config
from minifocus.loading.model_folder import Origin
from minifocus.rows import Rows
from minifocus.samplers.hooks import BeforeLLM, Context, PictureFeatures, VisualTokens, Words, uncompressed
from minifocus.training.examples import Batch, Batches, collate, encode
from minifocus.training.loop import fit
from minifocus.training.optimizers import make_optimizers
from minifocus.training.packed import Guidance, forward
from minifocus.training.settings import MOST, Settings

FIRST_SCENE = 60_000_000  # place in the training split
EMPTY_KEPT = 0.1  # share of the tokens that show no thing which stay
GAZE_LAYERS = {1: False, 2: True}  # layer → whether it is shown where to find answers, or where the things named are
GAZE_HEADS = 2
MAX_TURNS = 12


@dataclass(frozen=True)
class Gaze:
    """Where a token of a turn had better look: at some things of the scene (by number), or at one glyph of the first."""

    token: int
    things: tuple[int, ...]
    glyph: int | None = None  # digit or letter
    answering: bool = False  # looked at to find the answer, not because it was named
    thumbnail: bool = False  # in the thumbnail, the only view that shows them all


@dataclass(frozen=True)
class GuidedBatch:
    """A batch with what the aids need: per example its scene's places, the tokens that stay, and gazes per turn."""

    batch: Batch
    places: list[Places]
    kept: list[torch.Tensor]
    gazes: list[list[list[Gaze]]]

    @property
    def num_targets(self) -> int:
        return self.batch.num_targets


def mentions(question: str, objects: list[cards.Object]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Which characters of a question name which things of the scene: (begin, end, their numbers)."""
    kinds, colours = "|".join(cards.KINDS), "|".join(cards.COLOURS)
    found = []

    def add(match: re.Match[str], wanted: Callable[[cards.Object], bool]) -> None:
        things = tuple(i for i, thing in enumerate(objects) if wanted(thing))
        if things:
            found.append((match.start(1), match.end(1), things))

    for match in re.finditer(rf"\b((?:{colours}) (?:{kinds}))\b", question):
        add(match, lambda thing, name=match[1]: thing.name == name)
    for match in re.finditer(rf"\b(?:many|the|Which) ({'|'.join((*cards.SHAPES, 'bar'))})", question):
        add(match, lambda thing, kind=match[1]: thing.kind == kind)
    for match in re.finditer(rf"\bthe ({colours}) (?:or|one)\b", question):
        add(match, lambda thing, name=f"{match[1]} card": thing.name == name)
    for match in re.finditer(rf"\bbeside ({colours}) in the table", question):
        add(match, lambda thing, name=f"{match[1]} row": thing.name == name)
    for match in re.finditer(r"(?:with the (?:number|word)|beside) ([A-Z]+|[0-9]+)\b", question):
        add(match, lambda thing, text=match[1]: thing.text == text)
    return found


def gazes(turn: Turn, objects: list[cards.Object], tokenizer: Tokenizer, image_token: int) -> list[Gaze]:
    """Where the tokens of a turn had better look; they are counted from the first after the placeholder."""
    prompt = f"USER: <image>\n{turn.question} ASSISTANT:"
    encoded = tokenizer.encode(f"{prompt} {turn.answer}")
    skip, begin = encoded.ids.index(image_token) + 1, prompt.index(turn.question)
    spans = [(first - begin, last - begin) for first, last in encoded.offsets[skip:]]
    named = mentions(turn.question, objects)
    wanted = [
        Gaze(i, things, glyph=last - 1 - start if is_text(turn.question[start:end]) else None)
        for start, end, things in named
        for i, (first, last) in enumerate(spans)
        if first < end and last > start
    ]
    # The token before each of the answer's, and the place of the character with which that one ends.
    asks = {i - 1: end - 1 - (len(prompt) + 1 - begin) for i, (_, end) in enumerate(spans)}
    last = len(tokenizer.encode(prompt).ids) - skip - 1
    found = tuple(sorted({thing for _, _, things in named for thing in things}))
    if turn.question.startswith("Which bar"):
        found = tuple(i for i in found if objects[i].colour == turn.answer)
    if found:
        wanted.append(Gaze(last, found, answering=True, thumbnail=turn.question.startswith("How many")))
        if turn.family == "relate":  # what is beside a thing is known where the thing is
            wanted.append(Gaze(last + 1, found, answering=True))
        elif turn.family == "read":
            wanted += [Gaze(token, found, glyph=place, answering=True) for token, place in asks.items() if place >= 0]
    return wanted


def is_text(mention: str) -> bool:
    """Whether a thing is named by the number or word on it."""
    return mention.isdigit() or mention.isupper()


def learned_early(question: cards.Question) -> bool:
    """Whether a question is of a kind that needs few examples: what stands on a thing, or what a thing that is named is."""
    from_text = re.search(r"with the (?:number|word)|beside \d", question.question) is not None
    return question.family in ("read", "perceive") and not from_text


class GuidedBatches(Batches):
    """Fresh scenes; of their questions first those that take longest to learn."""

    def __init__(self, processor: Processor, size: int, seed: int):
        super().__init__(processor, range(cards.SPLIT_SIZE), size, seed, independent=True)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> GuidedBatch:  # type: ignore[override]
        tokenizer, image_token = self.processor.text_tokenizer, self.processor.config.image_token_id
        examples, places, kept, wanted = [], [], [], []
        first = number * self.size
        for position in range(first, first + self.size):
            rng = np.random.default_rng([self.seed, 3, position])
            scene = next(s for s in cards.scenes("train", FIRST_SCENE + position) if s.questions)
            asked = [scene.questions[i] for i in rng.permutation(len(scene.questions))]
            asked = sorted(asked, key=learned_early)[:MAX_TURNS]
            turns = tuple(Turn(q.question, q.answer, q.family) for q in asked)
            examples.append(
                encode(self.processor, Conversation(str(position), (scene.image,), turns), independent=True)
            )
            places.append(locate(scene))
            chance = rng.random(len(places[-1].newline))
            kept.append(torch.from_numpy(places[-1].foreground | places[-1].newline | (chance < EMPTY_KEPT)))
            wanted.append([gazes(turn, scene.objects, tokenizer, image_token) for turn in turns])
        return GuidedBatch(collate(examples, first), places, kept, wanted)


class MostlyForeground(BeforeLLM):
    """The tokens of each picture that `kept` names."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        whole, kept = uncompressed(picture), self.kept.pop(0)
        return VisualTokens(whole.tokens[kept], whole.source[kept], whole.extent[kept], whole.layout)


class GazeLoss:
    """At the two layers, -log of the attention that some heads pay to where a token had better look.

    It takes the place of an inside-LLM sampler, which keeps everything.
    """

    def __init__(self, model: Llava):
        self.rope, self.image_token = model.language_model.model.rope, model.config.image_token_id
        self.losses: list[torch.Tensor] = []
        self.current: GuidedBatch | None = None

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> None:
        if index not in GAZE_LAYERS or self.current is None:
            return
        attention, h = layer.self_attn, layer.input_layernorm(rows.hidden)
        cos, sin = self.rope(rows.positions, h.dtype)
        q, k = (
            rotate(attention.split_heads(projection(h))[:, :GAZE_HEADS], cos, sin)
            for projection in (attention.q_proj, attention.k_proj)
        )
        where, targets = self._targets(rows, GAZE_LAYERS[index])
        row, token = torch.tensor(where).T
        mask = rows.attention_mask()
        assert mask is not None
        scores = torch.einsum("nhd,nhsd->nhs", q[row, :, token], k[row]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask[row, 0, token][:, None], -torch.inf).softmax(-1).mean(1)
        self.losses.append(-((weights * torch.stack(targets)).sum(-1) + 1e-4).log().mean())

    def _targets(self, rows: Rows, answering: bool) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
        """(row, column) of the tokens that have a gaze of this kind, and the columns [S] it had better be on."""
        assert self.current is not None
        batch, where, targets = self.current.batch, [], []
        shift = rows.valid.shape[1] - batch.input_ids.shape[1]  # text is at the end of both
        for row, (places, turns) in enumerate(zip(self.current.places, self.current.gazes, strict=True)):
            visual = rows.picture[row] == 0
            source = (rows.source[row, visual] - (batch.input_ids[row] == self.image_token).nonzero()[0]).numpy()
            for number, wanted in enumerate(turns):
                start = int((batch.turn[row] == number).nonzero()[0]) + shift
                for gaze in wanted:
                    if gaze.answering != answering:
                        continue
                    if gaze.glyph is None:
                        at = places.things[list(gaze.things)].any(0)[source]
                        if gaze.thumbnail:
                            at = at & (source < GRID * GRID)
                    else:
                        at = source == places.glyphs[gaze.things[0], gaze.glyph]
                    target = torch.zeros(rows.valid.shape[1])
                    target[visual] = torch.from_numpy(at).float()
                    where.append((row, start + gaze.token))
                    targets.append(target)
        return where, targets


class WarmupObjective(nn.Module):
    def __init__(self, model: Llava):
        super().__init__()
        self.model, self.foreground, self.gaze = model, MostlyForeground(), GazeLoss(model)

    def forward(self, batch: GuidedBatch, num_targets: int, num_batches: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.foreground.kept, self.gaze.losses, self.gaze.current = list(batch.kept), [], batch
        self.model.before_llm, self.model.inside_llm = self.foreground, self.gaze  # type: ignore[assignment]
        size = len(batch.places)
        guidance = Guidance([True] * size, [None] * size, [1.0] * size)
        output = forward(self.model, batch.batch, guidance, independent=True)
        self.model.before_llm = self.model.inside_llm = None
        answers = F.cross_entropy(output.logits, output.targets, reduction="sum")
        gaze = torch.stack(self.gaze.losses).mean()
        figures = {"loss": float(answers.detach()) / len(output.targets), "gaze_loss": float(gaze.detach())}
        return answers / num_targets + 0.5 * gaze / num_batches, figures


def new_model(folder: Path, tower: Path, seed: int) -> Llava:
    """The model of `folder`'s config.json with the pretrained tower and everything else new."""
    torch.manual_seed(seed)
    config = load_config(folder)
    model = Llava(config, Processor.from_folder(folder, config), Origin.read(folder))
    model.vision_tower.load_state_dict(load_file(tower))
    model.template = "vicuna"
    tower, projector = model.vision_tower, model.multi_modal_projector
    with torch.no_grad():
        # Words as large as visual tokens, and an undecided head: otherwise the first plateau is long.
        model.language_model.model.embed_tokens.weight.normal_(std=1.0)
        model.language_model.lm_head.weight.normal_(std=0.02)
        model.image_newline.normal_()
        # The first visual tokens of size 1, whatever the size of the features.
        features = [
            tower.features(tower(model.image_processor(cards.draw(FIRST_SCENE - 1 - i).image)[0])).flatten(0, 1)
            for i in range(50)
        ]
        projector.linear_1.weight.mul_(1.7 / projector.linear_1(torch.cat(features)).std())
        projector.linear_2.weight.mul_(1.0 / projector(torch.cat(features)).std())
    return model


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and tokenizer")
    parser.add_argument("--tower", type=Path, required=True, help="the pretrained tower")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; gets the model in model/")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "steps")
    expect_numbers(arguments, 0, "lr", MOST)
    expect_numbers(arguments, 0, "seed")
    device = torch.device("cpu")
    process = Process.join(device)
    keep_freed_memory()
    model = new_model(arguments.model, arguments.tower, arguments.seed)
    task = WarmupObjective(model)
    settings = Settings(
        arguments.steps,
        batch=16,
        micro_batch=8,
        warmup_steps=50,
        final_lr=0.1,
        muon=True,
        weight_decay=0.01,
        log_every=25,
    )
    optimizers = make_optimizers(task, lambda name: 0.0 if "vision_tower" in name else arguments.lr, settings)
    identity: dict[str, Any] = {"lr": arguments.lr, "seed": arguments.seed}
    batches = GuidedBatches(model.processor, settings.micro_batch, arguments.seed)
    with process.alone(arguments.out):
        fit(task, optimizers, batches, settings, arguments.out, device, identity, title="warm-up")
        if process.rank == 0:
            model.save(arguments.out / "model")
    process.leave()


if __name__ == "__main__":
    command_line.run(main)
