"""Folders that cannot be loaded: the error names the file and the key, quickly, and nothing is left half-loaded."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_tokenizer, build, save
from safetensors.torch import load_file, save_file

import minifocus

pytestmark = pytest.mark.timeout(30)  # a bad file must not hang


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(), tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(), tmp_path_factory.mktemp("sharded"), shards=2)


def copy(source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return copy(original, tmp_path / "m")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return copy(sharded, tmp_path / "m")


def refused(folder: Path, *parts: str, **options: Any) -> None:
    """Loading fails with a CheckpointError whose text holds every part."""
    with pytest.raises(minifocus.CheckpointError) as error:
        minifocus.load(folder, sampler="none", **options)
    for part in parts:
        assert part in str(error.value), str(error.value)


def change_config(folder: Path, **changes: Any) -> None:
    """Set (or, with None, remove) keys of config.json; text_* and vision_* go to the inner sections."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        section = config
        for prefix in ("text", "vision"):
            if key.startswith(prefix + "_") and not key.startswith("vision_feature") and not key.endswith("_config"):
                section, key = config[f"{prefix}_config"], key.removeprefix(prefix + "_")
        if value is ABSENT:
            section.pop(key, None)
        else:
            section[key] = value
    file.write_text(json.dumps(config))


ABSENT = object()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_the_good_one_loads(folder: Path, shards: Path) -> None:
    minifocus.load(folder, sampler="none")
    minifocus.load(shards, sampler="none")


# ---- files ----


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "found nothing")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file", "found a file")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json", "no such file")


@pytest.mark.parametrize("text", ["{", "[1]", "", "nul", '"x"', "[" * 100_000, b"\xff\xfe{}"])
def test_config_that_is_not_a_json_object(folder: Path, text: str | bytes) -> None:
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(folder, "config.json", "JSON")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "pytorch_model.bin", "convert")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors", "not readable as safetensors")


def test_header_that_lies(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    refused(folder, "model.safetensors", "not readable")

    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    first, second = [key for key in header if key != "__metadata__"][:2]

    def write(changed: dict[str, Any]) -> None:
        raw = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    write({**header, second: {**header[second], "data_offsets": header[first]["data_offsets"]}})  # overlapping
    refused(folder, "model.safetensors", "not readable")
    write({**header, first: {**header[first], "dtype": "F99"}})
    refused(folder, "model.safetensors", "not readable")


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "model.safetensors: expected a file, found a folder")


# ---- the index ----


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    refused(shards, "model-00002-of-00002.safetensors", "index.json", "not there")


@pytest.mark.parametrize("value", [ABSENT, {}, [], "model.safetensors", None])
def test_index_without_a_weight_map(shards: Path, value: Any) -> None:
    change_index(shards, lambda index: index.pop("weight_map") if value is ABSENT else index.update(weight_map=value))
    refused(shards, "model.safetensors.index.json", "weight_map")


OUT_OF_THE_FOLDER = ["../outside.safetensors", "x/../../outside.safetensors", "..", ".", "", "a\0b", 7, None, ["x"]]


@pytest.mark.parametrize("name", [*OUT_OF_THE_FOLDER, "/absolute", "..\\outside.safetensors", "C:outside.safetensors"])
def test_index_that_leads_out_of_the_folder(shards: Path, tmp_path: Path, name: Any) -> None:
    """transformers loads `../x`; a checkpoint must not read what is beside it."""
    outside, inside = tmp_path / "outside.safetensors", shards / "model-00001-of-00002.safetensors"
    outside.write_bytes(inside.read_bytes())
    inside.unlink()
    name = str(outside) if name == "/absolute" else name
    change_index(
        shards, lambda i: i["weight_map"].update({k: name for k, v in i["weight_map"].items() if v == inside.name})
    )
    refused(shards, "model.safetensors.index.json: weight_map: expected names of files in")


def linked(source: Path, target: Path, where: Callable[[str], Path]) -> Path:
    """A folder of links to where each file of `source` has been copied."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        there = where(file.name)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(file.read_bytes())
        (target / file.name).symlink_to(there)
    return target


@pytest.mark.parametrize("how", ["hub cache", "anywhere", "Kubernetes", "chain", "the folder itself"])
def test_links_are_followed_wherever_they_lead(sharded: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "m"
    if how == "hub cache":
        folder = linked(sharded, tmp_path / "snapshots/abc", lambda name: tmp_path / "blobs" / name)
    elif how == "anywhere":
        linked(sharded, folder, lambda name: tmp_path / f"store of {name}" / "content")
    elif how == "Kubernetes":
        copy(sharded, tmp_path / "copy").rename(folder)
        (folder / "..2024").mkdir()
        (folder / "..data").symlink_to("..2024")
        for file in [file for file in folder.iterdir() if file.is_file()]:
            file.rename(folder / "..2024" / file.name)
            file.symlink_to(Path("..data") / file.name)
    elif how == "chain":
        linked(
            linked(sharded, tmp_path / "a", lambda name: tmp_path / "b" / name),
            folder,
            lambda name: tmp_path / "a" / name,
        )
    else:
        folder.symlink_to(sharded)
    minifocus.load(folder, sampler="none")


# Every file that is opened, with what has to be away before it is.
OPENED: dict[str, list[str]] = {
    "config.json": [], "generation_config.json": [], "model.safetensors": [],
    "model.safetensors.index.json": ["model.safetensors"],
    "tokenizer.json": [], "tokenizer.model": ["tokenizer.json"], "tokenizer_config.json": [], "special_tokens_map.json": [],
    "added_tokens.json": [], "processor_config.json": [], "preprocessor_config.json": [], "selector.safetensors": [],
    "model-00001-of-00002.safetensors": ["model.safetensors"],
}  # fmt: skip


@pytest.mark.parametrize(
    "what", ["a FIFO", "a device", "a socket", "a folder", "a link that leads nowhere", "symbolic links"]
)
@pytest.mark.parametrize("link", [False, True], ids=["there", "by a link"])
def test_anything_but_a_file_is_refused_at_once(
    original: Path, sharded: Path, tmp_path: Path, what: str, link: bool
) -> None:
    """A FIFO would be waited for and a device read for ever. What is there is never the same as an absent file."""
    odd = tmp_path / "odd"
    for name, away in OPENED.items():
        folder = copy(sharded if name.startswith("model-") else original, tmp_path / name.replace(".", "_"))
        add_tokenizer(folder)
        (folder / "tokenizer.model").write_bytes(b"")  # of no use, and not to be taken for a tokenizer.json that is odd
        for absent in (*away, name):
            (folder / absent).unlink(missing_ok=True)
        place(what, odd if link else folder / name)
        if link:
            (folder / name).symlink_to(odd)
        with pytest.raises(minifocus.CheckpointError, match=rf"{name}: expected a file, found .*{what}"):
            minifocus.load(folder, sampler="vision" if name.startswith("selector") else "none")
        if name.startswith("selector"):
            with pytest.raises(minifocus.InputError, match="selector: expected 'variance' or a selector's file"):
                minifocus.load(original, sampler="vision", selector=folder / name)
    with pytest.raises(minifocus.CheckpointError, match="odd: expected the folder of a model, found"):
        place("a FIFO" if what == "a folder" else what, odd)
        minifocus.load(odd)


def place(what: str, path: Path) -> None:
    path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a socket":
        # By its folder's descriptor: a socket's whole path may have some 100 characters.
        descriptor = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        os.close(descriptor)
    elif what == "a folder":
        path.mkdir()
    else:
        path.symlink_to({"a device": "/dev/zero", "symbolic links": path.name}.get(what, "nowhere"))


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "\ud800", "a/" * 3000])
def test_paths_that_are_none(folder: Path, path: str) -> None:
    with pytest.raises(
        minifocus.CheckpointError, match="expected the folder of a model, found a name that cannot be used"
    ) as error:
        minifocus.load(path)
    assert len(str(error.value)) < 500
    with pytest.raises(minifocus.InputError, match="selector: expected 'variance' or a selector's file") as wrong:
        minifocus.load(folder, "vision", selector=path)
    assert len(str(wrong.value)) < 500


def test_a_json_file_of_any_length_is_not_read_into_memory(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**34)  # which takes no room on the disk
    refused(folder, "config.json: expected at most 33554432 bytes, found more")


def test_one_tensor_in_two_shards(shards: Path) -> None:
    first, second = sorted(shards.glob("model-*.safetensors"))
    tensors = load_file(second)
    key, value = next(iter(load_file(first).items()))
    save_file({**tensors, key: value}, second)
    refused(shards, second.name, key, "the same tensor")


def test_one_tensor_under_two_names(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"model.image_newline": t["image_newline"].clone()}))
    refused(folder, "image_newline", "the same tensor as")


# ---- names, shapes, values ----


def test_every_mismatch_in_one_message(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["multi_modal_projector.linear_1.weight"], tensors["language_model.model.norm.weight"]
        tensors["language_model.model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
        tensors["image_newline"] = torch.ones(31)

    change_weights(folder, change)
    refused(
        folder, str(folder), "missing: language_model.model.norm.weight, multi_modal_projector.linear_1.weight",
        "unexpected: language_model.model.layers.0.self_attn.q_norm.weight", "image_newline: expected (32,), found (31,)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(text_num_hidden_layers=3), ["text_config.num_hidden_layers", "3 layers", "hold 4"]),
        (dict(text_num_hidden_layers=5), ["text_config.num_hidden_layers", "5 layers", "hold 4"]),
        (dict(text_num_hidden_layers=2**26), ["text_config.num_hidden_layers", "hold 4"]),
        (
            dict(vision_num_hidden_layers=2, vision_feature_layer=-1),
            ["vision_config.num_hidden_layers", "2 layers", "hold 3"],
        ),
        (dict(text_vocab_size=95), ["embed_tokens.weight: expected (95, 32), found (96, 32)", "lm_head"]),
        (dict(text_vocab_size=2**26), ["embed_tokens.weight: expected (67108864, 32), found (96, 32)"]),
        (dict(text_intermediate_size=2**26), ["gate_proj.weight: expected (67108864, 32)"]),
        (dict(vision_patch_size=14), ["patch_embedding.weight"]),
        (dict(text_attention_bias=True), ["missing", "q_proj.bias"]),
    ],
)
def test_config_that_does_not_fit_the_weights(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    change_config(folder, **changes)
    refused(folder, *parts)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.uint8, torch.float64])
def test_dtypes_that_are_not_weights(folder: Path, dtype: torch.dtype) -> None:
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda t: t.update({key: t[key].to(dtype)}))
    refused(folder, key, "not of dtype F32, BF16, F16")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    key = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    change_weights(folder, lambda t: t[key].view(-1)[5].fill_(value))
    refused(folder, "model.safetensors", key, "NaN or infinite")
    minifocus.load(folder, sampler="none", check_finite=False)


def test_values_that_overflow_the_dtype_asked_for(folder: Path) -> None:
    change_weights(folder, lambda t: t["image_newline"].fill_(1e30))
    minifocus.load(folder, sampler="none")
    refused(folder, "image_newline", "float16", dtype="float16")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 3e-9, 1e-7])
def test_matrices_that_vanish_in_float16(folder: Path, stored: torch.dtype, size: float) -> None:
    """All to zero, or to one of few values. Other dtypes hold them, and float16 itself, if they were stored in it."""
    key = "vision_tower.embeddings.patch_embedding.weight"
    change_weights(folder, lambda t: t.update({key: (t[key] * size).to(stored)}))
    refused(folder, "model.safetensors", key, "too small for torch.float16", "bfloat16", dtype="float16")
    refused(folder, key, dtype="float16", check_finite=False)
    for dtype in ("float32", "bfloat16"):
        assert minifocus.load(folder, sampler="none", dtype=dtype).vision_tower.embeddings.patch_embedding.weight.any()
    change_weights(folder, lambda t: t.update({key: t[key].half()}))
    minifocus.load(folder, sampler="none", dtype="float16")


def test_what_may_vanish_in_float16(folder: Path) -> None:
    """Vectors, zeros, and small values beside usual ones."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        layer = "vision_tower.encoder.layers.0."
        tensors[f"{layer}self_attn.k_proj.bias"].mul_(1e-9)
        tensors[f"{layer}mlp.fc1.weight"].zero_()
        tensors[f"{layer}mlp.fc2.weight"][1:].mul_(1e-9)
        tensors["language_model.lm_head.weight"].mul_(1e-5)

    change_weights(folder, change)
    minifocus.load(folder, sampler="none", dtype="float16")


@pytest.mark.parametrize("place", [0, 2**22 - 1, 2**22, -1])
def test_one_value_tells_that_a_large_tensor_does_not_vanish(place: int) -> None:
    from minifocus.loading.weights import _vanishes

    large = torch.full((2, 2**21 + 3), 1e-9)
    assert _vanishes(large, large.half())
    large.view(-1)[place] = 1.0
    assert not _vanishes(large, large.half())


def test_tied_head_that_is_not(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    refused(folder, "tie_word_embeddings", "lm_head")
    change_weights(
        folder,
        lambda t: t.update({"language_model.lm_head.weight": t["language_model.model.embed_tokens.weight"].clone()}),
    )
    model = minifocus.load(folder, sampler="none")
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


def test_untied_head_that_is_missing(folder: Path) -> None:
    change_weights(folder, lambda t: t.pop("language_model.lm_head.weight"))
    refused(folder, "missing: language_model.lm_head.weight")


def test_old_buffers_are_ignored(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_weights(folder, change)
    minifocus.load(folder, sampler="none")


# ---- config.json ----


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(model_type=ABSENT), ["model_type: expected one of llava, llava_next"]),
        (dict(model_type="qwen2_vl"), ["model_type", "llava, llava_next", "qwen2_vl"]),
        (dict(model_type=["llava"]), ["model_type"]),
        (dict(text_model_type="qwen2"), ["text_config.model_type: expected one of llama, mistral, got 'qwen2'"]),
        (dict(vision_model_type="siglip_vision_model"), ["vision_config.model_type", "clip_vision_model", "siglip"]),
        (dict(text_num_hidden_layers=0), ["text_config.num_hidden_layers", "got 0"]),
        (dict(text_num_hidden_layers=-1), ["text_config.num_hidden_layers", "got -1"]),
        (dict(text_num_hidden_layers=10**12), ["text_config.num_hidden_layers", "got 1000000000000"]),
        (dict(text_hidden_size="32"), ["text_config.hidden_size: expected a whole number", "'32'"]),
        (dict(text_hidden_size=True), ["text_config.hidden_size", "True"]),
        (dict(text_hidden_size=32.0), ["text_config.hidden_size", "32.0"]),
        (dict(text_num_key_value_heads=3), ["num_key_value_heads: expected a divisor of num_attention_heads (4), got 3"]),
        (dict(text_head_dim=7), ["head_dim: expected an even number"]),
        (dict(text_hidden_act="swiglu"), ["text_config.hidden_act: expected one of gelu", "swiglu"]),
        (dict(vision_hidden_act=[]), ["vision_config.hidden_act"]),
        (dict(projector_hidden_act="x"), ["projector_hidden_act"]),
        (dict(text_rms_norm_eps=-1), ["rms_norm_eps: expected a positive number, got -1"]),
        (dict(text_rope_parameters={"rope_type": "yarn"}), ["rope_parameters.rope_type", "default, linear, llama3", "yarn"]),
        (dict(text_rope_scaling={"type": "dynamic", "factor": 2}), ["text_config.rope_scaling", "dynamic"]),
        (dict(text_rope_parameters={"rope_type": "linear"}), ["rope_parameters.factor: expected a positive", "got no such key"]),
        (dict(text_rope_parameters={"rope_type": "llama3", "factor": 2}), ["low_freq_factor"]),
        (dict(text_rope_parameters={"partial_rotary_factor": 0.5}), ["partial_rotary_factor"]),
        (dict(text_rope_parameters=3), ["rope_parameters: expected an object, got 3"]),
        (dict(text_model_type="mistral", text_sliding_window=0), ["text_config.sliding_window: expected", "got 0"]),
        (dict(text_model_type="mistral", text_sliding_window="all"), ["text_config.sliding_window: expected", "'all'"]),
        (dict(text_config=[1]), ["text_config: expected an object"]),
        (dict(image_token_index=96), ["image_token_index: expected less than text_config.vocab_size (96), got 96"]),
        (dict(image_token_index=-1), ["image_token_index"]),
        (dict(vision_feature_layer=5), ["vision_feature_layer: expected whole numbers from -4 to 3, got 5"]),
        (dict(vision_feature_layer=[]), ["vision_feature_layer"]),
        (dict(vision_feature_layer=[-2, "x"]), ["vision_feature_layer"]),
        (dict(vision_feature_select_strategy="full"), ["vision_feature_select_strategy", "'default'"]),
        (dict(vision_feature_select_strategy="cls"), ["vision_feature_select_strategy"]),
        (dict(image_grid_pinpoints=[]), ["image_grid_pinpoints"]),
        (dict(image_grid_pinpoints=[[28, 57]]), ["image_grid_pinpoints", "multiples of the tile size 28", "57"]),
        (dict(image_grid_pinpoints=[[0, 28]]), ["image_grid_pinpoints"]),
        (dict(image_grid_pinpoints=[28, 56]), ["image_grid_pinpoints"]),
        (dict(vision_num_channels=4), ["vision_config.num_channels: expected 3, got 4"]),
        (dict(dtype="int8"), ["dtype: expected one of float32, bfloat16, float16, got 'int8'"]),
        (dict(quantization_config={"bits": 4}), ["quantization_config", "not supported"]),
        (dict(tie_word_embeddings="no"), ["tie_word_embeddings: expected true or false, got 'no'"]),
        (dict(eos_token_id="</s>"), ["eos_token_id"]),
    ],
)  # fmt: skip
def test_config_values(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    change_config(folder, **changes)
    if "eos_token_id" in changes:
        (folder / "generation_config.json").unlink()
    refused(folder, "config.json", *parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [0, 2**22 - 1, 2**22, -1])
def test_values_are_looked_for_in_every_part_of_a_large_tensor(place: int, dtype: torch.dtype) -> None:
    from minifocus.loading.finite import is_finite

    large = torch.full((2, 2**21 + 3), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(large)  # though a sum of as many is too large for its type
    for value in (torch.inf, -torch.inf, torch.nan):
        large.view(-1)[place] = value
        assert not is_finite(large)
        large.view(-1)[place - 3] = -torch.inf  # one takes the other away
        assert not is_finite(large)
        large.fill_(0.01)


def test_the_original_repository_s_folder_is_named_as_such(folder: Path) -> None:
    """Its keys are flat (here the first of liuhaotian/llava-v1.5-7b): with defaults for the rest it would be another model."""
    flat = {"model_type": "llava", "hidden_size": 4096, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (folder / "config.json").write_text(json.dumps(flat))
    refused(folder, "config.json", "the original LLaVA repository", "expected a folder in Hugging Face's format")


def test_a_window_of_mistral_is_the_context(folder: Path) -> None:
    """An absent key is one of 4096; the rotary embedding goes by the positions that it was trained on."""
    from minifocus.loading.config import load_config

    llama3 = {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}
    change_config(folder, text_model_type="mistral", text_max_position_embeddings=8192, text_rope_parameters=llama3)
    for window, context in ((ABSENT, 4096), (None, 8192), (100, 100), (9000, 8192)):
        change_config(folder, text_sliding_window=window)
        text = load_config(folder).text
        assert text.max_position_embeddings == context and text.rope.original_max_position_embeddings == 8192


def test_defaults_of_an_absent_and_of_a_partial_vision_config(folder: Path) -> None:
    """ViT-L/14-336 when the section is absent, CLIP's own B/32 when it is there but says nothing."""
    from minifocus.loading.config import load_config

    change_config(folder, vision_config=ABSENT, image_grid_pinpoints=ABSENT, text_num_key_value_heads=ABSENT)
    config = load_config(folder)
    assert (config.vision.hidden_size, config.vision.image_size, config.vision.patch_size) == (1024, 336, 14)
    assert config.text.num_key_value_heads == config.text.num_attention_heads == 4
    assert config.grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    change_config(folder, vision_config={}, image_grid_pinpoints=[[224, 448]])
    config = load_config(folder)
    assert (config.vision.hidden_size, config.vision.image_size, config.vision.patch_size) == (768, 224, 32)


def test_older_rope_scaling_wins_over_rope_parameters(folder: Path) -> None:
    from minifocus.loading.config import RopeConfig, load_config

    llama3 = {"type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}
    change_config(folder, text_rope_theta=7.0, text_rope_scaling=llama3)
    assert load_config(folder).text.rope == RopeConfig("llama3", 7.0, 2.0, 1.0, 4.0, 4096)
    change_config(
        folder, text_rope_scaling=None, text_rope_parameters={"rope_type": "linear", "factor": 3, "rope_theta": 9}
    )
    assert load_config(folder).text.rope == RopeConfig("linear", 9.0, 3.0)


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="float99"), "dtype: expected one of float32, bfloat16, float16, int8, int4, got 'float99'"),
        (dict(dtype=torch.int8), "dtype: expected one of"),
        (dict(device="abacus"), "device: 'abacus' is not usable here"),
        (dict(device="cuda:99"), "device: 'cuda:99' is not usable here"),
        (dict(device=None), "device: None is not usable here"),
        (dict(folder=None), "folder: expected a path, got None"),
    ],
)
def test_wrong_arguments(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        minifocus.load(**{"folder": folder, "sampler": "none", **options})


def test_loading_leaves_other_threads_their_initialisation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that another thread makes while a model is loaded get their random values, on their own device."""
    made: list[torch.nn.Linear] = []

    class Watched(minifocus.Llava):
        def __init__(self, *arguments: Any):
            thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(64, 64)))
            thread.start()
            thread.join()
            super().__init__(*arguments)

    monkeypatch.setattr(sys.modules[minifocus.Llava.__module__], "Llava", Watched)
    minifocus.load(folder, sampler="none")
    (linear,) = made
    assert linear.weight.device.type == "cpu" and 0.05 < float(linear.weight.detach().std()) < 0.1  # 1/8/√3


def test_progress_ends_at_the_whole(folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    minifocus.load(folder, sampler="none", progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
