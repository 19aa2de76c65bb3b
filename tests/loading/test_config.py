"""Every key of config.json: our logits equal those of transformers with the same file, or the folder is refused.

The keys are those of transformers' own classes, and more that its code asks for. Each is set, in the file of a small folder,
to values that mean something and to some that do not. The weights stay, so that sizes that do not fit them are refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from checkpoints import IMAGE_TOKEN, PINPOINTS, Inputs, build, make_inputs, save

import minifocus
from minifocus.inputs.model_inputs import split_pixels
from minifocus.llama import LayerCache

ABSENT = object()
LAYERS = 2
FULL = ["full_attention"] * LAYERS
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
PER_LAYER = [{"0": {"rms_norm_eps": 0.5}}]
SOME_ACTIVATIONS = ["gelu", "quick_gelu", "tanh", "mish"]  # of those that Llama's decoder is given
WRONG: list[Any] = [None, ABSENT, "word", -1, [], {}, True, 1.5, float("nan"), float("inf"), 10**30, 10**400]

# Section by section, the keys that decide about logits, and what each is set to beside the WRONG values.
TEXT: dict[str, list[Any]] = {
    "model_type": ["llama", "mistral", "qwen2"],
    "vocab_size": [95, 96],
    "hidden_size": [32, 40],
    "intermediate_size": [48, 49],
    "num_hidden_layers": [1, 3, LAYERS],
    "num_attention_heads": [2, 8, 3],
    "num_key_value_heads": [1, 2, 3],
    "head_dim": [8, 16, 0],
    "hidden_act": ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "gelu_fast", "tanh", "mish"],
    "rms_norm_eps": [1e-2, 0.0, 1e308],
    "max_position_embeddings": [8, 80, 100_000],
    "attention_bias": [False],
    "mlp_bias": [False],
    "tie_word_embeddings": [False],
    "rope_theta": [50.0, 50],
    "rope_scaling": [
        LINEAR, {"type": "linear", "factor": 3.0}, {"type": None}, {**LLAMA3, "original_max_position_embeddings": 16},
    ],
    "rope_parameters": [
        {"rope_theta": 50.0}, {"rope_theta": None}, {"rope_type": None}, {**LINEAR, "rope_theta": 50.0},
        {**LINEAR, "factor": None},
        {**LINEAR, "factor": 0.5}, {**LINEAR, "type": "default"}, {**LINEAR, "partial_rotary_factor": 0.5}, LLAMA3,
        {**LINEAR, "attention_factor": 3.0}, {**LLAMA3, "low_freq_factor": 4.0}, {"rope_type": "yarn", "factor": 2.0},
        {"full_attention": LINEAR}, {**LLAMA3, "original_max_position_embeddings": None},
    ],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [16],
    "sliding_window": [4, 85, 1000],
    "layer_types": [FULL, FULL[:-1], ["sliding_attention"] * LAYERS, ["chunked_attention"] * LAYERS],
    "attention_chunk_size": [4],
    "kv_sharing_modes": [["reuse"] * LAYERS],
    "is_causal": [False],
    "per_layer_config": PER_LAYER,
    "attribute_map": [{"rms_norm_eps": "x"}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
}  # fmt: skip
VISION: dict[str, list[Any]] = {
    "model_type": ["clip_vision_model", "clip", "siglip_vision_model"],
    "hidden_size": [16, 18],
    "intermediate_size": [24, 25],
    "num_hidden_layers": [2, 3],
    "num_attention_heads": [1, 2, 3, 4],
    "num_channels": [1, 3],
    "image_size": [28, 29, 35, [28, 28]],
    "patch_size": [7, 6, [7, 7]],
    "hidden_act": SOME_ACTIVATIONS,
    "layer_norm_eps": [1e-2, 0.0],
    "is_causal": [False, True],
    "per_layer_config": PER_LAYER,
    "attribute_map": [{"layer_norm_eps": "x"}],
}
TOP: dict[str, list[Any]] = {
    "model_type": ["llava", "llava_next", "llava_onevision"],
    "vision_config": [[]],
    "image_token_index": [5, IMAGE_TOKEN, 96],
    "image_token_id": [5, IMAGE_TOKEN, 96],
    "projector_hidden_act": SOME_ACTIVATIONS,
    "vision_feature_select_strategy": ["default", "full"],
    "vision_feature_layer": [1, 3, -4, [-2], [0], [1, 2], [-2, "x"], 4],
    "multimodal_projector_bias": [False, True],
    "tie_word_embeddings": [False],
    "image_grid_pinpoints": [
        PINPOINTS, PINPOINTS[::-1], [[28, 56], [28, 56]], [[28, 57]], [[28 * 10**400, 28]], [[28 * 10**6] * 2],
    ],
    "dtype": ["float32", "float16", "bfloat16", "float64", "torch.float32"],
    "torch_dtype": ["float32", "float16"],
    "is_causal": [False],
    "per_layer_config": PER_LAYER,
    "transformers_weights": ["other.safetensors"],
    "configuration_files": [["config.5.json"]],
    "attribute_map": [{"vision_feature_layer": "x"}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
}  # fmt: skip
# What changes no logits, and another value of it: where training begins, what a call returns, what only names something.
INERT: dict[str, Any] = {
    "transformers_version": "4.0", "architectures": ["X"], "output_hidden_states": True, "return_dict": True, "dtype": "float16",
    "chunk_size_feed_forward": 2, "is_encoder_decoder": True, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0},
    "problem_type": "regression", "initializer_range": 0.5, "initializer_factor": 0.5, "use_cache": False, "pad_token_id": 7,
    "bos_token_id": 7, "eos_token_id": 7, "pretraining_tp": 2, "attention_dropout": 0.5, "projection_dim": 3,
    "image_seq_length": 5,
    "tie_last_hidden_states": True, "torch_dtype": "bfloat16", "pruned_heads": {"0": [0]}, "is_decoder": False,
    "torchscript": True,
    "add_cross_attention": True, "output_attentions": True, "hidden_dropout_prob": 0.5, "use_image_newline_parameter": False,
    "gradient_checkpointing": True, "auto_map": {"AutoConfig": "a.B"}, "no_such_key": {"x": [None]},
}  # fmt: skip
SECTIONS: dict[str, tuple[str, dict[str, list[Any]], type]] = {
    "llava": ("", TOP, transformers.LlavaConfig),
    "llama": ("text_config", TEXT, transformers.LlamaConfig),
    "clip": ("vision_config", VISION, transformers.CLIPVisionConfig),
    "llava_next": ("", TOP, transformers.LlavaNextConfig),
    "mistral": ("text_config", {**TEXT, "hidden_act": SOME_ACTIVATIONS}, transformers.MistralConfig),
}
# Where a key takes effect only together with others, or one wins over another: keys of sections are written section/key.
ROPE, OLDER = "text_config/rope_parameters", "text_config/rope_scaling"
TOGETHER: list[dict[str, Any]] = [
    {ROPE: LLAMA3, "text_config/original_max_position_embeddings": 16},
    {ROPE: {**LLAMA3, "original_max_position_embeddings": 64}, "text_config/original_max_position_embeddings": 16},
    {ROPE: LINEAR, OLDER: {}},
    {ROPE: {"rope_theta": 9.0}, OLDER: {"type": "linear", "factor": 3.0}},
    {ROPE: ABSENT, "text_config/rope_theta": 50.0},
    {ROPE: {"rope_theta": 9.0}, "text_config/rope_theta": None},
    {ROPE: LINEAR, "text_config/partial_rotary_factor": 0.5},
    {ROPE: {**LINEAR, "partial_rotary_factor": 1.0}, "text_config/partial_rotary_factor": 0.5},
    {ROPE: {"full_attention": LINEAR}, "text_config/layer_types": FULL},
    {"text_config/layer_types": ["sliding_attention"] * LAYERS, "text_config/sliding_window": 4},
    {"text_config/num_attention_heads": 2, "text_config/head_dim": 16, "text_config/num_key_value_heads": 1},
    {"text_config/num_attention_heads": 3, "text_config/head_dim": 8, "text_config/num_key_value_heads": 3},
    {"image_token_id": IMAGE_TOKEN, "image_token_index": 5},
    {"image_token_id": 5, "image_token_index": IMAGE_TOKEN},
    {"dtype": None, "torch_dtype": "bfloat16", "text_config/dtype": "float16"},
    {"dtype": ABSENT, "text_config/dtype": "float16", "vision_config/dtype": "bfloat16"},
    {"tie_word_embeddings": False, "text_config/tie_word_embeddings": True},
]  # fmt: skip
# Products of sizes that each are in range, refused before anything of that size is asked for.
HUGE = 2**26
TOO_LARGE: list[dict[str, Any]] = [
    {f"text_config/{key}": HUGE for key in ("hidden_size", "num_attention_heads", "head_dim", "num_key_value_heads")},
    {"text_config/hidden_size": HUGE, "text_config/intermediate_size": HUGE, "text_config/vocab_size": HUGE},
    {"vision_config/image_size": HUGE, "vision_config/patch_size": 1, "vision_config/hidden_size": HUGE},
    {"vision_config/image_size": HUGE, "vision_config/patch_size": HUGE, "vision_config/hidden_size": HUGE},
    {"vision_feature_layer": [1] * 10**5, "vision_config/hidden_size": HUGE},
]


@dataclasses.dataclass
class Model:
    """A folder, its config.json as transformers wrote it, and a batch of one row with a picture.

    `known` has transformers' logits by what it reads in a config.json: many values are read as the same.
    """

    folder: Path
    written: dict[str, Any]
    oracle: Any
    inputs: Inputs
    known: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def change(self, changes: dict[str, Any]) -> None:
        config = copy.deepcopy(self.written)
        for path, value in changes.items():
            *section, key = path.split("/")
            fields = config[section[0]] if section else config
            fields[key] = value
            if value is ABSENT:
                del fields[key]
        (self.folder / "config.json").write_text(json.dumps(config))

    def ours(self) -> torch.Tensor | str:
        """Logits of the row and, with the cache, of one token more; or the error's text."""
        try:
            model = minifocus.load(self.folder, "none")
            tiles, sizes = split_pixels(model.config, self.inputs.pixel_values, self.inputs.image_sizes)
            features = model.encode_pictures(tiles, sizes)
            rows, pictures = model.embed(self.inputs.input_ids, features, self.inputs.attention_mask)
            caches = [LayerCache() for _ in model.language_model.model.layers]
            rows = model.prefill(rows, pictures, caches).rows
            last = model.language_model.model.decode(torch.tensor([7]), rows.positions[:, -1] + 1, caches)
            return model.language_model.lm_head(torch.cat([rows.hidden, last[:, None]], 1)).float()
        except minifocus.CheckpointError as error:
            return str(error)
        except minifocus.InputError as error:  # by the changed config.json, the same batch does not fit
            assert any(word in str(error) for word in ("context length", "placeholders", "pixel_values: "))
            return "config.json"

    def theirs(self) -> torch.Tensor:
        read = self.oracle.config_class.from_pretrained(self.folder).to_json_string(use_diff=False)
        if read not in self.known:
            self.known[read] = self.logits_of_theirs()
        return self.known[read]

    def logits_of_theirs(self) -> torch.Tensor:
        oracle = self.oracle.from_pretrained(self.folder).eval()
        arguments = self.inputs.arguments()
        arguments["pixel_values"] = arguments["pixel_values"].to(oracle.dtype)
        more = torch.ones(1, arguments["input_ids"].shape[1] + 1, dtype=torch.int64)
        whole = oracle(**arguments, return_dict=True, use_cache=True)
        one = {"input_ids": torch.tensor([[7]]), "attention_mask": more, "past_key_values": whole.past_key_values}
        return torch.cat([whole.logits, oracle(**one, return_dict=True, use_cache=True).logits], 1).float()

    @torch.inference_mode()
    def equal_or_refused(self, changes: dict[str, Any], key: str) -> None:
        self.change(changes)
        got = self.ours()
        if isinstance(got, str):
            assert key in got or "config.json" in got, f"{changes}: {got}"
            assert len(got) < 3000
            return
        try:
            expected = self.theirs()
        except Exception as error:
            raise AssertionError(f"{key}: transformers refuses {changes}") from error
        assert got.shape == expected.shape, changes
        difference = float((got - expected).abs().max())
        assert difference <= (2e-5 if self.dtype() == "float32" else 0.25), f"{changes}: logits differ by {difference}"

    def dtype(self) -> str:
        config = json.loads((self.folder / "config.json").read_text())
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[dict[str, Model]]:
    made = {}
    for kind, decoder in (("llava", {}), ("llava_next", {"text_model_type": "mistral", "text_sliding_window": None})):
        oracle = build(kind, text_num_hidden_layers=LAYERS, **decoder)
        folder = save(oracle, tmp_path_factory.mktemp(kind))
        inputs = make_inputs(minifocus.load(folder, "none"), [[(57, 91)]])
        made[kind] = Model(folder, json.loads((folder / "config.json").read_text()), type(oracle), inputs)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    # Of each file that it reads, transformers writes a text for a log that nobody asked for.
    with mock.patch.object(transformers.PreTrainedConfig, "__repr__", object.__repr__):
        yield made
    transformers.logging.set_verbosity(verbosity)


def model_of(models: dict[str, Model], name: str) -> Model:
    return models["llava_next" if name in ("llava_next", "mistral") else "llava"]


@pytest.mark.parametrize("name", SECTIONS)
def test_keys_that_decide(models: dict[str, Model], name: str) -> None:
    model, (section, table, _) = model_of(models, name), SECTIONS[name]
    model.change({})
    base = model.ours()
    assert isinstance(base, torch.Tensor) and 2 < base.std() < 10  # the tolerance is for logits of this size
    for key, values in table.items():
        present = key in (model.written[section] if section else model.written)
        for value in [*values, *WRONG]:
            # An epsilon may be written without a point, which transformers refuses.
            if (value is not ABSENT or present) and not (key.endswith("_eps") and value == 10**30):
                model.equal_or_refused({f"{section}/{key}" if section else key: value}, key)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_keys_that_decide_together(models: dict[str, Model], kind: str) -> None:
    for changes in TOGETHER:
        models[kind].equal_or_refused(
            {key: value for key, value in changes.items() if value is not ABSENT or key in ("dtype", ROPE)},
            "config.json",
        )


def test_products_of_sizes(models: dict[str, Model]) -> None:
    for changes in TOO_LARGE:
        models["llava"].change(changes)
        got = models["llava"].ours()
        assert isinstance(got, str) and "config.json" in got


@pytest.mark.parametrize("name", SECTIONS)
def test_keys_that_decide_nothing(models: dict[str, Model], name: str) -> None:
    """All at once; and what they hold is not looked at."""
    model, (section, table, _) = model_of(models, name), SECTIONS[name]
    inert = {f"{section}/{key}" if section else key: value for key, value in INERT.items() if key not in table}
    if section != "text_config":  # at the top and in the vision tower, what only a decoder has is not read
        inert |= {
            f"{section}/{key}" if section else key: TEXT[key][0] for key in ("sliding_window", "attention_chunk_size")
        }
    model.equal_or_refused(inert, "")
    assert isinstance(model.ours(), torch.Tensor)
    for value in WRONG[2:]:
        stop = {"eos_token_id"}  # read for the stop tokens where generation_config.json has none
        model.change({key: value for key, value in inert.items() if key.split("/")[-1] not in stop})
        assert isinstance(model.ours(), torch.Tensor)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_transformers_is_known_here(name: str) -> None:
    """One that a new release brings has to be put into a table, by whether it changes logits."""
    _, table, config = SECTIONS[name]
    fields = {field.name for field in dataclasses.fields(config)}
    assert len(fields) > 15 and fields - {*table, *INERT, "text_config"} == set()
