"""Small random folders as the original LLaVA repository and its forks write them, by the tables of their names and shapes.

No published checkpoint was at hand. The tables are those of the code that builds the modules: LLaVA's, AVG-LLaVA's (its router)
and LLaVA-STF's (two projectors). Nothing here uses the package under test.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

KINDS = ("llava", "llava_next", "avg", "stf")
VOCABULARY, D, BLOCKS, C, TILE, PATCH = 320, 32, 24, 16, 28, 7
GRANULARITIES, FILTERED_TEXT = [1, 2, 4, 8, 16], 6  # of a view of 4×4 patches
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 112]]  # (width, height)
FUSED = [23, 21, 18, 15, 12, 9, 6, 3]
TOWER = "model.vision_tower.vision_tower.vision_model."
VISION = dict(
    hidden_size=C, intermediate_size=24, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=TILE, patch_size=PATCH
)  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    """config.json, with what training leaves in it."""
    config: dict[str, Any] = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": D,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 4096,
        "mm_hidden_size": C,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCABULARY,
    }
    if kind in ("llava_next", "avg"):
        config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "unfreeze_mm_vision_tower": True}
        config |= {"mm_patch_merge_type": "spatial_unpad", "image_crop_resolution": 224, "mm_vision_tower_lr": 2e-06}
    if kind == "avg":
        config |= {"vis_token_granularity": GRANULARITIES, "filtered_text_num": FILTERED_TEXT, "router_select": True}
        config |= {"margin": 0.1, "rank_loss_weight": 1.0, "ce_loss_weight": 0.1}
    return config


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """The table of names and shapes, the tower's as well."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, D), "model.norm.weight": (D,)}
    for layer in range(3):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}input_layernorm.weight": (D,), f"{at}post_attention_layernorm.weight": (D,)}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (D, D) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (D // 2, D) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (48, D) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (D, 48)
    shapes["lm_head.weight"] = (VOCABULARY, D)
    shapes |= {f"{TOWER}embeddings.class_embedding": (C,), f"{TOWER}embeddings.position_embedding.weight": (17, C)}
    shapes[f"{TOWER}embeddings.patch_embedding.weight"] = (C, 3, PATCH, PATCH)
    norms = [f"{TOWER}{name}" for name in ("pre_layrnorm", "post_layernorm")]
    for block in range(BLOCKS):
        at = f"{TOWER}encoder.layers.{block}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        for name in "qkv":
            shapes |= {f"{at}self_attn.{name}_proj.weight": (C, C), f"{at}self_attn.{name}_proj.bias": (C,)}
        shapes |= {f"{at}self_attn.out_proj.weight": (C, C), f"{at}self_attn.out_proj.bias": (C,)}
        shapes |= {f"{at}mlp.fc1.weight": (24, C), f"{at}mlp.fc1.bias": (24,)}
        shapes |= {f"{at}mlp.fc2.weight": (C, 24), f"{at}mlp.fc2.bias": (C,)}
    for norm in norms:
        shapes |= {f"{norm}.weight": (C,), f"{norm}.bias": (C,)}
    if kind == "stf":
        linear = {"model.mm_projector_crosslayer.0": (4 * C, 8 * C), "model.mm_projector_crosslayer.2": (C, 4 * C)}
        linear |= {"model.mm_projector.0": (16 * C, 4 * C), "model.mm_projector.2": (D, 16 * C)}
    else:
        linear = {"model.mm_projector.0": (D, C), "model.mm_projector.2": (D, D)}
    if kind in ("llava_next", "avg"):
        shapes["model.image_newline"] = (D,)
    if kind == "avg":
        at = "model.router."
        shapes |= {f"{at}merger.self_attn.in_proj_weight": (3 * D, D), f"{at}merger.self_attn.in_proj_bias": (3 * D,)}
        linear |= {f"{at}{name}": (D, D) for name in ("merger.self_attn.out_proj", "merger.linear1", "merger.linear2")}
        linear |= {f"{at}router.0": (D, D), f"{at}router.2": (len(GRANULARITIES), D)}
        shapes[f"{at}voter"] = (sum(GRANULARITIES) + FILTERED_TEXT, 1)
        for name, width in (("merger.norm1", D), ("merger.norm2", D), ("norm", len(GRANULARITIES))):
            shapes |= {f"{at}{name}.weight": (width,), f"{at}{name}.bias": (width,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of which every one matters: activations of order 1, norms and biases not trivial."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
        elif len(shape) == 1 or "embed" in name:
            tensors[name] = 0.5 * noise
        else:
            tensors[name] = noise / noise[0].numel() ** 0.5
    return tensors


def sentencepiece_model() -> bytes:
    """A tokenizer.model of Llama's kind."""
    model = io.BytesIO()
    words = ["what", "number", "is", "on", "the", "red", "card", "USER: ASSISTANT:", "A chat between a curious user"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"{a} {b}?" for a in words for b in words), model_writer=model, model_type="bpe",
        vocab_size=VOCABULARY, normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


@dataclass
class Original:
    """
    config    config.json's members
    tensors   all tensors, the tower's among them
    files     other files by name
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path, layout: str = "safetensors", shards: int = 1, tower: bool = True) -> Path:
        """Into `folder`. `layout` is "safetensors" or "bin"; without `tower`, the weights have none."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        tensors = {name: value for name, value in self.tensors.items() if tower or not name.startswith(TOWER)}
        write_weights(tensors, folder, layout, shards)
        return folder

    def write_tower(self, folder: Path, layout: str = "safetensors", whole: bool = True, values: bool = True) -> Path:
        """The tower's own folder: of a CLIPModel with a text tower if `whole`, else of a CLIPVisionModel."""
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"model_type": "clip_vision_model", **VISION}
        config = {"model_type": "clip", "text_config": {}, "vision_config": config} if whole else config
        (folder / "config.json").write_text(json.dumps(config))
        if values:
            tensors = {
                f"vision_model.{name[len(TOWER) :]}": v for name, v in self.tensors.items() if name.startswith(TOWER)
            }
            tensors["vision_model.embeddings.position_ids"] = torch.arange(17)
            if whole:
                tensors |= {"logit_scale": torch.tensor(4.6), "text_model.final_layer_norm.weight": torch.ones(C)}
            write_weights(tensors, folder, layout)
        return folder


def write_weights(tensors: dict[str, torch.Tensor], folder: Path, layout: str, shards: int = 1) -> None:
    stem, suffix, index = ("model", "safetensors", "model.safetensors.index.json")
    if layout == "bin":
        stem, suffix, index = ("pytorch_model", "bin", "pytorch_model.bin.index.json")
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        own = {name: tensors[name] for name in names[shard::shards]}
        weight_map |= dict.fromkeys(own, file)
        if layout == "bin":
            torch.save(own, folder / file)
        else:
            save_file(own, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make(kind: str, model: bytes, seed: int = 0, legacy: bool = False) -> Original:
    """A random model of a kind, with a tokenizer (`sentencepiece_model`) as Vicuna has it."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "legacy": legacy}
    files = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(settings).encode()}
    special = {key: settings[key] for key in settings if key.endswith("_token")}
    files["special_tokens_map.json"] = json.dumps(special).encode()
    files["generation_config.json"] = json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096}).encode()
    return Original(kind, config_of(kind), random_tensors(shapes_of(kind), seed), files)
