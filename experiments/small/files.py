"""The files of a model's folder that are not weights: config.json, the processor's, the tokenizer's, the chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .decoder import IMAGE, Decoder

# What DINOv2's pictures are normalised with, as ImageNet's usually are.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# The template in the GGUF file, for content in parts as well: a picture is a line of its own. It has the same system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Layout:
    """A folder's name, its model_type, and the side of a tile in pixels."""

    folder: str
    model_type: str
    image_size: int

    @property
    def anyres(self) -> bool:
        return self.model_type == "llava_next"

    @property
    def pinpoints(self) -> dict[str, Any]:
        side = self.image_size
        grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
        return {"image_grid_pinpoints": grids} if self.anyres else {}


def write_files(folder: Path, layout: Layout, decoder: Decoder, vision: dict[str, Any]) -> None:
    """All files of the folder but the weights; `vision` is config.json's vision_config."""
    name = "LlavaNext" if layout.anyres else "Llava"
    image_token = decoder.tokenizer.token_to_id(IMAGE)
    tokens = {f"{key}_token_id": decoder.config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": layout.model_type,
        "dtype": "float32",
        "image_token_id": image_token,
        "image_token_index": image_token,
        "image_seq_length": (layout.image_size // vision["patch_size"]) ** 2,
        **layout.pinpoints,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "vision_config": vision,
        "text_config": decoder.config,
    }
    edge = {"height": layout.image_size, "width": layout.image_size}
    pictures = {
        "image_processor_type": "LlavaNextImageProcessor" if layout.anyres else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": layout.image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": edge,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
        **({"do_pad": True} if layout.anyres else {}),
        **layout.pinpoints,
    }
    processor = {
        "processor_class": f"{name}Processor",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" drops
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": "default",
        "image_processor": pictures,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **decoder.special,
        "image_token": IMAGE,
        "extra_special_tokens": {"image_token": IMAGE},
        "model_max_length": decoder.config["max_position_embeddings"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "processor_class": f"{name}Processor",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {**tokens, "do_sample": False})
    _write_json(folder / "preprocessor_config.json", {**pictures, "processor_class": f"{name}Processor"})
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "tokenizer_config.json", tokenizer)
    decoder.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
