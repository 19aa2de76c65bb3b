"""config.json as the original LLaVA repository and its forks write it: flat, with `mm_` keys for what is not the decoder's.

It names the vision tower and says nothing of its sizes. That a folder is LLaVA-STF's shows in its weights alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..loading.config import CLIP_L_336, TextConfig, VisionConfig, is_original, read_text, read_vision
from ..loading.json_fields import JsonFields

_MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_TOWERS: dict[str, dict[str, int]] = {
    "clip-vit-large-patch14-336": CLIP_L_336,
    "clip-vit-large-patch14": {**CLIP_L_336, "image_size": 224},
}

# The decoder's keys, which Hugging Face's layout has in text_config.
_DECODER = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "sliding_window"),
    *("attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
)
# How answers are decoded where there is no generation_config.json.
_DECODING = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "min_length", "do_sample", "temperature", "top_k"),
    *("top_p", "typical_p", "num_beams", "num_beam_groups", "repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
    "num_return_sequences",
)
# Read below.
_READ = (
    *("model_type", "mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type"),
    *("mm_hidden_size", "mm_patch_merge_type", "image_aspect_ratio", "image_grid_pinpoints", "torch_dtype", "dtype"),
    *("tie_word_embeddings", "vis_token_granularity", "filtered_text_num", "router_select"),
    "quantization_config",
)
# The values with which the model is the one that is made here, and what it would be with others.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "mm_use_im_start_end": ((False,), "tokens around a picture are not supported"),
    "mm_use_im_patch_token": ((False,), "a token for patches is not supported"),
    "use_mm_proj": ((True,), "a model without a projector is not supported"),
    "mm_newline_position": (("grid",), "newlines elsewhere than after the rows of tiles are not supported"),
    "s2": ((False,), "a tower at several scales is not supported"),
    "is_encoder_decoder": ((False,), "a decoder alone is supported"),
    "is_decoder": ((False, True), "a decoder alone is supported"),
    "add_cross_attention": ((False,), "a decoder alone is supported"),
    "tie_encoder_decoder": ((False,), "a decoder alone is supported"),
    "pruned_heads": (({},), "heads that are pruned are not supported"),
    "chunk_size_feed_forward": ((0,), "a decoder alone is supported"),
}
# Of training, of the tokenizer, which has files of its own, or of how a program runs: the model is the same with any value.
_IGNORED_BEGINNINGS = ("tune_", "freeze_", "unfreeze_", "tokenizer_", "output_", "_")
_IGNORED = (
    *("architectures", "transformers_version", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp"),
    *("mm_projector_lr", "mm_vision_tower_lr", "mm_resampler_lr", "mm_tunable_parts", "use_pos_skipping"),
    *("pos_skipping_range", "image_crop_resolution", "image_split_resolution"),  # of another image_aspect_ratio
    *("margin", "rank_loss_weight", "ce_loss_weight"),
    *("return_dict", "return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss", "early_stopping"),
    *("length_penalty", "diversity_penalty", "finetuning_task", "id2label", "label2id", "prefix", "sep_token_id"),
    *("decoder_start_token_id", "task_specific_params", "problem_type", "cross_attention_hidden_size"),
)


@dataclass(frozen=True)
class OriginalConfig:
    """
    fields        the file's members
    text          the decoder; its vocabulary has no image token yet
    tower         what `mm_vision_tower` names
    width         channels of the tower
    select_layer  as `vision_feature_layer`
    keep_cls      whether the class token is a visual token too
    anyres        LLaVA-NeXT: a thumbnail and tiles
    pad           whether pictures are padded to a square
    pinpoints     (height, width) each; their file has the width first
    granularities AVG-LLaVA's, coarse to fine; empty for other models
    filtered_text AVG-LLaVA's number of text tokens that its router reads
    routed        whether AVG-LLaVA's router is used; its earlier stages of training have none
    """

    fields: JsonFields
    text: TextConfig
    tower: str
    width: int
    select_layer: int
    keep_cls: bool
    anyres: bool
    pad: bool
    pinpoints: tuple[tuple[int, int], ...]
    granularities: tuple[int, ...]
    filtered_text: int
    routed: bool

    @property
    def tied(self) -> bool:
        """Whether the head's weights are the embeddings."""
        return bool(self.fields.get("tie_word_embeddings"))

    def members(
        self, vision: VisionConfig, layers: list[int], projector: dict[str, Any] | None, vocab_size: int, image: int
    ) -> dict[str, Any]:
        """config.json in Hugging Face's layout: `layers` and `projector` as it has them, `image` the image token."""
        given = self.fields.members
        made: dict[str, Any] = {
            "architectures": ["LlavaNextForConditionalGeneration" if self.anyres else "LlavaForConditionalGeneration"],
            "model_type": "llava_next" if self.anyres else "llava",
            "image_token_index": image,
            "vision_feature_layer": layers if len(layers) > 1 else layers[0],
            "vision_feature_select_strategy": "full" if self.keep_cls else "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": self.tied,
            "text_config": {
                "model_type": self.text.model_type,
                **{key: given[key] for key in _DECODER if key in given},
                "vocab_size": vocab_size,
            },
            "vision_config": {"model_type": "clip_vision_model", **asdict(vision)},
        }
        if self.anyres:
            made["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in self.pinpoints]
        if projector is not None:
            made["projector"] = projector
        return made | {key: given[key] for key in (*_DECODING, "torch_dtype", "dtype") if given.get(key) is not None}


def read_original(folder: Path) -> OriginalConfig:
    """Read `folder`/config.json. Raises CheckpointError for a key that would make a model other than those made here."""
    top = JsonFields.of_file(folder / "config.json")
    if not is_original(top):
        expected = "a name: config.json is not of the original LLaVA repository or a fork of it"
        if "text_config" in top:
            raise CheckpointError(f"{top.where}: text_config: is in Hugging Face's layout already: load it as it is")
        raise top.error("mm_vision_tower", expected)
    _refuse_others(top)
    model_type = _MODEL_TYPES[top.choice("model_type", "", tuple(_MODEL_TYPES))]
    text = read_text(JsonFields({**top.members, "model_type": model_type}, top.where))
    top.boolean("tie_word_embeddings", False)
    top.choice("mm_projector_type", "linear", ("mlp2x_gelu",))  # "linear" is what their code takes without the key
    tower = top.get("mm_vision_tower")
    top.check("mm_vision_tower", isinstance(tower, str) and tower != "", "the name of a CLIP vision tower")
    layer = top.get("mm_vision_select_layer")
    top.check("mm_vision_select_layer", type(layer) is int, "a whole number")
    width = top.integer("mm_hidden_size", None)
    aspect = top.get("image_aspect_ratio")
    top.check(
        "image_aspect_ratio", aspect in (None, "square", "pad", "anyres"), "square, pad or anyres, or no such key"
    )
    anyres = aspect == "anyres"
    keep_cls = top.choice("mm_vision_select_feature", "patch", ("patch", "cls_patch")) == "cls_patch"
    top.check(
        "mm_vision_select_feature", not (keep_cls and anyres), "'patch': tiles cannot be joined with a class token"
    )
    merge = "spatial_unpad" if anyres else "flat"
    top.check("mm_patch_merge_type", top.get("mm_patch_merge_type", "flat") == merge, f"'{merge}' for {aspect!r}")
    granularities: tuple[int, ...] = ()
    if top.given("vis_token_granularity"):
        granularities = _read_granularities(top)
        top.check("image_aspect_ratio", anyres, "anyres, beside vis_token_granularity (AVG-LLaVA)")
    filtered = top.integer("filtered_text_num", 32) if granularities else 0  # as their code has it without the key
    routed = top.boolean("router_select", False)
    top.check("router_select", bool(granularities) or not routed, "false, without vis_token_granularity")
    pinpoints = _read_pinpoints(top) if anyres else ()
    return OriginalConfig(
        *(top, text, tower, width, layer, keep_cls, anyres, aspect == "pad", pinpoints, granularities, filtered, routed)
    )


def _refuse_others(top: JsonFields) -> None:
    known = (*_DECODER, *_DECODING, *_READ, *_IGNORED)
    if top.given("quantization_config"):
        raise top.error("quantization_config", "none: quantised weights are not supported")
    for key in top.members:
        if key in _ONLY:
            values, reason = _ONLY[key]
            top.check(key, not top.given(key) or top.get(key) in values, f"{values[0]!r}: {reason}")
        elif top.given(key) and key not in known and not key.startswith(_IGNORED_BEGINNINGS):
            raise top.error(
                key, "no such key: it is not supported (remove it if the model is the same with any value of it)"
            )


def _read_granularities(top: JsonFields) -> tuple[int, ...]:
    value = top.get("vis_token_granularity")
    numbers = isinstance(value, list) and all(type(one) is int and one > 0 for one in value)
    valid = numbers and bool(value) and value == sorted(set(value))
    top.check("vis_token_granularity", valid, "a list of numbers of tokens, coarse to fine")
    return tuple(value)


def check_granularities(config: OriginalConfig, vision: VisionConfig) -> None:
    """Whether each is a number of tokens that AVG-LLaVA's scaler makes of a view. Raises CheckpointError."""
    across, down, allowed = 1, 1, []
    while vision.grid % across == 0 and vision.grid % down == 0:  # windows of 1×1, 1×2, 2×2, 2×4 …
        allowed.append(vision.grid**2 // (across * down))
        across, down = (2 * across, down) if across == down else (across, 2 * down)
    fits = set(config.granularities) <= set(allowed)
    numbers = ", ".join(map(str, reversed(allowed)))
    config.fields.check(
        "vis_token_granularity", fits, f"some of {numbers}, what pooling makes of {vision.grid}×{vision.grid} patches"
    )


def _read_pinpoints(top: JsonFields) -> tuple[tuple[int, int], ...]:
    """(width, height) in the file → (height, width). That they are multiples of the tile is checked with the tower."""
    key, value = "image_grid_pinpoints", top.get("image_grid_pinpoints")
    valid = isinstance(value, list) and value and all(isinstance(one, list) and len(one) == 2 for one in value)
    top.check(key, bool(valid), "a list of [width, height] (a range of grids as text is not supported)")
    return tuple((height, width) for width, height in value)


def read_tower(folder: Path) -> VisionConfig:
    """The tower that config.json of `folder` describes: a CLIPVisionModel's, or a CLIPModel's with one in it."""
    top = JsonFields.of_file(folder / "config.json")
    section = top.section("vision_config")
    if not top.given("vision_config"):
        return read_vision(top)
    top.choice("model_type", "clip", ("clip",))
    older = top.section("vision_config_dict").members  # of old files, where it wins over the section
    return read_vision(JsonFields({**section.members, **older}, top.where, section.path))


def known_tower(config: OriginalConfig) -> VisionConfig | None:
    """The tower that `mm_vision_tower` names, of those whose sizes are known here."""
    sizes = _TOWERS.get(config.tower.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return None if sizes is None else VisionConfig(**sizes, hidden_act="quick_gelu", layer_norm_eps=1e-5)


def check_tower(config: OriginalConfig, vision: VisionConfig) -> None:
    """Whether the tower and what config.json says of it go together. Raises CheckpointError."""
    fields, states = config.fields, vision.num_hidden_layers + 1
    fields.check("mm_hidden_size", config.width == vision.hidden_size, f"the vision tower's {vision.hidden_size}")
    fields.check(
        "mm_vision_select_layer",
        -states <= config.select_layer < states,
        f"a whole number from {-states} to {states - 1}",
    )
    tile = vision.image_size
    valid = all(
        type(side) is int and tile <= side <= math.isqrt(2**40) and side % tile == 0
        for pinpoint in config.pinpoints
        for side in pinpoint
    )
    fields.check("image_grid_pinpoints", valid, f"[width, height] each, multiples of the tile size {tile}")
    if config.granularities:
        check_granularities(config, vision)
