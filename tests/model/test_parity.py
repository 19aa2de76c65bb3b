"""Logits, greedy tokens and loading equal to transformers', on small random models that transformers saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAYOUTS, build, make_inputs, save

import minifocus
from minifocus.inputs.model_inputs import split_pixels

SIZES = {"wide": (30, 90), "tall": (100, 31), "square": (50, 50), "odd": (57, 91), "sliver": (1, 400)}
TOLERANCE = 1e-5


@torch.inference_mode()
def compare(
    folder: Path, oracle: Any, rows: list[list[tuple[int, int]]], side: str = "left", tolerance: float = TOLERANCE
) -> None:
    """Same logits wherever there is a token."""
    model = minifocus.load(folder, sampler="none")
    inputs = make_inputs(model, rows, side=side)
    arguments = inputs.arguments()
    arguments["pixel_values"] = arguments["pixel_values"].to(model.dtype)
    expected = oracle(**arguments).logits.float()
    got = model(**inputs.arguments()).float()
    present = inputs.attention_mask.bool()
    assert got.shape == expected.shape
    assert 2 < expected[present].std() < 10  # the tolerance is for logits of this size
    assert (got - expected)[present].abs().max() <= tolerance
    assert got[present].isfinite().all()


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names(tmp_path: Path, layout: str, kind: str) -> None:
    oracle = build(kind)
    compare(save(oracle, tmp_path, layout), oracle, [[SIZES["odd"]]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards(tmp_path: Path, layout: str) -> None:
    oracle = build()
    compare(save(oracle, tmp_path, layout, shards=3), oracle, [[SIZES["wide"]]])


@pytest.mark.parametrize("name", SIZES)
def test_picture_shapes(tmp_path: Path, name: str) -> None:
    oracle = build()
    compare(save(oracle, tmp_path), oracle, [[SIZES[name]]])


@pytest.mark.parametrize("pinpoints", [[[56, 56]], [[28, 28], [28, 56], [56, 28], [56, 56], [84, 84], [112, 28]]])
def test_pinpoints(tmp_path: Path, pinpoints: list[list[int]]) -> None:
    oracle = build(image_grid_pinpoints=pinpoints)
    compare(save(oracle, tmp_path), oracle, [[SIZES["odd"], SIZES["tall"]]])


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_mixed_sizes_and_counts(tmp_path: Path, side: str, kind: str) -> None:
    oracle = build(kind)
    rows = [[SIZES["square"]], [SIZES["wide"], SIZES["tall"]], [], [SIZES["odd"], SIZES["sliver"], SIZES["square"]]]
    compare(save(oracle, tmp_path), oracle, rows, side)


VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": dict(text_num_key_value_heads=4),
    "grouped 8:1": dict(text_num_attention_heads=8, text_num_key_value_heads=1),
    "head size of its own": dict(text_head_dim=12),
    "biases": dict(text_attention_bias=True, text_mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "rope linear": dict(text_rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=5e4)),
    "rope llama3": dict(
        text_rope_parameters=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=1e3,
            original_max_position_embeddings=64,
        )
    ),
    "several feature layers": dict(vision_feature_layer=[-2, -1, 1]),
    "last feature layer": dict(vision_feature_layer=-1),
    "projector without bias": dict(multimodal_projector_bias=False),
    "other activations": dict(vision_hidden_act="gelu", projector_hidden_act="gelu_pytorch_tanh", text_hidden_act="gelu"),
    "epsilon": dict(text_rms_norm_eps=1e-2, vision_layer_norm_eps=1e-2),
    "mistral": dict(text_model_type="mistral", text_sliding_window=None),
    "head count that does not divide": dict(text_hidden_size=40, text_num_attention_heads=5, text_num_key_value_heads=5),
    "patches that do not fill the tile": dict(vision_image_size=30, image_grid_pinpoints=[[30, 60], [60, 60]]),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path: Path, name: str) -> None:
    oracle = build(**VARIANTS[name])
    compare(save(oracle, tmp_path), oracle, [[SIZES["odd"]], [SIZES["wide"]]])


def test_a_sliding_window_is_as_long_as_a_sequence_may_be(tmp_path: Path) -> None:
    """Up to it, a decoder with one computes what one without does (bakLLaVA: 4096 of 32768 positions)."""
    odd = [[SIZES["odd"]]]
    plain = minifocus.load(save(build("llava"), tmp_path / "plain"), sampler="none")
    length = make_inputs(plain, odd).input_ids.shape[1]
    for window in (length, length - 1):
        oracle = build("llava", text_model_type="mistral", text_sliding_window=window)
        folder = save(oracle, tmp_path / str(window))
        if window == length:
            compare(folder, oracle, odd)
        else:
            with pytest.raises(
                minifocus.InputError, match=f"takes {length} .* more than the context length of {window}"
            ):
                compare(folder, oracle, odd)


def test_class_token_kept(tmp_path: Path) -> None:
    oracle = build("llava", vision_feature_select_strategy="full")
    compare(save(oracle, tmp_path), oracle, [[SIZES["odd"]]])


@pytest.mark.parametrize("where", ["top", "text"])
def test_tied_head_of_llava_15(tmp_path: Path, where: str) -> None:
    oracle = build("llava", **{"tie_word_embeddings" if where == "top" else "text_tie_word_embeddings": True})
    compare(save(oracle, tmp_path), oracle, [[SIZES["odd"]]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.03)])
def test_half_precision(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Within a few units in the last place of logits of up to 10, and the stored dtype is kept."""
    oracle = build(dtype=dtype)
    compare(save(oracle, tmp_path), oracle, [[SIZES["odd"]]], tolerance=tolerance)
    assert minifocus.load(tmp_path, sampler="none").dtype == dtype
    assert minifocus.load(tmp_path, sampler="none", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.inference_mode()
def test_greedy_tokens(tmp_path: Path, kind: str) -> None:
    """Thirty tokens, decoded with the cache, for rows of different lengths."""
    oracle = build(kind, seed=3)
    model = minifocus.load(save(oracle, tmp_path), sampler="none")
    inputs = make_inputs(model, [[SIZES["square"]], [SIZES["wide"], SIZES["tall"]], [SIZES["odd"]]], seed=5)
    expected = oracle.generate(**inputs.arguments(), do_sample=False, max_new_tokens=30, eos_token_id=None)
    assert torch.equal(greedy(model, inputs, 30), expected[:, inputs.input_ids.shape[1] :])


def greedy(model: minifocus.Llava, inputs: Any, count: int) -> torch.Tensor:
    """Prefill and cached decoding at the level of token ids."""
    from minifocus.llama import LayerCache

    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    rows, pictures = model.embed(inputs.input_ids, model.encode_pictures(tiles, sizes), inputs.attention_mask)
    caches = [LayerCache() for _ in model.language_model.model.layers]
    rows = model.prefill(rows, pictures, caches).rows
    hidden, positions = rows.hidden[:, -1], rows.positions[:, -1]
    tokens = []
    for _ in range(count):
        tokens.append(model.language_model.lm_head(hidden).argmax(dim=-1))
        positions = positions + 1
        hidden = model.language_model.model.decode(tokens[-1], positions, caches)
    return torch.stack(tokens, dim=1)
