"""Make everything in weights/tiny/ from nothing: ``python weights/train_tiny.py`` (about an hour on two CPU cores).

The model is a LLaVA-NeXT of 1.8 M parameters that answers questions about the pictures of ``minifocus/cards.py``. Its
training follows the order of the real one:

1. ``vision``   the vision tower learns to say, for every patch, what is there: this stands in for CLIP's pretraining.
                Its weights are then frozen, and the features of all training pictures are computed once.
2. ``warmup``   projector and decoder learn to answer, from the tokens of objects and a tenth of the empty ones. With so
                few tokens a step is cheap. Some heads are shown where to look (``gaze_loss``): left to themselves, they
                had not found out after 500 steps.
3. ``full``     the same with every visual token.
4. ``focus``    the same with FocusLLaVA's two samplers (paper §3.2 and §3.3) and their selector, in turns with full
                tokens, so that one set of weights serves with and without them.

Everything is seeded. Checkpoints and a log (JSON lines) go to ``runs/tiny``; a run that was interrupted goes on from
the last checkpoint. The folder ``weights/tiny`` is written after stages 3 and 4.

The work is shared by processes of one thread each, which average their gradients. One process of several threads is as
fast on an idle machine, but many times slower on a busy one: each of its operators waits for the slowest thread.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from minifocus import cards
from minifocus.config import Config, load_config
from minifocus.image import CLIP_MEAN, CLIP_STD, ImageProcessor, select_best_resolution, stitch, unpadded_grid
from minifocus.llama import Llama, attend, rotate
from minifocus.projector import Projector
from minifocus.reference import split_regions
from minifocus.samplers.hooks import PictureFeatures, uncompressed
from minifocus.samplers.vision_guided import (
    LinearSelector,
    VisionGuidedOptions,
    VisionGuidedSampler,
    balance_loss,
    save_selector,
)
from minifocus.vision import VisionTower

TILE, PATCH, GRID = 112, 14, 8  # pixels of a tile and of a patch, patches along a tile

# Places in the training split. The decoder's scenes start at its beginning.
VISION_SEED, TOKENIZER_SEED = 50_000_000, 40_000_000


@dataclass(frozen=True)
class Stage:
    """``lr`` is AdamW's (embeddings, heads, norms, biases), ``muon_lr`` that of the matrices between hidden states."""

    name: str
    steps: int
    batch: int
    lr: float
    muon_lr: float
    seed: int


VISION = Stage("vision", 2200, 64, 1.5e-3, 3e-3, seed=1)
WARMUP = Stage("warmup", 1200, 16, 2e-3, 3e-3, seed=2)
FULL = Stage("full", 150, 12, 1e-3, 1.5e-3, seed=3)
FOCUS = Stage("focus", 360, 12, 1e-3, 1e-3, seed=4)
SELECTOR_LR = 1e-3
VISION_SCENES, LANGUAGE_SCENES = 5200, 6000

# ------------------------------------------------------------------------------------ configuration and tokenizer files


def model_config(vocab_size: int, image_token: int) -> dict:
    """config.json: the smallest decoder and vision tower found to answer well."""
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype": "float32",
        "image_token_id": image_token,
        "image_token_index": image_token,
        "image_seq_length": GRID * GRID,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in cards.PINPOINTS],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,  # of four: no layer is shipped that is not used
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_channels": 3,
            "image_size": TILE,
            "patch_size": PATCH,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 128,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": vocab_size - 1,
        },
    }


def processor_config() -> dict:
    """The image processor's fields, as both generations of transformers' files hold them."""
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": TILE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": TILE, "width": TILE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_pad": True,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in cards.PINPOINTS],
    }


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> Tokenizer:
    """Llama's kind of tokenizer, trained on the generator's text: byte pairs, single digits, bytes for the rest."""
    lines = []
    for index in range(400):
        for q in cards.draw(cards.SPLITS["train"] + TOKENIZER_SEED + index, dense=index % 4 == 3).questions:
            lines += [q.question, f"USER: {q.question} ASSISTANT: {q.answer}"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    # The model file keeps no merges. A piece's place in the vocabulary is the rank of the merge that made it, out of
    # any two halves that are pieces themselves.
    merges = []
    for piece, index in vocab.items():
        if not (pieces.is_byte(index) or pieces.is_control(index) or pieces.is_unknown(index)):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [half for half in halves if half[0] in vocab and half[1] in vocab]
            merges += sorted(known, key=lambda half: (vocab[half[0]], vocab[half[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")  # the last two are not in tokenizer.model: 512 and 513
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": 2048,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "processor_class": "LlavaNextProcessor",
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<image>"},
    )
    return tokenizer


def write_configs(folder: Path) -> None:
    """Every file of the model folder but the weights."""
    tokenizer = write_tokenizer(folder)
    write_json(folder / "config.json", model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>")))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>"), "do_sample": False},
    )
    fields = processor_config()
    write_json(folder / "preprocessor_config.json", fields | {"processor_class": "LlavaNextProcessor"})
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "image_processor": fields,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- the training loop


class Log:
    """Progress for people on stdout, for programs as JSON lines in a file; from the first process only."""

    def __init__(self, file: Path):
        self.file, self.start = file, time.time()

    def __call__(self, stage: str, **values: object) -> None:
        if dist.get_rank() > 0:
            return
        record = {"stage": stage, "seconds": round(time.time() - self.start, 1), **values}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        print(" ".join(f"{key}={value}" for key, value in record.items()), flush=True)


def make_optimisers(module: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    matrices, others, selector = [], [], []
    for name, parameter in module.named_parameters():
        if name.startswith("selector."):
            selector.append(parameter)  # under Muon it learned the reverse: background fine, objects coarse
        elif parameter.ndim == 2 and not any(part in name for part in ("embed", "heads", "lm_head")):
            matrices.append(parameter)
        else:
            others.append(parameter)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=stage.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    if selector:
        optimisers.append(torch.optim.AdamW(selector, lr=SELECTOR_LR, weight_decay=0.0))
    return optimisers


def average_gradients(module: nn.Module) -> None:
    """Over all processes. A parameter that no loss of this step reached has a gradient of zero."""
    parameters = list(module.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def fit(
    stage: Stage,
    module: nn.Module,
    loss_of: Callable[[int, int, np.random.Generator], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[], dict[str, object]],
    runs: Path,
    log: Log,
) -> None:
    """``stage.steps`` steps with warm-up and cosine decay; goes on from ``runs``/<stage>.pt where there is one.

    ``loss_of(step, batch, rng)`` draws its own batch, this process' share. Its random numbers depend on the step and the
    process alone, so that a run that was interrupted sees the batches it would have seen.
    """
    file = runs / f"{stage.name}.pt"
    optimisers = make_optimisers(module, stage)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    first, rank, batch = 0, dist.get_rank(), stage.batch // dist.get_world_size()
    if file.exists():
        state = torch.load(file)
        module.load_state_dict(state["module"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["steps"]
    averages: dict[str, float] = {}
    for step in range(first, stage.steps):
        factor = min(1.0, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * factor
        module.train()
        loss, parts = loss_of(step, batch, np.random.default_rng([stage.seed, step, rank]))
        module.zero_grad()
        loss.backward()
        average_gradients(module)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        for name, value in parts.items():
            averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
        done = step + 1
        if done % 25 == 0 or done == stage.steps:
            log(stage.name, step=done, **{name: round(value, 3) for name, value in averages.items()})
        if rank == 0 and (done % 100 == 0 or done == stage.steps):
            saved = [optimiser.state_dict() for optimiser in optimisers]
            torch.save({"module": module.state_dict(), "optimisers": saved, "steps": done}, file)
        if rank == 0 and (done % 200 == 0 or done == stage.steps):
            module.eval()
            with torch.inference_mode():
                log(stage.name, step=done, **evaluate())


# ----------------------------------------------------------------------------------------------------- the vision tower

NAMES = [(kind, colour) for kind in cards.KINDS for colour in cards.COLOURS]  # what a thing can be called
SLOTS = [
    (length, place) for length in (1, 2, 3) for place in range(length)
]  # a digit's place in a number of that length
HEADS = {  # classes of what a patch is asked about itself, and the question's weight; class 0 is "none of these"
    "kind": (len(cards.KINDS) + 1, 1.0),
    "colour": (len(cards.COLOURS) + 1, 1.0),
    "digit": (11, 2.0),
    "slot": (len(SLOTS) + 1, 1.0),
    "word": (len(cards.WORDS) + 1, 1.0),
    "count": (6, 1.0),  # how many things of this kind there are
    **{side: (len(NAMES) + 1, 0.5) for side in cards.SIDES},  # what is directly on that side of this thing
}
UNASKED = -1


@dataclass(frozen=True)
class View:
    """What one 112-pixel tile shows of a scene: the scene's pixel p is at p · scale + offset in the tile, as (x, y)."""

    scale: tuple[float, float]
    offset: tuple[float, float]
    whole: bool  # the thumbnail: everything is in it, and text is too small to read

    def boxes(self, boxes: list[cards.Box]) -> np.ndarray:
        """Boxes of the scene → float [n, 4] in this view."""
        return np.array(boxes, float).reshape(-1, 4) * np.tile(self.scale, 2) + np.tile(self.offset, 2)


def patch_cover(boxes: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Share of each patch that each box covers: float [n, rows, cols]."""

    def shared(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
        edges = np.arange(count) * PATCH
        return (np.minimum(high[:, None], edges + PATCH) - np.maximum(low[:, None], edges)).clip(0)

    tall, wide = shared(boxes[:, 1], boxes[:, 3], rows), shared(boxes[:, 0], boxes[:, 2], cols)
    return tall[:, :, None] * wide[:, None, :] / PATCH**2


def view_labels(objects: list[cards.Object], view: View) -> tuple[np.ndarray, np.ndarray]:
    """What the patches of a view are to say: int8 [64, heads] in HEADS' order, and bool [64, names], what is there.

    A patch speaks for the thing that covers most of it; one with the middle of a digit speaks for that digit's card.
    """
    labels = {head: np.zeros((GRID, GRID), np.int8) for head in HEADS}
    present = np.zeros((GRID, GRID, len(NAMES)), bool)
    for head in ("digit", "slot", "word") if view.whole else ("count",):
        labels[head][:] = UNASKED
    boxes = view.boxes([thing.box for thing in objects])
    cover = patch_cover(boxes, GRID, GRID)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    visible = cover.sum((1, 2)) * PATCH**2 / area
    owner = cover.argmax(0) if objects else np.zeros((GRID, GRID), int)
    for k, thing in enumerate(objects):
        if view.whole or thing.number is None:
            continue
        for i, (x0, y0, x1, y1) in enumerate(view.boxes(list(thing.glyphs))):
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            if 0 <= x < TILE and 0 <= y < TILE:
                patch = int(y // PATCH), int(x // PATCH)
                owner[patch] = k
                readable = min(x, y, TILE - x, TILE - y) > 5
                labels["digit"][patch] = 1 + int(thing.text[i]) if readable else UNASKED
                labels["slot"][patch] = 1 + SLOTS.index((len(thing.text), i)) if visible[k] > 0.9 else UNASKED
    for k, thing in enumerate(objects):
        seen = cover[k] >= 0.08
        present[seen, NAMES.index((thing.kind, thing.colour))] = True
        mine = seen & (owner == k)
        labels["kind"][mine] = 1 + cards.KINDS.index(thing.kind)
        labels["colour"][mine] = 1 + list(cards.COLOURS).index(thing.colour)
        if view.whole:
            labels["count"][mine] = min(5, sum(other.kind == thing.kind for other in objects))
        elif thing.text and thing.number is None:
            labels["word"][mine] = 1 + cards.WORDS.index(thing.text) if visible[k] > 0.95 else UNASKED
        for side in cards.SIDES:
            other = cards.neighbour(objects, thing, side)
            if other is not None:
                shown = visible[objects.index(other)] > 0.4
                labels[side][mine] = 1 + NAMES.index((other.kind, other.colour)) if shown else UNASKED
    return np.stack(list(labels.values()), -1).reshape(GRID * GRID, -1), present.reshape(GRID * GRID, -1)


def scene_geometry(size: tuple[int, int]) -> tuple[View, tuple[int, int]]:
    """A picture of (h, w) → where its pixels are on the canvas that is cut into tiles, and the canvas' (h, w)."""
    height, width = size
    canvas = select_best_resolution(size, cards.PINPOINTS)
    scale = min(canvas[0] / height, canvas[1] / width)
    offset = ((canvas[1] - width * scale) / 2, (canvas[0] - height * scale) / 2)
    return View((scale, scale), offset, whole=False), canvas


def vision_examples(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five views and their labels: uint8 [5, 112, 112, 3], int8 [5, 64, heads], bool [5, 64, names].

    Two crowded crops at a random scale; of a whole scene its thumbnail and, of its tiles, the two that show most.
    """
    rng = np.random.default_rng(index)
    seed = cards.SPLITS["train"] + VISION_SEED + index
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
        features = self.tower(pixels.permute(0, 3, 1, 2))
        logits = {head: self.heads[head](features[:, 1:]) for head in (*HEADS, "present")}
        # As CLIP does: the CLS token is read through post_layernorm, which the patches never pass.
        return logits | {"cls": self.heads["cls"](self.tower.post_layernorm(features[:, 0]))}


def train_vision(config: Config, stage: Stage, count: int, runs: Path, log: Log) -> VisionTower:
    """Stage 1, on the views of ``count`` scenes, of which each process draws its share."""
    torch.manual_seed(stage.seed)  # every process starts from the same weights
    made = [vision_examples(index) for index in range(dist.get_rank(), count, dist.get_world_size())]
    tiles, labels, present = (torch.from_numpy(np.concatenate(part)) for part in zip(*made, strict=True))
    held_out = torch.arange(len(tiles) - len(tiles) // 25, len(tiles))
    module = VisionPretraining(config)
    # "Nothing" is what most patches hold.
    weights = {
        head: torch.tensor([0.1 if head in ("digit", "slot", "word") else 0.2] + [1.0] * (classes - 1))
        for head, (classes, _) in HEADS.items()
    }

    def loss_of(step: int, batch: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        drawn = torch.from_numpy(rng.integers(0, len(tiles) - len(held_out), batch))
        logits, inside = module(tiles[drawn]), present[drawn].float()
        losses = {}
        for i, head in enumerate(HEADS):
            target = labels[drawn, :, i].flatten().long()
            losses[head] = F.cross_entropy(logits[head].flatten(0, 1), target, weights[head], ignore_index=UNASKED)
        losses["present"] = F.binary_cross_entropy_with_logits(logits["present"], inside)
        losses["cls"] = F.binary_cross_entropy_with_logits(logits["cls"], inside.amax(1))
        total = (
            sum(weight * losses[head] for head, (_, weight) in HEADS.items()) + 5 * losses["present"] + losses["cls"]
        )
        return total, {head: float(loss.detach()) for head, loss in losses.items()}

    def evaluate() -> dict[str, object]:
        right, asked = Counter(), Counter()
        for part in held_out.split(250):
            logits = module(tiles[part])
            for i, head in enumerate(HEADS):
                target = labels[part, :, i]
                right[head] += int(((logits[head].argmax(-1) == target) & (target > 0)).sum())
                asked[head] += int((target > 0).sum())
        return {f"{head}_right": round(right[head] / max(asked[head], 1), 3) for head in HEADS}

    fit(stage, module, loss_of, evaluate, runs, log)
    module.tower.keep_cls = False
    return module.tower.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------- pictures and questions


@dataclass(frozen=True)
class Gaze:
    """Where a token of an exchange had better look: at some things of the scene (by number), or at one digit of one."""

    token: int
    things: tuple[int, ...]
    digit: int | None = None
    answering: bool = False  # looked at to find the answer, not because it was named
    thumbnail: bool = False  # in the thumbnail, the only view that shows them all


@dataclass(frozen=True)
class Exchange:
    """One question and its answer as tokens, from the placeholder's end to the closing ``</s>``."""

    family: str
    question: list[int]  # with the template's words around it
    instruction: list[bool]  # which of them are the question's own
    answer: list[int]
    gaze: list[Gaze]


@dataclass(frozen=True)
class Sample:
    """A picture's frozen features and what is asked about it.

    thumbnail [64, C] and map [rows, cols, C] in float16; foreground bool [64 + rows · (cols + 1)], over the sequence
    that the decoder reads: the patches that show a thing, and every newline. things bool [scene's objects, tokens]: the
    patches that show each; digits [objects, 3]: the token with the middle of each digit (0: none).
    """

    thumbnail: torch.Tensor
    map: torch.Tensor
    foreground: torch.Tensor
    things: torch.Tensor
    digits: torch.Tensor
    exchanges: list[Exchange]

    @property
    def num_tokens(self) -> int:
        return len(self.foreground)


class Prompts:
    """Vicuna's template, as tokens. ``prefix`` is what comes before the picture."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        ids = tokenizer.encode("USER: <image>").ids
        self.prefix = ids[:-1]

    def exchange(self, q: cards.Question, objects: list[cards.Object]) -> Exchange:
        prompt = f"USER: <image>\n{q.question} ASSISTANT:"
        encoded = self.tokenizer.encode(prompt)
        answer = self.tokenizer.encode(f"{prompt} {q.answer}</s>").ids[len(encoded.ids) :]
        skip, begin = len(self.prefix) + 1, prompt.index(q.question)
        spans = [(first - begin, last - begin) for first, last in encoded.offsets[skip:]]
        own = [first < len(q.question) and last > 0 for first, last in spans]

        gaze = []
        named = mentions(q.question, objects)
        for start, end, things in named:
            gaze += [Gaze(i, things) for i, (first, last) in enumerate(spans) if first < end and last > start]
        last = len(spans) - 1
        found = tuple(sorted({thing for _, _, things in named for thing in things}))
        if found:
            gaze.append(Gaze(last, found, answering=True, thumbnail=q.question.startswith("How many")))
            if q.family == "relate":  # what is beside a thing is known where the thing is
                gaze.append(Gaze(last + 1, found, answering=True))
            elif q.family == "read" and q.answer.isdigit():  # the answer's first token is a space
                gaze += [Gaze(last + 1 + i, found, digit=i, answering=True) for i in range(len(q.answer))]
        return Exchange(q.family, encoded.ids[skip:], own, answer, gaze)


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
    for match in re.finditer(rf"\b(?:many|the) ({'|'.join(cards.SHAPES)})", question):
        add(match, lambda thing, kind=match[1]: thing.kind == kind)
    for match in re.finditer(rf"\bthe ({colours}) (?:or|one)\b", question):
        add(match, lambda thing, name=f"{match[1]} card": thing.name == name)
    for match in re.finditer(r"with the (?:number|word) (\w+)\?", question):
        add(match, lambda thing, text=match[1]: thing.text == text)
    return found


def locate(scene: cards.Scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``foreground``, ``things`` and ``digits`` of a scene's Sample."""
    width, height = scene.image.size
    boxes = [thing.box for thing in scene.objects]
    thumbnail = patch_cover(View((TILE / width, TILE / height), (0, 0), whole=True).boxes(boxes), GRID, GRID)
    view, canvas = scene_geometry((height, width))
    top, left, rows, cols = unpadded_grid((height, width), canvas, TILE, GRID)
    whole = patch_cover(view.boxes(boxes), canvas[0] // PATCH, canvas[1] // PATCH)
    cells = np.pad(whole[:, top : top + rows, left : left + cols], ((0, 0), (0, 0), (0, 1)))
    things = np.concatenate([thumbnail.reshape(len(boxes), -1), cells.reshape(len(boxes), -1)], axis=1) > 0.05
    newline = np.arange(things.shape[1] - GRID * GRID) % (cols + 1) == cols
    foreground = things.any(0) | np.concatenate([np.zeros(GRID * GRID, bool), newline])
    digits = torch.zeros(len(boxes), 3, dtype=torch.int64)
    for k, thing in enumerate(scene.objects):
        for i, (x0, y0, x1, y1) in enumerate(view.boxes(list(thing.glyphs)) if thing.number is not None else ()):
            row, col = int((y0 + y1) / 2 // PATCH) - top, int((x0 + x1) / 2 // PATCH) - left
            digits[k, i] = GRID * GRID + row * (cols + 1) + col
    return torch.from_numpy(foreground), torch.from_numpy(things), digits


@torch.inference_mode()
def make_samples(split: str, indices: range, tower: VisionTower, prompts: Prompts) -> list[Sample]:
    """These scenes of a split, through the image processor and the frozen vision tower."""
    process = ImageProcessor(anyres=True, image_size=TILE, size=TILE, grid_pinpoints=cards.PINPOINTS)
    samples = []
    for index in indices:
        scene = cards.draw(cards.SPLITS[split] + index, dense=index % 4 == 3)
        pixels, size = process(scene.image)
        thumbnail, cells = stitch(tower(pixels), size, cards.PINPOINTS, TILE)
        exchanges = [prompts.exchange(q, scene.objects) for q in scene.questions]
        if exchanges:
            samples.append(Sample(thumbnail.half(), cells.half().clone(), *locate(scene), exchanges))
    return samples


# -------------------------------------------------------------------------------------- projector, decoder and samplers


@dataclass(frozen=True)
class Batch:
    """Pictures, each with several exchanges behind it that do not see one another; and what its step trains.

    visual    "foreground" (a tenth of the empty tokens stays), "full", or "vision" (the vision-guided sampler)
    text      the text-guided sampler's (layer [B], gamma [B]), or None
    gaze      compute ``Output.gaze_loss``
    """

    samples: list[Sample]
    exchanges: list[list[Exchange]]
    visual: str
    text: tuple[torch.Tensor, torch.Tensor] | None = None
    gaze: bool = False


@dataclass(frozen=True)
class Output:
    """logits [B, T, vocabulary], labels [B, T] (-100: none), item [B, T]: the exchange a token belongs to (-1: none).

    share is the mean share of visual tokens, over pictures and layers; selector_logits those of all regions;
    gaze_loss how far attention is from where it had better look (uncompressed tokens only).
    """

    logits: torch.Tensor
    labels: torch.Tensor
    item: torch.Tensor
    share: float
    selector_logits: torch.Tensor | None
    gaze_loss: torch.Tensor | None


class Language(nn.Module):
    """All that is trained behind the frozen vision tower. Names are the checkpoint's, but for ``selector``."""

    def __init__(self, config: Config, prefix: list[int]):
        super().__init__()
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.randn(config.text.hidden_size))
        self.language_model = Llama(config.text)
        self.selector = LinearSelector(GRID * GRID, branches=3)
        self.prefix = torch.tensor(prefix)
        with torch.no_grad():
            # Words as large as visual tokens, and an undecided head: otherwise the first plateau is long.
            self.language_model.model.embed_tokens.weight.normal_(std=1.0)
            self.language_model.lm_head.weight.normal_(std=0.02)
            # From reading everything, the selector has to find out what it can do without.
            self.selector.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))

    @torch.no_grad()
    def scale_projector(self, samples: list[Sample]) -> None:
        """Make the first visual tokens of size 1, whatever the size of the features."""
        features = torch.cat([sample.map.flatten(0, 1) for sample in samples]).float()
        projector = self.multi_modal_projector
        projector.linear_1.weight.mul_(1.7 / projector.linear_1(features).std())
        projector.linear_2.weight.mul_(1.0 / projector(features).std())

    def visual_tokens(
        self, batch: Batch
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """Each picture's tokens [n, C], which of them are newlines [n], where they come from [n]; selector logits."""
        flat = [torch.cat([sample.thumbnail, sample.map.flatten(0, 1)]) for sample in batch.samples]
        projected = self.multi_modal_projector(torch.cat(flat).float()).split([len(f) for f in flat])
        sampler = VisionGuidedSampler(self.selector, VisionGuidedOptions()).train(self.training)
        tokens, newlines, sources, logits = [], [], [], []
        for sample, own in zip(batch.samples, projected, strict=True):
            thumbnail, cells = own[: GRID * GRID], own[GRID * GRID :].unflatten(0, sample.map.shape[:2])
            picture = PictureFeatures(cells, thumbnail.unflatten(0, (GRID, GRID)), thumbnail, self.image_newline)
            read = sampler(picture, thumbnail[:0]) if batch.visual == "vision" else uncompressed(picture)
            kept = slice(None)
            if batch.visual == "foreground":
                kept = sample.foreground | (torch.rand(sample.num_tokens) < 0.1)
            tokens.append(read.tokens[kept])
            newlines.append(read.newline[kept])
            sources.append(read.source[kept])
            if read.logits is not None:
                logits.append(read.logits)
        return tokens, newlines, sources, torch.cat(logits) if logits else None

    def forward(self, batch: Batch) -> Output:
        """Columns: the prefix and the visual tokens (together V, padded on the right), then the exchanges (T).

        Every exchange sees the picture and itself, and counts positions from the picture's end, as if it were alone.
        """
        tokens, newlines, sources, selector_logits = self.visual_tokens(batch)
        count = torch.tensor([len(t) for t in tokens])
        visual, newline = pad_sequence(tokens, True), pad_sequence(newlines, True)
        rows, before = len(tokens), len(self.prefix)
        width = before + visual.shape[1]

        columns: dict[str, list[torch.Tensor]] = {"ids": [], "item": [], "place": [], "labels": [], "instruction": []}
        for exchanges in batch.exchanges:
            row: dict[str, list[int]] = {name: [] for name in columns}
            for item, exchange in enumerate(exchanges):
                ids = exchange.question + exchange.answer[:-1]
                row["ids"] += ids
                row["item"] += [item] * len(ids)
                row["place"] += range(len(ids))
                row["labels"] += [-100] * (len(exchange.question) - 1) + exchange.answer
                row["instruction"] += exchange.instruction + [False] * (len(exchange.answer) - 1)
            for name, values in row.items():
                columns[name].append(torch.tensor(values))
        padding = {"item": -1, "labels": -100}
        text = {name: pad_sequence(values, True, padding.get(name, 0)) for name, values in columns.items()}
        item, instruction = text["item"], text["instruction"].bool()
        length = item.shape[1]

        llama = self.language_model.model
        start = llama.embed_tokens(self.prefix).expand(rows, -1, -1)
        x = torch.cat([start, visual, llama.embed_tokens(text["ids"])], dim=1)
        positions = torch.cat([torch.arange(width).expand(rows, -1), before + count[:, None] + text["place"]], dim=1)
        cos, sin = llama.rope(positions, x.dtype)

        exists = torch.arange(width) < (before + count)[:, None]  # [B, V]
        itself = torch.eye(width, dtype=torch.bool)  # or padding would look at nothing
        among_visual = torch.ones(width, width, dtype=torch.bool).tril() & exists[:, None] | itself
        same = (item[:, :, None] == item[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
        at_visual = exists[:, None].expand(rows, length, width)
        seen, gaze_losses = [count.float()] * len(llama.layers), []
        for index, layer in enumerate(llama.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            acting = (batch.text[0] == index).nonzero().squeeze(1) if batch.text is not None else count[:0]
            if len(acting):
                scored = exists[acting, before:] & ~newline[acting]
                kept = self.text_guided(
                    layer, h[acting, before:width], h[acting, width:], scored, item[acting], instruction[acting],
                    batch.text[1][acting],
                )  # fmt: skip
                kept = kept | (newline[acting] & exists[acting, before:])[:, None]
                remaining = seen[index].clone()
                remaining[acting] = kept.sum(-1).float().mean(1)
                seen[index:] = [remaining] * (len(seen) - index)
                kept = F.pad(kept, (before, 0), value=True)  # [b, items, V]
                own = kept.gather(1, item[acting].clamp(min=0)[..., None].expand(-1, -1, width))
                at_visual, among_visual = at_visual.clone(), among_visual.clone()
                at_visual[acting] &= own
                # Exchanges that share a picture keep different tokens: those tokens see what any exchange kept.
                among_visual[acting] = among_visual[acting] & kept.any(1)[:, None] | itself
            last = index == len(llama.layers) - 1  # whose outputs for visual tokens nobody reads
            q, k, v = (
                attention.split_heads(projection(hidden))
                for projection, hidden in (
                    (attention.q_proj, h[:, width:] if last else h),
                    (attention.k_proj, h),
                    (attention.v_proj, h),
                )
            )
            q, k = rotate(q, cos[:, :, -q.shape[2] :], sin[:, :, -q.shape[2] :]), rotate(k, cos, sin)
            at_all = torch.cat([at_visual, same], dim=2)[:, None]
            if batch.gaze and index in GAZE_LAYERS:
                gaze_losses.append(gaze_loss(batch, sources, before, index, q[:, :2, -length:], k[:, :2], at_all))
            mixed = attend(q[:, :, -length:], k, v, at_all)
            if last:
                x = x[:, width:]
            else:
                first = attend(q[:, :, :width], k[:, :, :width], v[:, :, :width], among_visual[:, None])
                mixed = torch.cat([first, mixed], dim=2)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        full = torch.tensor([sample.num_tokens for sample in batch.samples])
        share = float((torch.stack(seen).mean(0) / full).mean())
        logits = self.language_model.lm_head(llama.norm(x))
        gaze = torch.stack(gaze_losses).mean() if gaze_losses else None
        return Output(logits, text["labels"], item, share, selector_logits, gaze)

    @torch.no_grad()
    def text_guided(
        self,
        layer: nn.Module,
        visual: torch.Tensor,
        text: torch.Tensor,
        scored: torch.Tensor,
        item: torch.Tensor,
        instruction: torch.Tensor,
        gamma: torch.Tensor,
    ) -> torch.Tensor:
        """Paper §3.3 for several exchanges on each picture: which tokens each exchange keeps, bool [b, items, visual].

        visual [b, M, C] and text [b, T, C] are the layer's normed inputs; ``scored`` [b, M]: no padding, no newlines.
        """
        attention = layer.self_attn
        q, k = attention.split_heads(attention.q_proj(text)), attention.split_heads(attention.k_proj(visual))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        weights = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).masked_fill(~scored[:, None, None], -math.inf)
        weights = weights.softmax(-1).amax(1)  # [b, T, M]
        asks = (item[..., None] == torch.arange(int(item.max()) + 1)) & instruction[..., None]  # [b, T, items]
        scores = asks.float().transpose(1, 2) @ weights / asks.sum(1).clamp(min=1)[..., None]
        ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the shortest prefix of more than gamma ends where this passes it
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.scatter_(-1, order, before <= gamma[:, None, None] * ordered.sum(-1, keepdim=True))
        return kept & scored[:, None]


GAZE_LAYERS = {1: False, 2: True}  # layer → whether it is shown where to find answers, or where the things named are


def gaze_loss(
    batch: Batch,
    sources: list[torch.Tensor],
    before: int,
    index: int,
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """-log of the attention that some heads pay, on average, to the patches that a token had better look at.

    q [B, heads, T, D] and k [B, heads, V + T, D] are rotated; ``sources`` are the visual tokens' places in the
    uncompressed sequence.
    """
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf).softmax(-1).mean(1)
    places, targets = [], []
    for row, (sample, exchanges, source) in enumerate(zip(batch.samples, batch.exchanges, sources, strict=True)):
        start = 0
        for exchange in exchanges:
            for gaze in exchange.gaze:
                if gaze.answering == GAZE_LAYERS[index]:
                    if gaze.digit is None:
                        wanted = sample.things[list(gaze.things)].any(0)[source]
                        if gaze.thumbnail:
                            wanted = wanted & (source < GRID * GRID)
                    else:
                        wanted = source == sample.digits[gaze.things[0], gaze.digit]
                    places.append((row, start + gaze.token))
                    targets.append(F.pad(wanted, (before, weights.shape[2] - before - len(wanted))))
            start += len(exchange.question) + len(exchange.answer) - 1
    rows, tokens = torch.tensor(places).T
    paid = (weights[rows, tokens] * torch.stack(targets)).sum(-1)
    return -(paid + 1e-4).log().mean()


def accuracy(
    language: Language, samples: list[Sample], visual: str, text: tuple[int, float] | None = None
) -> dict[str, float]:
    """Share of exchanges answered exactly, over all and by family, and the mean share of visual tokens.

    Each token is predicted from the right ones before it: all of an answer's tokens are right if and only if greedy
    decoding gives that answer. Under the text-guided sampler each exchange is asked alone, and only every fourth.
    """
    asked, right, shares = Counter(), Counter(), []
    whole = [(sample, sample.exchanges) for sample in samples]
    alone = [(sample, [exchange]) for sample in samples for exchange in sample.exchanges[::4]]
    jobs = whole if text is None else alone
    for begin in range(0, len(jobs), 16):
        part_samples, exchanges = (list(column) for column in zip(*jobs[begin : begin + 16], strict=True))
        rows = len(part_samples)
        sampler = None if text is None else (torch.full((rows,), text[0]), torch.full((rows,), text[1]))
        output = language(Batch(part_samples, exchanges, visual, sampler))
        wrong = (output.logits.argmax(-1) != output.labels) & (output.labels != -100)
        shares += [output.share] * rows
        for row, own in enumerate(exchanges):
            for item, exchange in enumerate(own):
                asked[exchange.family] += 1
                right[exchange.family] += not bool((wrong[row] & (output.item[row] == item)).any())
    families = {family: round(right[family] / asked[family], 4) for family in cards.FAMILIES if asked[family]}
    return {"all": round(right.total() / asked.total(), 4), **families, "tokens": round(float(np.mean(shares)), 3)}


def regions_with_things(sample: Sample) -> torch.Tensor:
    """Which of the map's 4×4 regions show a thing: bool [regions]."""
    rows, cols = sample.map.shape[:2]
    cells = sample.foreground[GRID * GRID :].view(rows, cols + 1)[:, :cols, None].float()
    return split_regions(cells, 4)[0].flatten(1).amax(1) > 0


def train_language(
    stage: Stage, language: Language, samples: list[Sample], held_out: list[Sample], runs: Path, log: Log
) -> None:
    """Stages 2 to 4."""
    # The last stage spends half of its steps on both samplers, a sixth each on one of them and on none.
    turns = {
        "warmup": [("foreground", False)],
        "full": [("full", False)],
        "focus": [
            ("vision", True),
            ("full", False),
            ("vision", True),
            ("vision", False),
            ("vision", True),
            ("full", True),
        ],
    }[stage.name]

    def loss_of(step: int, batch: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        visual, by_text = turns[step % len(turns)]
        drawn = [samples[i] for i in rng.integers(0, len(samples), batch)]
        exchanges = [[s.exchanges[i] for i in rng.permutation(len(s.exchanges))] for s in drawn]
        if stage.name == "warmup":  # mostly the families that take longest to learn
            exchanges = [sorted(own, key=lambda e: e.family in ("read", "perceive"))[:10] for own in exchanges]
        else:
            exchanges = [own[:12] for own in exchanges]
        sampler = None
        if by_text:
            # The paper draws the layer from 8 … 24 of 32. How it drew gamma it does not say: this range is a guess.
            layer = torch.from_numpy(rng.integers(1, 4, batch))
            sampler = layer, torch.from_numpy(rng.uniform(0.75, 0.95, batch)).float()
        output = language(Batch(drawn, exchanges, visual, sampler, gaze=stage.name == "warmup"))
        answering = F.cross_entropy(output.logits.flatten(0, 1), output.labels.flatten())
        parts = {f"{visual}{'+text' if by_text else ''}_loss": float(answering.detach())}
        if output.gaze_loss is not None:
            parts["gaze_loss"] = float(output.gaze_loss.detach())
            return answering + 0.5 * output.gaze_loss, parts
        if output.selector_logits is None:
            return answering, parts
        # A hint that the paper does without: things at the finest scale, empty regions at the coarsest. From the answers
        # alone, in a stage this short, the selector settled on one or two scales for everything.
        shown = torch.cat([regions_with_things(sample) for sample in drawn])
        hint = F.cross_entropy(output.selector_logits, 2 * shown.long())
        chosen = F.one_hot(output.selector_logits.argmax(-1), 3).float().mean(0).tolist()
        parts |= {f"chosen_{pool}": share for pool, share in zip(("4x4", "2x2", "1x1"), chosen, strict=True)}
        return answering + balance_loss(output.selector_logits, alpha=0.1) + 0.2 * hint, parts

    def evaluate() -> dict[str, object]:
        if stage.name != "focus":
            return accuracy(language, held_out, turns[0][0])
        return {
            "none": accuracy(language, held_out, "full"),
            "vision": accuracy(language, held_out, "vision"),
            "focus": accuracy(language, held_out, "vision", (1, 0.85)),
        }

    fit(stage, language, loss_of, evaluate, runs, log)


def export(folder: Path, tower: VisionTower, language: Language) -> None:
    """model.safetensors under a Hugging Face checkpoint's names, and selector.safetensors."""
    tensors = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
    tensors |= {name: value for name, value in language.state_dict().items() if not name.startswith("selector.")}
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_selector(folder / "selector.safetensors", language.selector, VisionGuidedOptions())


def run(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """All stages, in one of ``args.processes`` processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/file", rank=rank, world_size=args.processes)
    torch.manual_seed(rank)
    log = Log(args.runs / "log.jsonl")
    if rank == 0:
        write_configs(args.output)
    dist.barrier()
    config = load_config(args.output)
    prompts = Prompts(Tokenizer.from_file(str(args.output / "tokenizer.json")))

    def shortened(stage: Stage) -> Stage:
        return replace(stage, steps=math.ceil(stage.steps * args.fraction))

    tower = train_vision(config, shortened(VISION), math.ceil(VISION_SCENES * args.fraction), args.runs, log)
    pictures = range(rank, math.ceil(LANGUAGE_SCENES * args.fraction), args.processes)
    samples = make_samples("train", pictures, tower, prompts)
    held_out = make_samples("validation", range(math.ceil(120 * args.fraction) if rank == 0 else 0), tower, prompts)
    log(
        "features",
        pictures=len(samples) * args.processes,
        tokens=round(np.mean([sample.num_tokens for sample in samples]), 1),
    )

    torch.manual_seed(0)
    language = Language(config, prompts.prefix)
    language.scale_projector(samples[:200])
    for parameter in language.parameters():
        dist.broadcast(parameter.data, src=0)  # each process has scaled by its own pictures
    for stage in (WARMUP, FULL, FOCUS):
        torch.manual_seed(stage.seed + 100 * rank)
        train_language(shortened(stage), language, samples, held_out, args.runs, log)
        if stage is not WARMUP and rank == 0:
            export(args.output, tower, language)
            log("export", folder=str(args.output))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny", help="model folder to write")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="checkpoints and log, to go on from")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=1.0, help="of all steps and pictures, to try the script out")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(run, (args, meeting), nprocs=args.processes)


if __name__ == "__main__":
    main()
