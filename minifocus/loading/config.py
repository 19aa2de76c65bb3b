"""config.json of a LLaVA-1.5 or LLaVA-NeXT folder, read strictly.

Absent fields take transformers' defaults, which differ between an absent and a partial `vision_config`. Null stands for a
default only where it does in transformers. A file of which transformers would make another model than this package is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..activations import ACTIVATIONS
from ..errors import CheckpointError, InputError
from ..files.reading import named
from ..projectors import Ends, Grid, MLPOptions, ProjectorOptions, describe, options_of
from ..quantized import NAMES as QUANTIZED
from .generation_config import GenerationConfig, read_generation_config
from .json_fields import LARGEST_SIZE, JsonFields

MODEL_TYPES = ("llava", "llava_next")
TEXT_MODEL_TYPES = ("llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Keys that make transformers read other keys or files, or give single layers their own settings.
_UNSUPPORTED = ("attribute_map", "configuration_files", "is_causal", "per_layer_config", "transformers_weights")
_UNSUPPORTED_TEXT = ("attention_chunk_size", "attribute_map", "kv_sharing_modes", "per_layer_config")
_UNSUPPORTED_VISION = ("attribute_map", "per_layer_config")

_LLAMA: dict[str, Any] = dict(intermediate_size=11008, num_key_value_heads=None, max_position_embeddings=2048)
_MISTRAL: dict[str, Any] = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)
CLIP_L_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
_CLIP_B_32 = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32
)
# LLaVA-NeXT's default, in config.json and in the image processor's file.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer. `image_size` is the side of a tile in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. Of the last four fields, `linear` uses the factor and `llama3` uses all."""

    rope_type: str
    rope_theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class TextConfig:
    """A Llama-shaped decoder (Llama, Vicuna, Mistral)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig


@dataclass(frozen=True)
class Config:
    """The whole model. `feature_layers` indexes [pre_layrnorm output, block 0's output, …] as transformers does."""

    model_type: str
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    keep_cls: bool
    projector: ProjectorOptions
    tie_word_embeddings: bool
    grid_pinpoints: tuple[tuple[int, int], ...]
    dtype: torch.dtype | None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    quantized: str | None = None  # "int8" or "int4": what the decoder's weights are (see `minifocus.quantized`)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.generation.eos_token_ids

    @property
    def anyres(self) -> bool:
        """True for LLaVA-NeXT: a thumbnail and the tiles of the best-fitting resolution."""
        return self.model_type == "llava_next"

    @property
    def ends(self) -> Ends:
        """What the projector stands between."""
        return Ends(self.vision.grid, self.vision.hidden_size, len(self.feature_layers), self.text.hidden_size)

    @property
    def grid(self) -> Grid:
        """The visual tokens of one view, after the projector."""
        return self.projector.grid(self.ends)


def _refuse_unsupported(section: JsonFields, keys: Sequence[str]) -> None:
    if section.given("quantization_config"):
        raise section.error("quantization_config", "none: quantised weights are not supported")
    for key in keys:
        if section.given(key) or (key in ("attribute_map", "configuration_files") and key in section):
            raise section.error(key, "no such key: it is not supported")


def read_vision(section: JsonFields, partial: bool = True) -> VisionConfig:
    """The vision tower that a `vision_config` describes. `partial`: the section is there, if perhaps without a key in it."""
    _refuse_unsupported(section, _UNSUPPORTED_VISION)
    section.choice("model_type", "clip_vision_model", ("clip_vision_model",))
    if section.integer("num_channels", 3) != 3:
        raise section.error("num_channels", "3")
    if section.boolean("is_causal", False):
        raise section.error("is_causal", "false")
    # transformers starts from ViT-L/14-336 when the section is absent, and from CLIP's own defaults when it is partial.
    defaults = _CLIP_B_32 if partial else CLIP_L_336
    sizes = {key: section.integer(key, value) for key, value in defaults.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise section.error("hidden_size", f"a multiple of num_attention_heads ({sizes['num_attention_heads']})")
    if sizes["image_size"] < sizes["patch_size"]:
        raise section.error("image_size", f"at least one patch ({sizes['patch_size']})")
    for key, most in (("patch_size", LARGEST_SIZE), ("image_size", LARGEST_SIZE * sizes["patch_size"] ** 2)):
        if sizes[key] ** 2 > most:
            raise section.error(key, f"at most {math.isqrt(most)}")
    return VisionConfig(
        **sizes,
        hidden_act=section.choice("hidden_act", "quick_gelu", tuple(ACTIVATIONS)),
        layer_norm_eps=section.number("layer_norm_eps", 1e-5),
    )


def _read_rope(section: JsonFields, max_position_embeddings: int) -> RopeConfig:
    # A rope_scaling (the older name) that is not empty replaces rope_parameters. A key inside either wins over the same key
    # beside it, except for llama3's original length.
    older, newer = section.section("rope_scaling"), section.section("rope_parameters")
    rope = older if older.members else newer
    if "type" in rope and "rope_type" not in rope:
        rope.members = {**rope.members, "rope_type": rope.get("type")}
    rope_type = rope.choice("rope_type", "default", ROPE_TYPES)
    partial = rope if "partial_rotary_factor" in rope else section
    if (partial is rope or section.given("partial_rotary_factor")) and partial.number(
        "partial_rotary_factor", None
    ) != 1:
        raise partial.error("partial_rotary_factor", "1 (partial rotation is not supported)")
    theta = (rope if "rope_theta" in rope else section).number("rope_theta", 10000.0)
    if rope_type == "default":
        return RopeConfig(rope_type, theta)
    factor = rope.number("factor", None)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, factor)
    low, high = rope.number("low_freq_factor", None), rope.number("high_freq_factor", None)
    if high <= low:
        raise rope.error("high_freq_factor", f"more than low_freq_factor ({low})")
    key = "original_max_position_embeddings"
    original = (section if key in section else rope).integer(key, max_position_embeddings)
    return RopeConfig(rope_type, theta, factor, low, high, original)


def read_text(section: JsonFields) -> TextConfig:
    """The decoder that a `text_config` describes. Raises CheckpointError."""
    _refuse_unsupported(section, _UNSUPPORTED_TEXT)
    model_type = section.choice("model_type", "llama", TEXT_MODEL_TYPES)
    defaults = _MISTRAL if model_type == "mistral" else _LLAMA
    layers = section.integer("num_hidden_layers", 32)
    if section.given("layer_types") and section.get("layer_types") != ["full_attention"] * layers:
        raise section.error("layer_types", f"'full_attention' for each of num_hidden_layers ({layers})")
    if not section.boolean("is_causal", True):
        raise section.error("is_causal", "true")
    hidden_size = section.integer("hidden_size", 4096)
    heads = section.integer("num_attention_heads", 32)
    if model_type == "llama" and hidden_size % heads:  # transformers refuses it, whatever head_dim says
        raise section.error("hidden_size", f"a multiple of num_attention_heads ({heads})")
    kv_key = "num_key_value_heads"
    kv_heads = section.integer(kv_key, defaults[kv_key]) if defaults[kv_key] or section.given(kv_key) else heads
    if heads % kv_heads:
        raise section.error(kv_key, f"a divisor of num_attention_heads ({heads})")
    head_dim = section.integer("head_dim", None) if section.given("head_dim") else hidden_size // heads
    if head_dim % 2 or not head_dim:
        raise section.error("head_dim", "an even number, as rotary embedding needs")
    if head_dim * heads > LARGEST_SIZE:
        raise section.error("head_dim", f"at most {LARGEST_SIZE} channels in all of the num_attention_heads ({heads})")
    positions = section.integer("max_position_embeddings", defaults["max_position_embeddings"])
    context = positions
    # Mistral has a sliding window unless it is null. A window changes nothing while a sequence fits into it, so the sequence
    # is limited to it.
    if section.given("sliding_window") or ("sliding_window" not in section and model_type == "mistral"):
        context = min(positions, section.integer("sliding_window", 4096))
    return TextConfig(
        model_type=model_type,
        vocab_size=section.integer("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=section.integer("intermediate_size", defaults["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=section.choice("hidden_act", "silu", tuple(ACTIVATIONS)),
        rms_norm_eps=section.number("rms_norm_eps", 1e-6),
        max_position_embeddings=context,
        # transformers' Mistral has no biases, whatever its file says.
        attention_bias=section.boolean("attention_bias", False) and model_type == "llama",
        mlp_bias=section.boolean("mlp_bias", False) and model_type == "llama",
        rope=_read_rope(section, positions),
    )


def _read_feature_layers(top: JsonFields, vision: VisionConfig) -> tuple[int, ...]:
    value = top.get("vision_feature_layer", -2)
    layers = value if isinstance(value, list) else [value]
    states = vision.num_hidden_layers + 1
    if not layers or any(type(layer) is not int or not -states <= layer < states for layer in layers):
        raise top.error("vision_feature_layer", f"whole numbers from {-states} to {states - 1}")
    if len(layers) * vision.hidden_size > LARGEST_SIZE:
        raise top.error("vision_feature_layer", f"at most {LARGEST_SIZE} channels in all")
    return tuple(layer % states for layer in layers)


def _stated_projector(top: JsonFields) -> ProjectorOptions:
    activation = top.choice("projector_hidden_act", "gelu", tuple(ACTIVATIONS))
    mlp, section = MLPOptions(activation, top.boolean("multimodal_projector_bias", True)), top.section("projector")
    return options_of(section.members) if section.members else mlp


def _read_projector(top: JsonFields, keep_cls: bool, ends: Ends) -> ProjectorOptions:
    section = top.section("projector")
    try:
        options = _stated_projector(top)
        options.grid(ends)
    except InputError as error:
        raise CheckpointError(f"{top.where}: projector: {error}") from error
    if section.members and isinstance(options, MLPOptions):
        raise section.error("name", "another than 'mlp', which stands for no projector key")
    if section.members and keep_cls:
        raise top.error("vision_feature_select_strategy", "'default': this projector has no place for a CLS token")
    return options


def describe_parts(members: dict[str, Any], config: Config) -> bool:
    """Make config.json's `members` say what `config` does of the projector, its layers and quantised weights.

    Returns whether that changed anything.
    """
    top, changed = JsonFields(members, "config.json"), False
    if _read_quantized(top) != config.quantized:
        members["quantization"], changed = config.quantized and {"weights": config.quantized}, True
    if _read_feature_layers(top, config.vision) != config.feature_layers:
        members["vision_feature_layer"], changed = list(config.feature_layers), True
    if _stated_projector(top) == config.projector:
        return changed
    if isinstance(config.projector, MLPOptions):
        members["projector_hidden_act"] = config.projector.activation
        members["multimodal_projector_bias"] = config.projector.bias
    members["projector"] = None if isinstance(config.projector, MLPOptions) else describe(config.projector)
    return True


def _read_pinpoints(top: JsonFields, tile: int) -> tuple[tuple[int, int], ...]:
    value = top.get("image_grid_pinpoints")
    value = PINPOINTS if value is None else value
    valid = isinstance(value, list) and value and all(isinstance(p, list) and len(p) == 2 for p in value)
    if not valid or any(type(side) is not int or side < tile or side % tile for p in value for side in p):
        raise top.error("image_grid_pinpoints", f"a list of [height, width], multiples of the tile size {tile}")
    if any(height * width > LARGEST_SIZE for height, width in value):
        raise top.error("image_grid_pinpoints", f"at most {LARGEST_SIZE} pixels each")
    return tuple((height, width) for height, width in value)


def _read_dtype(top: JsonFields) -> torch.dtype | None:
    key = "dtype" if top.given("dtype") else "torch_dtype"
    return DTYPES[top.choice(key, "", tuple(DTYPES))] if top.given(key) else None


def _read_quantized(top: JsonFields) -> str | None:
    section = top.section("quantization")
    if not section.members:
        return None
    top.check("quantization", set(section.members) == {"weights"}, "an object with the key weights alone")
    return section.choice("weights", "", QUANTIZED)


def load_config(folder: Path) -> Config:
    """Read `folder`/config.json, and generation_config.json if there is one.

    Raises CheckpointError, which names file and key, for anything missing, malformed or not supported.
    """
    file = folder / "config.json"
    top = JsonFields.of_file(file)
    if is_original(top):
        raise CheckpointError(
            f"{file}: is of the original LLaVA repository (mm_vision_tower): expected a folder in Hugging Face's format, "
            f"which this command makes of it: python examples/convert.py {named(folder)} --out FOLDER"
        )
    return read_config(top, folder)


def is_original(top: JsonFields) -> bool:
    """Whether a config.json is of the original LLaVA repository or one of its forks."""
    return "mm_vision_tower" in top and "text_config" not in top


def read_config(top: JsonFields, folder: Path) -> Config:
    """`load_config` with the members of a config.json that need not be in `folder`; generation_config.json is."""
    if top.get("model_type") not in MODEL_TYPES:
        raise top.error("model_type", "one of " + ", ".join(MODEL_TYPES) + " (a LLaVA folder in Hugging Face's format)")
    _refuse_unsupported(top, _UNSUPPORTED)
    model_type = top.get("model_type")
    vision = read_vision(top.section("vision_config"), partial=top.given("vision_config"))
    text = read_text(top.section("text_config"))
    strategy = top.choice("vision_feature_select_strategy", "default", ("default", "full"))
    if strategy == "full" and model_type == "llava_next":
        raise top.error(
            "vision_feature_select_strategy", "'default': LLaVA-NeXT's tiles cannot be joined with a CLS token"
        )
    token_key, image_token_id = "image_token_index", top.integer("image_token_index", 32000, minimum=0)
    if "image_token_id" in top:  # the newer name, which wins
        token_key, image_token_id = "image_token_id", top.integer("image_token_id", None, minimum=0)
    if image_token_id >= text.vocab_size:
        raise top.error(token_key, f"less than text_config.vocab_size ({text.vocab_size})")
    tied, decoder_tied = (s.boolean("tie_word_embeddings", False) for s in (top, top.section("text_config")))
    tied = tied or (
        decoder_tied and model_type == "llava"
    )  # transformers does not look at LLaVA-NeXT's decoder for this

    layers, keep_cls = _read_feature_layers(top, vision), strategy == "full"
    generation = read_generation_config(folder, top, top.section("text_config"))
    return Config(
        model_type=model_type,
        vision=vision,
        text=text,
        image_token_id=image_token_id,
        feature_layers=layers,
        keep_cls=keep_cls,
        projector=_read_projector(top, keep_cls, Ends(vision.grid, vision.hidden_size, len(layers), text.hidden_size)),
        tie_word_embeddings=tied,
        grid_pinpoints=_read_pinpoints(top, vision.image_size) if model_type == "llava_next" else (),
        dtype=_read_dtype(top),
        generation=generation,
        quantized=_read_quantized(top),
    )
