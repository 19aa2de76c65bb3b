"""A model's folder with random weights: written a few megabytes at a time, as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.command_line import Refused
from minifocus.loading.config import read_config
from minifocus.loading.json_fields import JsonFields
from minifocus.loading.weights import shapes_of, without_values
from minifocus.model import LlavaNetwork

from ..record import ROOT
from .models import Model

TINY = ROOT / "weights/tiny"
SHARD_BYTES = 5_000_000_000
FREE_BYTES = 2_000_000_000  # of the disk, that stay free
PIECE = 2**22  # numbers that are drawn at a time

Shapes = dict[str, tuple[int, ...]]


@contextlib.contextmanager
def made_folder(model: Model, folder: Path, keep: bool, device: str = "cpu") -> Iterator[Path]:
    """Write `folder`, which must not be there yet; it goes when the block is left, however that is, unless it is whole and
    `keep`. `device` draws the numbers. Raises Refused where the disk has too little room."""
    config = model.config()
    shapes = shapes_of(without_values(lambda: LlavaNetwork(read_config(JsonFields(config, "config.json"), folder))))
    check_room(folder, sum(map(num_bytes, shapes.values())))
    try:
        folder.mkdir()
    except FileExistsError:
        raise Refused(f"{folder}: is there already: give it as --folder, or remove it") from None
    whole = False
    try:
        write_companions(folder, model, config)
        write_weights(folder, shapes, device)
        whole = True
        yield folder
    finally:
        if not (keep and whole):
            shutil.rmtree(folder)


def num_bytes(shape: tuple[int, ...]) -> int:
    """Of a tensor in bfloat16."""
    return 2 * math.prod(shape)


def check_room(folder: Path, size: int) -> None:
    """Refuse to fill the disk with a folder of `size` bytes."""
    free = shutil.disk_usage(folder.parent).free
    if free < size + FREE_BYTES:
        raise Refused(
            f"{folder}: the weights take {size / 1e9:.1f} GB, and {FREE_BYTES / 1e9:.0f} GB of the disk are to stay free: "
            f"expected {(size + FREE_BYTES) / 1e9:.1f} GB of room, got {free / 1e9:.1f} GB (--runs names another disk)"
        )


def write_companions(folder: Path, model: Model, config: dict[str, Any]) -> None:
    """All files but the weights: `config`, pictures as CLIP has them, and the miniature's tokenizer with more tokens."""
    side = model.vision["image_size"]
    pictures = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_grid_pinpoints": config["image_grid_pinpoints"],
    }
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # No text becomes one of the new tokens, but an answer has them, and each can be read.
    vocabulary |= {f"▁token{number}": number for number in range(len(vocabulary), model.image_token)}
    for token in tokenizer["added_tokens"]:
        places = {"<image>": model.image_token, "<pad>": model.image_token + 1}
        token["id"] = places.get(token["content"], token["id"])
    for name, fields in (("config", config), ("preprocessor_config", pictures), ("tokenizer", tokenizer)):
        (folder / f"{name}.json").write_text(json.dumps(fields) + "\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)


def write_weights(folder: Path, shapes: Shapes, device: str) -> None:
    """Shards of at most SHARD_BYTES with an index, in safetensors' format, which is written here for this reason: its
    library takes whole tensors in memory, a shard's all at once."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(num_bytes, shards[-1].values())) + num_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    generator, total = torch.Generator(device).manual_seed(0), sum(map(num_bytes, shapes.values()))
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=None) as bar:
        for file, shard in zip(files, shards, strict=True):
            write_shard(folder / file, shard, generator, bar)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


def write_shard(file: Path, shapes: Shapes, generator: torch.Generator, bar: tqdm) -> None:
    """A header that says where each tensor begins and ends, its length before it, and then the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for count in pieces(math.prod(shape)):
                numbers = random_numbers(name, shape, count, generator)
                bar.update(stream.write(numbers.view(torch.int16).numpy().data))


def pieces(count: int) -> Iterator[int]:
    """`count` in parts of at most PIECE."""
    for begin in range(0, count, PIECE):
        yield min(PIECE, count - begin)


def random_numbers(name: str, shape: tuple[int, ...], count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` numbers of a tensor, bfloat16, so large that activations are of order 1 and logits of order 4.

    Queries are larger, so that attention picks few tokens (experiments/end_to_end_programs.py says why).
    """
    noise = torch.randn(count, generator=generator, device=generator.device)
    if "norm" in name or "layrnorm" in name:
        noise = noise.mul_(0.2).add_(1.0 if name.endswith("weight") else 0.0)
    elif len(shape) == 1 or "embed_tokens" in name or "position_embedding" in name:
        noise *= 0.5
    else:
        gain = 4.0 if "lm_head" in name else 3.0 if "language_model" in name and "q_proj" in name else 1.0
        noise *= gain / math.prod(shape[1:]) ** 0.5
    return noise.bfloat16().cpu()
