"""Folders with int8 and int4 weights: made on loading, written, loaded again by mapping, and refused where they are wrong."""

from __future__ import annotations

import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_tokenizer, build, make_inputs, save
from forked import python
from safetensors.torch import load_file, save_file

import minifocus
from minifocus.quantized import Int4Linear, Int8Linear, QuantizedLinear
from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions
from minifocus.training.parts import load_to_train

ROOT = Path(__file__).resolve().parents[2]
LAYER = "language_model.model.layers.1.mlp.up_proj."
# Of int4's size in all but the second half of the MLP.
SIZES = dict(text_hidden_size=128, text_intermediate_size=192, text_num_attention_heads=4, text_head_dim=32)
KINDS = ["int8", "int4"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build(seed=3, dtype=torch.bfloat16, **SIZES), tmp_path_factory.mktemp("dense"))
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    minifocus.load(dense, "none", dtype=request.param).save(folder)
    return request.param, folder


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture
def folder(written: tuple[str, Path], tmp_path: Path) -> Path:
    return copy(written[1], tmp_path / "m")


def layers_of(model: minifocus.Llava) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@torch.inference_mode()
def logits_of(model: minifocus.Llava, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).float()


def logits(model: minifocus.Llava) -> torch.Tensor:
    return logits_of(model, make_inputs(model, [[(57, 91)], [(30, 90), (100, 31)]], seed=1).arguments())


def with_values_of(model: minifocus.Llava, dense: Path, target: Path) -> minifocus.Llava:
    """The dense folder with the values that the model's layers stand for, in float32."""
    copy(dense, target)
    tensors = {name: value.float() for name, value in load_file(dense / "model.safetensors").items()}
    for name, layer in layers_of(model).items():
        tensors[f"{name}.weight"] = layer.multiply(torch.eye(layer.in_features)).T.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return minifocus.load(target, "none", dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_that_of_its_values(kind: str, dense: Path, tmp_path: Path) -> None:
    """Logits are those of a float32 model with these values, as far as bfloat16 goes: no further off than a bfloat16 model."""
    model = minifocus.load(dense, "none", dtype=kind)
    exact = logits(with_values_of(model, dense, tmp_path / "values"))
    half = logits(minifocus.load(tmp_path / "values", "none", dtype="bfloat16"))
    found = logits(model)
    valid = exact.isfinite()

    def off(other: torch.Tensor) -> float:
        return float((other - exact)[valid].pow(2).mean().sqrt())

    assert off(found) < 1.5 * off(half) + 1e-3 and off(found) < 0.05 * float(exact[valid].std())


@pytest.mark.parametrize("kind", KINDS)
def test_which_parts_are_quantised(kind: str, dense: Path) -> None:
    model = minifocus.load(dense, "none", dtype=kind)
    found = {name: type(layer) for name, layer in layers_of(model).items()}
    linear = {
        f"language_model.model.layers.{n}.{name}_proj"
        for n in range(4)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert found.keys() == linear | {"language_model.lm_head"}
    assert found.pop("language_model.lm_head") is Int8Linear
    assert set(found.values()) == {Int8Linear if kind == "int8" else Int4Linear}
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16} == {model.dtype}
    assert not any(value.requires_grad for value in model.parameters())


def test_sizes_that_int4_does_not_take_become_int8(tmp_path: Path) -> None:
    sizes = dict(SIZES, text_intermediate_size=200)  # 64 divides no side of the MLP
    model = minifocus.load(save(build("llava", seed=4, **sizes), tmp_path), "none", dtype="int4")
    found = {name.split(".")[-1]: type(layer) for name, layer in layers_of(model).items()}
    assert {name for name, kind in found.items() if kind is Int4Linear} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert logits(model)[0].isfinite().any()


@pytest.mark.parametrize("layout", ["hub", "original"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True),
        dict(text_attention_bias=True, text_mlp_bias=True),
        dict(text_model_type="mistral", text_num_attention_heads=8, text_num_key_value_heads=2),
    ],
    ids=["tied", "biases", "mistral"],
)
def test_written_and_loaded_again(layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """From float32 in shards with other names; twice over, bit for bit, and with the files that came along."""
    for kind in KINDS:
        source = save(build("llava", seed=5, **(SIZES | changes)), tmp_path / f"{kind} source", layout, shards=2)
        add_tokenizer(source)
        model = minifocus.load(source, "none", dtype=kind)
        model.save(tmp_path / kind)
        again = minifocus.load(tmp_path / kind, "none", dtype=None if kind == "int8" else kind)
        assert torch.equal(logits(model).nan_to_num(), logits(again).nan_to_num())
        again.save(tmp_path / f"{kind} again")
        for file in (tmp_path / kind).iterdir():
            assert file.read_bytes() == (tmp_path / f"{kind} again" / file.name).read_bytes()
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["quantization"] == {"weights": kind} and config["dtype"] == "bfloat16"
        assert (tmp_path / kind / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        head = "language_model.lm_head.weight" in load_file(tmp_path / kind / "model.safetensors")
        assert head is not bool(changes.get("tie_word_embeddings"))


def test_a_written_folder_is_mapped(written: tuple[str, Path]) -> None:
    """Every tensor begins where instructions want it, in the file and so in memory: none is copied."""
    _, folder = written
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"} and (8 + length) % 64 == 0
    places = sorted(entry["data_offsets"] for entry in header.values())
    assert places[0][0] == 0 and places[-1][1] == len(content) - 8 - length
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in header.values() if entry["dtype"] in ("I8", "U8"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        model = minifocus.load(folder, "none")
        ranges = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in maps.read_text().splitlines()
            if line.endswith(str(file))
        ]
        for layer in layers_of(model).values():
            for value in (layer.weight, layer.weight_scale):
                assert any(begin <= value.data_ptr() < end for begin, end in ranges)


def test_samplers_answer(folder: Path) -> None:
    """Those that call a layer's projections themselves among them, and a learned one; with gradients enabled, too."""
    save_selector(folder / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions())
    for sampler, options in (("text", {}), ("focus", {}), ("fastv", {"layer": 1, "ratio": 0.5})):
        model = minifocus.load(folder, sampler, **options)
        assert len(model.generate(None, "What is it?", max_new_tokens=4).token_ids) > 0
        inputs = make_inputs(model, [[(57, 91)]]).arguments()
        assert torch.equal(model(**inputs).float().nan_to_num(), logits_of(model, inputs).nan_to_num())


def test_transformers_refuses_it(written: tuple[str, Path]) -> None:
    """It knows nothing of the key in config.json, and takes whole numbers for weights where shapes are its own."""
    from transformers import LlavaNextForConditionalGeneration

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlavaNextForConditionalGeneration.from_pretrained(written[1])


# ---- refused ----


def refused(folder: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(minifocus.CheckpointError) as error:
        minifocus.load(folder, "none", **options)
    for part in parts:
        assert part in str(error.value), str(error.value)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(f"{LAYER}weight_scale"), ["missing", "weight_scale"]),
        (lambda t: t.update({f"{LAYER}weight": t[f"{LAYER}weight"].bfloat16()}), ["wrong dtype", "weight: expected"]),
        (lambda t: t.update({f"{LAYER}weight_scale": t[f"{LAYER}weight_scale"].float()}), ["expected bfloat16, found F32"]),
        (lambda t: t.update({f"{LAYER}weight": t[f"{LAYER}weight"].flatten(0, 1)}), ["wrong shape", "up_proj.weight"]),
        (lambda t: t[f"{LAYER}weight_scale"].view(-1)[0:1].zero_(), [f"{LAYER}weight_scale", "above 0"]),
        (lambda t: t[f"{LAYER}weight_scale"].view(-1)[0:1].neg_(), [f"{LAYER}weight_scale", "above 0"]),
        (lambda t: t[f"{LAYER}weight_scale"].view(-1)[-1:].fill_(torch.nan), [f"{LAYER}weight_scale", "finite"]),
        (lambda t: t[f"{LAYER}weight_scale"].view(-1)[-1:].fill_(torch.inf), [f"{LAYER}weight_scale", "finite"]),
        (lambda t: t.update({f"{LAYER}weight_zero": torch.zeros(1)}), ["unexpected", "weight_zero"]),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(folder: Path, edit: Callable[..., Any], parts: list[str]) -> None:
    change(folder, edit)
    refused(folder, *parts)


def set_key(folder: Path, key: str, value: Any) -> None:
    members = json.loads((folder / "config.json").read_text())
    members[key] = value
    (folder / "config.json").write_text(json.dumps(members))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("int8", "quantization: expected an object, got 'int8'"),
        ({"weights": "int3"}, "quantization.weights: expected one of int8, int4, got 'int3'"),
        ({"weights": "int8", "group": 32}, "quantization: expected an object with the key weights alone"),
        ({"bits": 8}, "quantization: expected an object with the key weights alone"),
    ],
)
def test_keys_that_are_not_known(folder: Path, value: Any, words: str) -> None:
    set_key(folder, "quantization", value)
    refused(folder, "config.json", words)


def test_a_config_that_says_otherwise_than_the_weights(folder: Path, dense: Path, tmp_path: Path) -> None:
    set_key(folder, "quantization", None)
    refused(folder, "quantised?", "unexpected", "weight_scale")
    plain = copy(dense, tmp_path / "plain")
    set_key(plain, "quantization", {"weights": "int8"})
    refused(plain, "missing", "weight_scale", "wrong dtype")


def test_other_dtypes_of_a_quantised_folder(written: tuple[str, Path]) -> None:
    kind, folder = written
    for dtype in ("float32", torch.bfloat16, "int4" if kind == "int8" else "int8"):
        with pytest.raises(minifocus.InputError, match=f"dtype: .* holds weights in {kind}: expected '{kind}' or None"):
            minifocus.load(folder, "none", dtype=dtype)
    with pytest.raises(minifocus.InputError, match="training, take the model that it was made of"):
        load_to_train(folder, "none", torch.device("cpu"), {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("check_finite", [True, False])
def test_values_that_cannot_be_quantised(dense: Path, tmp_path: Path, value: float, check_finite: bool) -> None:
    folder = copy(dense, tmp_path / "m")
    change(folder, lambda t: t[f"{LAYER}weight"].view(-1)[5:6].fill_(value))
    for kind in KINDS:
        refused(folder, "model.safetensors", f"{LAYER}weight", "NaN or infinite", dtype=kind, check_finite=check_finite)


def test_a_model_that_was_changed_is_not_saved(written: tuple[str, Path], tmp_path: Path) -> None:
    model = minifocus.load(written[1], "none").float()
    with pytest.raises(minifocus.InputError, match="weight_scale .*float32"):
        model.save(tmp_path / "m")
    with pytest.raises(minifocus.InputError, match="cannot be trained"):
        minifocus.load(written[1], "none").train()


# ---- memory ----

PEAK = """
import re, sys
from pathlib import Path
import torch, minifocus
torch.set_num_threads(1)
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
minifocus.load(sys.argv[1], "none", dtype="int8")  # whatever is taken once, and the libraries' own pages
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = minifocus.load(sys.argv[2], "none", dtype=sys.argv[3])
own = sum(value.nbytes for value in model.state_dict().values())
print(own, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
def test_weights_are_quantised_one_by_one(dense: Path, tmp_path: Path) -> None:
    """The peak is the new model's size and what some weights take in float32, although all 190 MB of the old are read."""
    sizes = dict(text_hidden_size=512, text_intermediate_size=4096, text_num_hidden_layers=7)
    folder = save(build("llava", seed=6, **sizes), tmp_path / "large")
    largest = 4096 * 512 * 4
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for kind in KINDS:
        command = [sys.executable, "-c", PEAK, str(dense), str(folder), kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        own, peak = map(int, done.stdout.split())
        assert peak < own + 10 * largest, (own, peak)


# ---- examples/quantize.py ----


def quantize(*words: str | Path) -> tuple[int, str]:
    done = python("examples/quantize.py", *words, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_the_command(dense: Path, tmp_path: Path) -> None:
    source = copy(dense, tmp_path / "source")
    save_selector(source / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions())
    status, said = quantize(source, "--weights", "int4", "--out", tmp_path / "new")
    assert (status, said) == (0, f"{tmp_path / 'new'}: weights in int4\n")
    assert len(minifocus.load(tmp_path / "new", "focus").generate(None, "Hm?", max_new_tokens=2).token_ids) == 2
    for words, reason in (
        ([source, "--weights", "int4", "--out", tmp_path / "source/"], "--out: expected another folder"),
        ([source, "--weights", "int4", "--out", ""], "--out: expected the name of a folder"),
        ([tmp_path / "none", "--weights", "int8", "--out", tmp_path / "x"], "found nothing"),
        ([tmp_path / "new", "--weights", "int8", "--out", tmp_path / "x"], "holds weights in int4"),
        ([source, "--weights", "int2", "--out", tmp_path / "x"], "invalid choice"),
    ):
        status, said = quantize(*words)
        assert status == 2 and said.startswith("error: ") and reason in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists()
