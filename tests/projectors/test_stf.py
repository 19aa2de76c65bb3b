"""LLaVA-STF's projector: its forward against plain loops, whole models with it, and every method on top of its grid."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import WITHOUT_LEARNING, build, copy_with_projector, make_inputs, noise, random_weights, save
from safetensors.torch import load_file, save_file

import minifocus
from minifocus import methods
from minifocus.inputs.model_inputs import split_pixels
from minifocus.loading.config import load_config
from minifocus.methods.pruning import cues as cues_of
from minifocus.methods.pruning import views as views_of
from minifocus.methods.tower_attention import class_attention
from minifocus.projectors import Ends, Grid, describe, options_of
from minifocus.projectors.stf import STF, STFOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(57, 91), (100, 31), (30, 90), (1, 1), (1, 400), (400, 1), (28, 29)]
STATES = [-1, 1, 2]


def stf(options: STFOptions, side: int, states: int, seed: int = 0, width: int = 4, hidden: int = 5) -> STF:
    module = options.build(Ends(side, width, states, hidden))
    random_weights(module, seed)
    return module.double()


# ---- the module ----


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def linear(module: Any, x: list[float]) -> list[float]:
    return (np.array(module.weight.tolist()) @ np.array(x) + np.array(module.bias.tolist())).tolist()


def by_hand(module: STF, features: torch.Tensor) -> torch.Tensor:
    """Window by window, cell by cell and channel by channel, from the paper's Eq. 1 and 2 and its Table 1."""
    options, side, k = module.options, module.side, module.options.window
    pictures = []
    for picture in features.tolist():
        patches = picture
        if options.mbtf:
            fused = [linear(module.mbtf[2], [gelu(v) for v in linear(module.mbtf[0], x)]) for x in picture]
            patches = [[gelu(v) for v in x] if options.last_gelu else x for x in fused]
        channels, tokens = len(patches[0]), []
        for row, column in itertools.product(range(0, side, k), repeat=2):
            cells = [patches[(row + dy) * side + column + dx] for dy in range(k) for dx in range(k)]
            if options.fusion == "average":
                vectors = [[sum(cell[c] for cell in cells) / k**2 for c in range(channels)]]
            elif options.fusion == "concatenation":
                whole = [cell[c] for c in range(channels) for cell in cells]
                length = len(whole) // options.tokens
                vectors = [whole[e * length : (e + 1) * length] for e in range(options.tokens)]
            else:
                whole = []
                for kernel, bias in zip(
                    module.convolution.weight.tolist(), module.convolution.bias.tolist(), strict=True
                ):
                    total = bias
                    for c, dy, dx in itertools.product(range(channels), range(k), range(k)):
                        total += kernel[c][dy][dx] * cells[dy * k + dx][c]
                    whole.append(gelu(total))
                length = len(whole) // options.tokens
                vectors = [whole[e * length : (e + 1) * length] for e in range(options.tokens)]
            for vector in vectors:
                out = linear(module.stf[2], [gelu(v) for v in linear(module.stf[0], vector)])
                plain = options.fusion == "average" or not options.last_gelu
                tokens.append(out if plain else [gelu(v) for v in out])
        pictures.append(tokens)
    return torch.tensor(pictures, dtype=torch.float64)


@pytest.mark.parametrize("last_gelu", [True, False])
@pytest.mark.parametrize("mbtf", [True, False])
@pytest.mark.parametrize(
    ("fusion", "window", "tokens"),
    [
        *((fusion, window, 1) for fusion in ("convolution", "concatenation", "average") for window in (1, 2, 3)),
        *((fusion, window, tokens) for fusion in ("convolution", "concatenation") for window, tokens in ((2, 2), (3, 4))),
    ],
)  # fmt: skip
def test_forward(fusion: str, window: int, tokens: int, mbtf: bool, last_gelu: bool) -> None:
    """In float64, where a loop and a matrix product differ by rounding alone."""
    module = stf(STFOptions(window, tokens, mbtf, fusion, last_gelu), side=6, states=2)  # type: ignore[arg-type]
    features = torch.randn(3, 36, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found = module(features)
    grid = module.options.grid(Ends(6, 4, 2, 5))
    assert grid == Grid(6 // window, 6 // window * tokens, tokens, window) and found.shape == (3, grid.cells, 5)
    assert torch.allclose(found, by_hand(module, features), rtol=0, atol=1e-11)
    assert torch.allclose(module(features[:1]), found[:1], rtol=0, atol=1e-11)


def test_the_public_code_s_form_is_a_convolution() -> None:
    """Its first linear layer, cut into cells, is the kernel of a convolution with stride k."""
    for window in (2, 3):
        module = stf(STFOptions(window, fusion="concatenation", last_gelu=False, mbtf=False), side=6, states=1)
        features = torch.randn(2, 36, 4, dtype=torch.float64)
        first = module.stf[0]
        planes = features.transpose(1, 2).unflatten(2, (6, 6))
        hidden = F.conv2d(planes, first.weight.unflatten(1, (4, window, window)), first.bias, stride=window)
        expected = module.stf[2](F.gelu(hidden.flatten(2).transpose(1, 2)))
        assert torch.allclose(module(features), expected, rtol=0, atol=1e-12)
        names = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        wide = 4 * window**2 * 4
        assert names == {
            "stf.0.weight": (wide, 4 * window**2),
            "stf.0.bias": (wide,),
            "stf.2.weight": (5, wide),
            "stf.2.bias": (5,),
        }


@pytest.mark.parametrize("fusion", ["convolution", "concatenation"])
def test_the_tokens_of_a_window_follow_one_another(fusion: str) -> None:
    """A change in one window changes its E tokens alone, which are neighbours in a row of the grid."""
    module = stf(STFOptions(2, 3, True, fusion), side=4, states=2, width=3)  # type: ignore[arg-type]
    features = torch.randn(1, 16, 6, dtype=torch.float64)
    before = module(features)
    for row, column in itertools.product(range(2), repeat=2):
        other = features.clone()
        other[0, (2 * row + 1) * 4 + 2 * column] += 1
        changed = (module(other) != before).any(dim=-1)[0].unflatten(0, (2, 6))
        expected = torch.zeros(2, 6, dtype=torch.bool)
        expected[row, 3 * column : 3 * column + 3] = True
        assert not changed[~expected].any() and changed[expected].any()
        if fusion == "convolution":  # every channel sees the whole window
            assert torch.equal(changed, expected)


# ---- whole models ----


@pytest.fixture(scope="module", params=[1, 2])
def folder(request: Any, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k = 2, and E = 1 or 2."""
    return copy_with_projector(plain, tmp_path_factory.mktemp("stf"), {"name": "stf", "tokens": request.param}, STATES)


@pytest.mark.parametrize(
    "options",
    [{}, dict(tokens=2, fusion="concatenation", last_gelu=False), dict(fusion="average", mbtf=False), dict(window=4)],
)
def test_a_whole_model(plain: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """It loads, answers and counts by the coarse grid, and what it saves is the same model."""
    folder = copy_with_projector(plain, tmp_path / "stf", {"name": "stf", **options}, STATES)
    model, without = minifocus.load(folder, "none"), minifocus.load(plain, "none")
    assert isinstance(model.multi_modal_projector, STF) and model.config.feature_layers == (3, 1, 2)
    k, tokens = options.get("window", 2), options.get("tokens", 1)
    assert model.config.grid == Grid(4 // k, 4 // k * tokens, tokens, k)
    for size in SIZES:
        if not model.config.anyres:
            assert model.num_visual_tokens(size) == 16 // k**2 * tokens
        answer = model.generate(noise(*size), "what?", max_new_tokens=3)
        assert answer.tokens.full == without.num_visual_tokens(size)
        assert answer.tokens.after_vision == model.num_visual_tokens(size) == answer.pictures[0].layout.num_tokens
        assert answer.tokens.equivalent == pytest.approx(model.num_visual_tokens(size) / answer.tokens.full)

    inputs = make_inputs(model, [SIZES[:2], SIZES[2:]])
    with torch.inference_mode():
        logits = model(**inputs.arguments())
    valid = inputs.attention_mask.bool()
    assert bool(logits[valid].isfinite().all())
    model.save(tmp_path / "saved")
    again = minifocus.load(tmp_path / "saved", "none")
    assert again.config == model.config
    with torch.inference_mode():
        assert torch.equal(again(**inputs.arguments())[valid], logits[valid])
    again.save(tmp_path / "saved")
    assert (tmp_path / "saved/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_quarter_of_the_tokens(plain: Path, folder: Path) -> None:
    """Of LLaVA's with k = 2 and E = 1, newlines aside, which are half as many; twice that with E = 2."""
    model, without = minifocus.load(folder, "none"), minifocus.load(plain, "none")
    size = (56, 56)
    newlines = 4 if model.config.anyres else 0
    share = (model.num_visual_tokens(size) - newlines) / (without.num_visual_tokens(size) - 2 * newlines)
    assert share == model.config.grid.together / 4


def test_a_batch_answers_as_its_rows_do(folder: Path) -> None:
    model = minifocus.load(folder, "none")
    pictures = [noise(*size) for size in SIZES]
    together = model.generate_batch(pictures, ["what?"] * len(SIZES), max_new_tokens=4)
    for picture, answer in zip(pictures, together, strict=True):
        assert model.generate(picture, "what?", max_new_tokens=4).token_ids == answer.token_ids


def test_views_map_and_newlines(folder: Path) -> None:
    """The map is that of the projector's own output, tile by tile, cut alike at both ends and never inside a window."""
    model = minifocus.load(folder, "none")
    grid, seen = model.config.grid, 0
    inputs = make_inputs(model, [[size] for size in SIZES])
    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    with torch.inference_mode():
        pictures = model.encode_pictures(tiles, sizes)
        for picture, own in zip(pictures, tiles, strict=True):
            features = model.multi_modal_projector(model.vision_tower.features(model.vision_tower(own)))
            views = features.unflatten(1, (grid.rows, grid.columns))
            assert torch.allclose(picture.views, views, atol=1e-5) and torch.equal(picture.thumbnail, picture.views[0])
            if not model.config.anyres:
                assert torch.equal(picture.map, picture.views[0]) and picture.newline is None
                continue
            windows = picture.map.unflatten(1, (-1, grid.together)).flatten(0, 1)
            known = picture.views[1:].flatten(0, 1).unflatten(1, (-1, grid.together)).flatten(0, 1)
            for window in windows:
                assert int((known == window).all(dim=(1, 2)).sum()) == 1
            seen += len(windows)
    assert seen or not model.config.anyres


# ---- methods on top ----


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in methods.names()),
    ("focus", dict(branches=7, window=2)),
    ("vision", dict(thumbnail="compress")),
    ("avgpool", dict(window=3, thumbnail="compress")),
    ("fopru", dict(strategy="rows")),
    ("fopru", dict(strategy="rows", per="picture", axis="row")),
    ("similarity", dict(per="picture")),
    ("fastervlm", dict(per="tile")),
    ("feather", dict(stride=2)),
]


@pytest.mark.parametrize(("name", "more"), VARIANTS, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in VARIANTS])
def test_every_method(folder: Path, name: str, more: dict[str, Any]) -> None:
    """On top of the coarse grid, for pictures of every shape: answers, counts, and places that are the layout's own."""
    options = WITHOUT_LEARNING.get(name, {}) | more
    if options.get("thumbnail") == "compress" and not load_config(folder).anyres:
        with pytest.raises(minifocus.InputError, match="LLaVA-1.5 has no thumbnail"):
            minifocus.load(folder, name, **options)
        return
    if name == "avg-llava" and load_config(folder).grid.together > 1:
        with pytest.raises(minifocus.InputError, match="this projector makes several of one"):
            minifocus.load(folder, name, **options)
        return
    model = minifocus.load(folder, name, **options)
    inputs = make_inputs(model, [SIZES[:2], SIZES[2:5], SIZES[5:]])
    with torch.inference_mode():
        logits = model(**inputs.arguments())
    assert bool(logits.isfinite().any()) and not bool(logits.isinf().any())
    answers = model.generate_batch([noise(*size) for size in SIZES], ["what is it?"] * len(SIZES), max_new_tokens=3)
    for size, answer in zip(SIZES, answers, strict=True):
        (picture,) = answer.pictures
        layout, most = picture.layout, model.num_visual_tokens(size)
        assert layout.num_tokens == most and answer.tokens.full == layout.num_plain >= most
        assert 0 <= answer.tokens.after_text <= answer.tokens.after_vision == len(picture.entered) <= most
        entered = picture.entered.tolist()
        assert len(set(entered)) == len(entered) and all(0 <= place < most for place in entered)
        assert set(picture.kept.tolist()) <= set(entered)
        newlines = layout.of_newlines(torch.arange(layout.height)).tolist() if layout.newlines else []
        if model.before_llm is not None and "pool" not in name and name not in ("focus", "vision", "avg-llava"):
            assert set(newlines) <= set(entered)
        cells = layout.cells(picture.entered)
        on_map = cells >= 0
        covered = picture.extent[on_map].prod(dim=1).sum()
        if name in ("none", "focus", "vision", "avgpool", "maxpool"):  # they cover the map, and every cell once
            assert int(covered) == layout.height * layout.width


@pytest.mark.parametrize("name", ["fastervlm", "vtc-cls", "hired", "globalcom2", "fopru", "prumerge"])
def test_cues_are_means_over_windows(folder: Path, name: str) -> None:
    """What a method takes from the tower of each patch: of a token, the mean of its window's patches."""
    model = minifocus.load(folder, name)
    sampler, grid = model.before_llm, model.config.grid
    assert sampler is not None
    inputs = make_inputs(model, [[size] for size in SIZES])
    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    with torch.inference_mode():
        for own, size in zip(tiles, sizes, strict=True):
            (picture,) = model.encode_pictures([own], [size], sampler)
            states = model.vision_tower(own, sampler.tower_blocks)
            fine = sampler.cues(model.vision_tower, states)
            assert fine is not None
            if name == "fastervlm":
                (block,) = sampler.tower_blocks
                attention = class_attention(model.vision_tower.encoder.layers[block], states[block])
                assert torch.allclose(fine[..., 1:], attention, atol=1e-6)
            pooled = torch.zeros(len(own), grid.rows, grid.columns, fine.shape[-1])
            for view, row, column in itertools.product(range(len(own)), range(grid.rows), range(grid.columns)):
                top, left = 2 * row, 2 * (column // grid.together)
                cells = [fine[view, (top + dy) * 4 + left + dx] for dy in range(2) for dx in range(2)]
                pooled[view, row, column] = torch.stack(cells).mean(dim=0)
            whole, small = picture.cues  # type: ignore[misc]
            assert torch.allclose(small, pooled[0], atol=1e-5)
            # A token of the map and its cue come from the same place of the same tile.
            places = {
                tuple(picture.views[view, row, column].tolist()): pooled[view, row, column]
                for view, row, column in itertools.product(
                    range(1 if model.config.anyres else 0, len(own)), range(grid.rows), range(grid.columns)
                )
            }
            assert len(places) == (len(own) - model.config.anyres) * grid.cells
            for row, column in itertools.product(*map(range, picture.map.shape[:2])):
                expected = places[tuple(picture.map[row, column].tolist())]
                assert torch.allclose(whole[row, column], expected, atol=1e-5)
            if model.config.anyres:
                assert torch.equal(views_of(picture)[: grid.cells], torch.zeros(grid.cells, dtype=torch.long))
            assert len(cues_of(picture)) == len(views_of(picture))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("projector", "words"),
    [
        ({"name": "stf", "window": 3}, "window: expected a divisor of the 4 patches along a view's side, got 3"),
        ({"name": "stf", "window": 0}, "window: expected a whole number from 1 to 1024, got 0"),
        ({"name": "stf", "window": 2.0}, "window: expected a whole number from 1 to 1024, got 2.0"),
        ({"name": "stf", "window": True}, "window: expected a whole number from 1 to 1024, got True"),
        ({"name": "stf", "window": None}, "window: expected a whole number from 1 to 1024, got None"),
        ({"name": "stf", "window": 10**400}, "window: expected a whole number from 1 to 1024, got a whole number of"),
        ({"name": "stf", "window": [2]}, "window: expected a whole number"),
        ({"name": "stf", "tokens": 4}, "tokens: expected a whole number from 1 to 3, got 4"),
        ({"name": "stf", "tokens": 10**30}, "tokens: expected a whole number from 1 to 3, got "),
        ({"name": "stf", "window": 4, "tokens": 9}, "tokens: expected a divisor of the window's 256 channels, got 9"),
        ({"name": "stf", "tokens": 2, "fusion": "average"}, "tokens: expected a whole number from 1 to 1, got 2"),
        ({"name": "stf", "mbtf": "yes"}, "mbtf: expected True or False, got 'yes'"),
        ({"name": "stf", "last_gelu": 1}, "last_gelu: expected True or False, got 1"),
        ({"name": "stf", "fusion": "sum"}, "fusion: expected one of 'convolution', 'concatenation', 'average'"),
        ({"name": "stf", "kernel": 2}, "kernel: not an option of projector 'stf'; its options: fusion, last_gelu, mbtf"),
        ({"name": "stf", "x" * 5000: 2}, "xxx: not an option of projector 'stf'"),
        ({"name": "resampler"}, "name: expected "),
        ({"window": 2}, "name: expected "),
        ({"name": ["stf"]}, "name: expected "),
        ({"name": "mlp"}, "name: expected another than 'mlp', which stands for no projector key"),
        ("stf", "projector: expected an object, got 'stf'"),
    ],
)  # fmt: skip
def test_bad_options(plain: Path, tmp_path: Path, projector: Any, words: str) -> None:
    members = json.loads((plain / "config.json").read_text()) | {"projector": projector}
    (tmp_path / "config.json").write_text(json.dumps(members))
    with pytest.raises(minifocus.CheckpointError) as found:
        load_config(tmp_path)
    assert str(found.value).startswith(f"{tmp_path / 'config.json'}: projector") and words in str(found.value)
    assert len(str(found.value)) < 1000


def test_a_kept_class_token_has_no_place(tmp_path: Path) -> None:
    save(build("llava", vision_feature_select_strategy="full"), tmp_path)
    members = json.loads((tmp_path / "config.json").read_text()) | {"projector": {"name": "stf"}}
    (tmp_path / "config.json").write_text(json.dumps(members))
    with pytest.raises(
        minifocus.CheckpointError, match="config.json: vision_feature_select_strategy: expected 'default'"
    ):
        load_config(tmp_path)


def test_null_and_empty_are_llava_s_own(plain: Path, tmp_path: Path) -> None:
    for nothing in (None, {}):
        members = json.loads((plain / "config.json").read_text()) | {"projector": nothing}
        (tmp_path / "config.json").write_text(json.dumps(members))
        assert load_config(tmp_path) == load_config(plain)


@pytest.mark.parametrize("fusion", ["convolution", "concatenation", "average"])
@pytest.mark.parametrize("window", [1, 1024])
def test_huge_sizes_are_refused_and_not_built(plain: Path, tmp_path: Path, fusion: str, window: int) -> None:
    """A config that asks for more than any computer has names the key, or else does not fit the weights."""
    members = json.loads((plain / "config.json").read_text())
    members["vision_config"] |= {"hidden_size": 2**22, "image_size": 1024 * 4, "patch_size": 4}
    members |= {"projector": {"name": "stf", "fusion": fusion, "window": window}, "vision_feature_layer": [1, 2]}
    members["image_grid_pinpoints"] = [[4096, 4096]]
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(members))
    with pytest.raises(minifocus.CheckpointError, match="config.json: projector: window: expected layers|do not fit"):
        minifocus.load(tmp_path, "none")


def test_weights_of_another_shape(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    good = load_file(folder / "model.safetensors")
    name = "multi_modal_projector.convolution.weight"
    for tensors, words in (
        (
            {**good, name: good[name][:, :, :1]},
            rf"wrong shape: {name}: expected \(64, 16, 2, 2\), found \(64, 16, 1, 2\)",
        ),
        ({key: value for key, value in good.items() if key != name}, f"missing: {name}"),
        ({**good, "multi_modal_projector.linear_1.bias": torch.zeros(3)}, "unexpected: multi_modal_projector.linear_1"),
    ):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
        with pytest.raises(minifocus.CheckpointError, match=words):
            minifocus.load(tmp_path, "none")


def test_options_come_back() -> None:
    for options in (STFOptions(), STFOptions(4, 4, False, "concatenation", False)):
        assert options_of(describe(options)) == options
