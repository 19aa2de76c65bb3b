"""TokenPacker's projector: its forward against a loop over regions, what a token can see, and whole models with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import WITHOUT_LEARNING, copy_with_projector, make_inputs, noise, random_weights

import minifocus
from minifocus import methods
from minifocus.loading.config import load_config
from minifocus.projectors import Ends, Grid, describe, options_of
from minifocus.projectors.tokenpacker import TokenPacker, TokenPackerOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(57, 91), (100, 31), (1, 1), (1, 400), (400, 1)]
WIDTH, HIDDEN = 8, 5


def packer(scale: int, heads: int, side: int, states: int, seed: int = 0) -> TokenPacker:
    module = TokenPackerOptions(scale, heads).build(Ends(side, WIDTH, states, HIDDEN))
    random_weights(module, seed)
    return module.double()


def by_hand(module: TokenPacker, features: torch.Tensor) -> torch.Tensor:
    """Region by region and head by head, with torch's own attention layer in place of ours."""
    s, side = module.options.scale, module.side
    attention = torch.nn.MultiheadAttention(WIDTH, module.options.heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        projections = (module.q_proj, module.k_proj, module.v_proj)
        attention.in_proj_weight.copy_(torch.cat([one.weight for one in projections]))
        attention.in_proj_bias.copy_(torch.cat([one.bias for one in projections]))
    attention.out_proj = module.out_proj
    pictures = []
    for picture in features:
        tokens = []
        for row in range(0, side, s):
            for column in range(0, side, s):
                patches = torch.stack([picture[(row + y) * side + column + x] for y in range(s) for x in range(s)])
                own = patches[:, -WIDTH:]
                middle = (s - 1) / 2  # between four patches where s is even, and else a patch's own place
                near = [y * s + x for y in range(s) for x in range(s) if abs(y - middle) < 1 and abs(x - middle) < 1]
                q = module.query(own[near].mean(dim=0))[None, None]
                out = attention(q, module.key(patches)[None], module.value(patches)[None])[0]
                tokens.append(module.mlp(out)[0, 0])
        pictures.append(torch.stack(tokens))
    return torch.stack(pictures)


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("scale", [1, 2, 3, 6])
def test_forward(scale: int, heads: int, states: int) -> None:
    module = packer(scale, heads, side=6, states=states)
    features = torch.randn(3, 36, WIDTH * states, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found = module(features)
        assert module.options.grid(Ends(6, WIDTH, states, HIDDEN)) == Grid(6 // scale, 6 // scale, window=scale)
        assert found.shape == (3, (6 // scale) ** 2, HIDDEN)
        assert torch.allclose(found, by_hand(module, features), rtol=0, atol=1e-11)


def test_with_two_a_query_is_the_mean_of_its_region() -> None:
    """Interpolation to half of the side is average pooling, as the module's head says."""
    planes = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    half = F.interpolate(planes, (12, 12), mode="bilinear", align_corners=False)
    assert torch.allclose(half, F.avg_pool2d(planes, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [2, 3])
def test_a_token_sees_its_own_region_alone(scale: int) -> None:
    """Its gradient is zero at every other patch, and at every patch of the region it is not."""
    module = packer(scale, 4, side=6, states=2)
    features = torch.randn(2, 36, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    tokens, along = module(features), 6 // scale
    for number in range(along**2):
        (gradient,) = torch.autograd.grad(tokens[1, number].sum(), features, retain_graph=True)
        seen = gradient.ne(0).any(dim=-1).view(2, along, scale, along, scale)
        expected = torch.zeros_like(seen)
        expected[1, number // along, :, number % along] = True
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    module = packer(2, 4, side=6, states=2)
    features = torch.randn(1, 36, 2 * WIDTH, dtype=torch.float64)
    with torch.no_grad():
        wide, half = module(features), module.to(dtype)(features.to(dtype))
    assert half.dtype == dtype and float((half - wide).norm() / wide.norm()) < 0.03


@pytest.mark.parametrize("options", [{}, {"scale": 4, "heads": 2}])
def test_a_whole_model(plain: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """It loads, answers on top of every method, counts by the coarse grid, and what it saves is the same model."""
    folder = copy_with_projector(plain, tmp_path / "packer", {"name": "tokenpacker", **options}, [1, 2, -1])
    model, without = minifocus.load(folder, "none"), minifocus.load(plain, "none")
    assert isinstance(model.multi_modal_projector, TokenPacker)
    side = 4 // options.get("scale", 2)
    assert model.config.grid == Grid(side, side, window=4 // side)
    for size in SIZES:
        answer = model.generate(noise(*size), "what?", max_new_tokens=3)
        assert answer.tokens.full == without.num_visual_tokens(size)
        assert answer.tokens.after_vision == model.num_visual_tokens(size)
    inputs = make_inputs(model, [SIZES[:2], SIZES[2:]])
    with torch.inference_mode():
        logits = model(**inputs.arguments())
    valid = inputs.attention_mask.bool()
    assert bool(logits[valid].isfinite().all())
    model.save(tmp_path / "saved")
    again = minifocus.load(tmp_path / "saved", "none")
    with torch.inference_mode():
        assert torch.equal(again(**inputs.arguments())[valid], logits[valid])
    for name in methods.names():
        model.set_sampler(name, **WITHOUT_LEARNING.get(name, {}))
        for answer in model.generate_batch([noise(*size) for size in SIZES], ["what?"] * len(SIZES), max_new_tokens=2):
            assert answer.tokens.after_text <= answer.tokens.after_vision <= answer.tokens.full


@pytest.mark.parametrize(
    ("projector", "words"),
    [
        ({"scale": 3}, "scale: expected a divisor of the 4 patches along a view's side, got 3"),
        ({"scale": 0}, "scale: expected a whole number from 1 to 1024, got 0"),
        ({"scale": 10**400}, "scale: expected a whole number from 1 to 1024, got a whole number of"),
        ({"scale": "2"}, "scale: expected a whole number from 1 to 1024, got '2'"),
        ({"heads": 3}, "heads: expected a divisor of the tower's width 16, got 3"),
        ({"heads": False}, "heads: expected a whole number from 1 to 1024, got False"),
        ({"window": 2}, "window: not an option of projector 'tokenpacker'; its options: heads, scale"),
    ],
)
def test_bad_options(plain: Path, tmp_path: Path, projector: dict[str, Any], words: str) -> None:
    members = json.loads((plain / "config.json").read_text()) | {"projector": {"name": "tokenpacker", **projector}}
    (tmp_path / "config.json").write_text(json.dumps(members))
    with pytest.raises(minifocus.CheckpointError) as found:
        load_config(tmp_path)
    assert str(found.value).startswith(f"{tmp_path / 'config.json'}: projector: {words}")


def test_a_width_beyond_any_computer_s_is_refused(plain: Path, tmp_path: Path) -> None:
    members = json.loads((plain / "config.json").read_text()) | {"projector": {"name": "tokenpacker"}}
    members["vision_config"]["hidden_size"] = 2**20
    (tmp_path / "config.json").write_text(json.dumps(members))
    with pytest.raises(minifocus.CheckpointError, match="config.json: projector: name: expected layers of at most"):
        load_config(tmp_path)


def test_options_come_back() -> None:
    for options in (TokenPackerOptions(), TokenPackerOptions(3, 4)):
        assert options_of(describe(options)) == options
