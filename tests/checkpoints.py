"""Small random LLaVA checkpoints, made and saved by transformers itself: the oracle that the tests compare with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minifocus.inputs.model_inputs import split_pixels

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

IMAGE_TOKEN = 90
TILE, PATCH = 28, 7  # 4 × 4 patches a tile
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights for which every part matters: activations of order 1, logits of order 4, norms and biases not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            value.data = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
        elif value.dim() == 1 or "embed" in name or "newline" in name:
            value.data = 0.5 * noise
        else:
            value.data = noise / value[0].numel() ** 0.5
        if "lm_head" in name:
            value.data *= 3


def build(
    kind: str = "llava_next", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> torch.nn.Module:
    """A transformers model. `changes` go to the text config (text_*), the vision config (vision_*), or the top."""
    text = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
    )
    top: dict[str, Any] = dict(image_token_index=IMAGE_TOKEN)
    if kind == "llava_next":
        top["image_grid_pinpoints"] = PINPOINTS
    for key, value in changes.items():
        if key.startswith("text_"):
            text[key[5:]] = value
        elif key.startswith("vision_") and key not in ("vision_feature_layer", "vision_feature_select_strategy"):
            vision[key[7:]] = value
        else:
            top[key] = value
    text_class = MistralConfig if text.pop("model_type", "llama") == "mistral" else LlamaConfig
    config_class, model_class = {
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
    }[kind]
    config = config_class(text_config=text_class(**text), vision_config=CLIPVisionConfig(**vision), **top)
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
    random_weights(model, seed)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


LAYOUTS = ("v5", "v5-memory", "v4-memory", "hub", "original")


def rename_for_layout(name: str, layout: str) -> str:
    """A key of a fresh v5 checkpoint → the same tensor's key in another layout (hf-parity §1, written out here anew)."""
    if layout == "v5":
        return name
    part, _, rest = name.partition(".")
    if layout == "hub":
        return f"vision_tower.vision_model.{rest}" if part == "vision_tower" else name
    if part == "language_model":
        inner = rest.removeprefix("model.")
        if inner == rest:
            return rest  # lm_head.weight
        return f"model.language_model.{inner}" if layout.endswith("memory") else f"model.{inner}"
    if layout == "v4-memory" and part == "vision_tower":
        return f"model.vision_tower.vision_model.{rest}"
    if layout.endswith("memory"):
        return f"model.{name}"
    if part == "vision_tower":
        return f"model.vision_tower.vision_tower.vision_model.{rest}"
    if part == "multi_modal_projector":
        return "model.mm_projector." + rest.replace("linear_1", "0").replace("linear_2", "2")
    return f"model.{name}"


def save(model: torch.nn.Module, folder: Path, layout: str = "v5", shards: int = 1) -> Path:
    """What `save_pretrained` writes, then renamed or sharded."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if layout != "v5":
        save_file(
            {rename_for_layout(k, layout): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"}
        )
    if shards > 1:
        tensors = load_file(file)
        names = sorted(tensors)
        weight_map = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            own = {key: tensors[key] for key in names[shard::shards]}
            save_file(own, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(own, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        file.unlink()
    return folder


@dataclass
class Inputs:
    """A batch as transformers takes it."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_sizes: torch.Tensor | None
    attention_mask: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in vars(self).items() if value is not None}


def make_inputs(model: Any, rows: list[list[tuple[int, int]]], seed: int = 0, side: str = "left") -> Inputs:
    """One row per list of picture sizes (h, w): text, pictures with text between, text; padded to one length.

    `model` is the minifocus model, of which only the number of tokens and tiles per picture is used.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(3, IMAGE_TOKEN, (count,), generator=generator).tolist()

    ids, pixels, sizes = [], [], []
    tile = model.config.vision.image_size
    most = max((model.num_tiles(size) for row in rows for size in row), default=1)
    for row in rows:
        own = [1, *words(2 + len(ids))]
        for size in row:
            own += [IMAGE_TOKEN] * model.num_visual_tokens(size) + words(3)
            tiles = torch.zeros(most, 3, tile, tile)
            tiles[: model.num_tiles(size)] = torch.randn(model.num_tiles(size), 3, tile, tile, generator=generator)
            pixels.append(tiles)
            sizes.append(size)
        ids.append(own + words(4))
    longest = max(map(len, ids))
    pad = {
        "left": lambda r, fill: [fill] * (longest - len(r)) + r,
        "right": lambda r, fill: r + [fill] * (longest - len(r)),
    }
    input_ids = torch.tensor([pad[side](row, 0) for row in ids])
    mask = torch.tensor([pad[side]([1] * len(row), 0) for row in ids])
    pixel_values = torch.stack(pixels)
    if not model.config.anyres:
        return Inputs(input_ids, pixel_values[:, 0], None, mask)
    return Inputs(input_ids, pixel_values, torch.tensor(sizes), mask)


def add_tokenizer(folder: Path) -> None:
    """A tokenizer.json that knows single characters, with <s> in front, </s> as the end and <image> as IMAGE_TOKEN."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = [chr(c) for c in range(32, 127) if chr(c) not in "[]{}|~^`@#$%&*+=<>"] + ["\n"]
    vocab = {"<s>": 1, "</s>": 2, "<unk>": 3, "<pad>": 0}
    free = (n for n in range(4, 96) if n != IMAGE_TOKEN)
    vocab |= {character: next(free) for character in characters}
    vocab["<image>"] = IMAGE_TOKEN
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>", "<image>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def add_chat_tokenizer(folder: Path) -> None:
    """A tokenizer.json that knows all printable characters and the tokens of Llama-3's and ChatML's turns: 128 in all."""
    add_tokenizer(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    free = (n for n in range(4, 128) if n != IMAGE_TOKEN)
    vocab |= {c: next(free) for c in [chr(c) for c in range(32, 127)] + ["\n"]}
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"):
        vocab[token] = next(free)
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "content": token})
    for token in tokenizer["added_tokens"]:
        token["id"] = vocab[token["content"]]
    tokenizer["model"]["vocab"] = vocab
    file.write_text(json.dumps(tokenizer))


def rows_before_layer(model: Any, inputs: Any, instruction: torch.Tensor | None, index: int) -> tuple[Any, Any]:
    """The batch as it stands before a decoder layer, by running the layers before it; and each row's pictures."""
    captured = []
    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    features = model.encode_pictures(tiles, sizes, model.before_llm)
    rows, pictures = model.embed(inputs.input_ids, features, inputs.attention_mask, instruction, model.before_llm)

    def before(layer_index: int, layer: Any, rows: Any) -> Any:
        if layer_index == index:
            captured.append(rows)
        return rows

    model.language_model.model.prefill(rows, None, before)
    return captured[0], pictures


def replace_projector(folder: Path, projector: dict[str, Any], layers: Any = None, seed: int = 3) -> Path:
    """Give a saved folder another projector, as config.json names it, with random values of the size of `random_weights`."""
    from minifocus.loading.config import load_config

    file, weights = folder / "config.json", folder / "model.safetensors"
    members = json.loads(file.read_text()) | {"projector": projector}
    if layers is not None:
        members["vision_feature_layer"] = layers
    file.write_text(json.dumps(members))
    config = load_config(folder)
    module = config.projector.build(config.ends)
    random_weights(module, seed)
    prefix = "multi_modal_projector."
    others = {name: value for name, value in load_file(weights).items() if prefix not in name}
    own = {prefix + name: value for name, value in module.state_dict().items()}
    save_file(others | own, weights, metadata={"format": "pt"})
    return folder


def copy_with_projector(source: Path, folder: Path, projector: dict[str, Any], layers: Any = None) -> Path:
    """A copy of a saved folder with another projector, see `replace_projector`."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return replace_projector(folder, projector, layers)


def noise(height: int, width: int) -> Image.Image:
    """A picture of random pixels, which follow from its size."""
    return Image.fromarray(np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8))


# What a method needs to run in a folder where nothing was learned.
WITHOUT_LEARNING: dict[str, dict[str, Any]] = {
    "focus": {"selector": "variance"},
    "vision": {"selector": "variance"},
    "avg-llava": {"granularity": "coarsest"},
}
