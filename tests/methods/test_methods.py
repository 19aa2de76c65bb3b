"""The field's training-free methods: each rule against a version written out, budgets, places, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IMAGE_TOKEN, WITHOUT_LEARNING, build, make_inputs, rows_before_layer, save
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

import minifocus
from minifocus import methods
from minifocus.inputs.model_inputs import split_pixels
from minifocus.llama import LayerCache
from minifocus.loading.config import load_config
from minifocus.methods.aim import merge
from minifocus.methods.prumerge import outliers
from minifocus.methods.pruning import Budget, coordinates, spread, top
from minifocus.methods.random_uniform import stride_grid
from minifocus.samplers.hooks import Context, PictureFeatures, VisualTokens, uncompressed

PRUNERS = [
    "random",
    "uniform",
    "similarity",
    "fastervlm",
    "vtc-cls",
    "hired",
    "globalcom2",
    "fopru",
    "prumerge",
    "prumerge+",
]
SIZES = [
    [(57, 91)],
    [(30, 90), (100, 31)],
    [(50, 50), (1, 400), (400, 1)],
]  # the last leave maps without rows or columns
LAYERS = 3  # of the towers, whose outputs before the last are read
ORACLES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(request.param, seed=1), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def attentions(folder: Path) -> list[torch.Tensor]:
    """transformers' attention maps of the tower for all tiles of SIZES, [tiles, H, 1 + g², 1 + g²] per block."""
    kind = "llava_next" if "llava_next" in folder.name else "llava"
    oracle = ORACLES[kind].from_pretrained(folder, attn_implementation="eager").eval()
    pixels = torch.cat(tiles_and_sizes(minifocus.load(folder, "none"))[0])
    with torch.no_grad():
        return list(oracle.model.vision_tower(pixels, output_attentions=True).attentions)


def tiles_and_sizes(model: minifocus.Llava) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    inputs = make_inputs(model, SIZES, seed=2)
    return split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)


@torch.inference_mode()
def sampled(folder: Path, name: str, **options: Any) -> list[tuple[PictureFeatures, VisualTokens]]:
    model = minifocus.load(folder, name, **options)
    assert model.before_llm is not None
    pictures = model.encode_pictures(*tiles_and_sizes(model), model.before_llm)
    return [(picture, model.before_llm(picture, torch.zeros(0, 32))) for picture in pictures]


def tiles_of(picture: PictureFeatures) -> torch.Tensor:
    """[H, W], the tile that each cell of the map is from: from 1 on, the thumbnail being 0; LLaVA-1.5's only one is 0."""
    if picture.cues is None:
        return torch.full(picture.map.shape[:2], int(picture.layout.newlines))
    numbers, of_thumbnail = (cue[..., 0] for cue in picture.cues)
    return (numbers - of_thumbnail[0, 0]).long()


def scored_places(picture: PictureFeatures) -> list[tuple[int, int, int, int]]:
    """(place, view, row, column) of every token that competes, from the layout alone."""
    layout, side, tiles = picture.layout, picture.thumbnail.shape[0], tiles_of(picture)
    found = []
    if layout.newlines:
        found += [(place, 0, place // side, place % side) for place in range(layout.leading)]
    for row in range(layout.height):
        for column in range(layout.width):
            place = layout.leading + row * (layout.width + layout.newlines) + column
            found.append((place, int(tiles[row, column]), row, column))
    return found


def kept_places(visual: VisualTokens) -> list[int]:
    return visual.source[~visual.layout.unscored(visual.source)].tolist()


def best(values: dict[int, float], count: int) -> set[int]:
    return set(sorted(values, key=lambda place: (-values[place], place))[:count])


# ---- budgets ----


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(
    "options",
    [dict(ratio=0.39), dict(ratio=0.11, per="picture"), dict(keep=9, per="map"), dict(ratio=1.0), dict(keep=1)],
)
def test_budgets_are_exact_and_order_newlines_and_features_stay(
    folder: Path, name: str, options: dict[str, Any]
) -> None:
    if name in ("uniform", "hired", "globalcom2"):
        options = {key: value for key, value in options.items() if key != "per"}
    for picture, visual in sampled(folder, name, **options):
        layout = picture.layout
        newlines = layout.height * layout.newlines
        scored = len(scored_places(picture))
        wanted = options.get("keep") or math.floor(options["ratio"] * layout.num_tokens + 0.5) - newlines
        assert len(kept_places(visual)) == min(max(wanted, 1), scored)
        assert int(visual.layout.unscored(visual.source).sum()) == newlines
        assert bool((visual.source.diff() > 0).all())
        if not name.startswith("prumerge"):
            assert torch.equal(visual.tokens, uncompressed(picture).tokens[visual.source])


@given(st.integers(0, 300), st.lists(st.integers(0, 60), min_size=1, max_size=9), st.data())
def test_spread_is_proportional_within_its_bounds(total: int, room: list[int], data: Any) -> None:
    weights = data.draw(st.lists(st.floats(0, 1e3), min_size=len(room), max_size=len(room)))
    counts = spread(total, room, weights)
    assert sum(counts) == min(total, sum(room))
    assert all(0 <= count <= r for count, r in zip(counts, room, strict=True))
    for i, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        for j, (other, other_weight) in enumerate(zip(counts, weights, strict=True)):
            # Whoever has room left got no less, for its weight, than anyone else.
            if count < room[i] and weight >= other_weight and other_weight > 1e-9 and i != j:
                assert count >= other * min(weight / other_weight, 1) - 1


def test_spread_by_hand() -> None:
    assert spread(10, [10, 10, 10], [1, 1, 2]) == [3, 2, 5]  # quotas of 2.5: the first of equals gets the odd one
    assert spread(10, [10, 10, 3], [1, 1, 8]) == [4, 3, 3]
    assert spread(7, [4, 4], [0, 0]) == [4, 3]
    assert spread(5, [0, 9], [9, 1]) == [0, 5]


def test_top_takes_the_first_of_equals_in_each_group() -> None:
    kept = top(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), torch.tensor([0, 1, 1, 1, 0]), [1, 2])
    assert kept.tolist() == [True, True, True, False, False]


def test_budget_keeps_at_least_one() -> None:
    assert [Budget(0.5).of(10, 2), Budget(0.01).of(10, 2), Budget(0.5, 99).of(10, 2), Budget(0.5, 3).of(10, 2)] == [
        4,
        1,
        10,
        3,
    ]


# ---- before the language model ----


@pytest.mark.parametrize(("name", "how"), [("avgpool", torch.mean), ("maxpool", torch.amax)])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("thumbnail", ["keep", "compress", "drop"])
def test_pooling(folder: Path, name: str, how: Any, window: int, thumbnail: str) -> None:
    if "llava_next" not in folder.name and thumbnail != "keep":
        with pytest.raises(minifocus.InputError, match="LLaVA-1.5 has no thumbnail"):
            sampled(folder, name, thumbnail=thumbnail)
        return
    for picture, visual in sampled(folder, name, window=window, thumbnail=thumbnail):
        layout = picture.layout

        def pooled(x: torch.Tensor) -> list[tuple[torch.Tensor, int, int]]:
            return [
                (how(x[r : r + window, c : c + window], dim=(0, 1)), r, c)
                for r in range(0, x.shape[0], window)
                for c in range(0, x.shape[1], window)
            ]

        tokens = list(picture.leading) if thumbnail == "keep" else []
        places = list(range(len(tokens)))
        if thumbnail == "compress":
            tokens, places = zip(*[(value, r * 4 + c) for value, r, c in pooled(picture.thumbnail)], strict=True)
            tokens, places = list(tokens), list(places)
        row_length = layout.width + layout.newlines
        windows = pooled(picture.map)
        for r in range(0, layout.height, window):
            row = [(value, c) for value, own, c in windows if own == r]
            tokens += [value for value, _ in row]
            places += [layout.leading + r * row_length + c for _, c in row]
            if layout.newlines:
                tokens.append(picture.newline)
                places.append(layout.leading + min(r + window, layout.height) * row_length - 1)
        assert torch.allclose(visual.tokens, torch.stack(tokens) if tokens else torch.zeros(0, 32), atol=1e-6)
        assert visual.source.tolist() == places
        covered = visual.extent[~visual.layout.unscored(visual.source)].prod(dim=1).sum()
        thumbnail_cells = layout.leading if thumbnail != "drop" else 0
        assert int(covered) == layout.height * layout.width + thumbnail_cells


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_stride_grid_spreads(height: int, width: int, data: Any) -> None:
    count = data.draw(st.integers(0, height * width))
    grid = stride_grid(height, width, count)
    assert int(grid.sum()) == count
    rows = grid.sum(dim=1)
    used = rows[rows > 0]
    if count:
        assert int(used.max() - used.min()) <= 1
        if count * 4 <= height * width and height == width:
            assert len(used) == max(round(math.sqrt(count)), 1)


def test_random_depends_on_seed_and_size_alone(folder: Path) -> None:
    first, again, other = (
        [kept_places(visual) for _, visual in sampled(folder, "random", seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("flip", [False, True])
def test_similarity(folder: Path, flip: bool) -> None:
    for picture, visual in sampled(folder, "similarity", per="picture", keep=6, flip=flip):
        whole = uncompressed(picture).tokens
        thumbnail = picture.thumbnail.flatten(0, 1)
        scores = {
            place: (-1 if flip else 1) * float(torch.stack([x @ whole[place] for x in thumbnail]).mean())
            for place, *_ in scored_places(picture)
        }
        assert set(kept_places(visual)) == best(scores, 6)


def split_by_picture(folder: Path, values: torch.Tensor) -> list[torch.Tensor]:
    tiles, _ = tiles_and_sizes(minifocus.load(folder, "none"))
    return list(values.split([len(own) for own in tiles]))


def of_token(picture: PictureFeatures, values: torch.Tensor) -> dict[int, float]:
    """Per-patch values of the picture's views [views, g, g] → by place. Cells are found by their features' tile, and the
    unpadding by what is symmetrically missing."""
    layout, side = picture.layout, picture.thumbnail.shape[0]
    if not layout.newlines:
        return {place: float(values[0, row, column]) for place, _, row, column in scored_places(picture)}
    columns_of_tiles = int(tiles_of(picture)[0].unique().numel()) if picture.map.numel() else 1
    tiles = len(values) - 1
    across = next(n for n in range(1, tiles + 1) if tiles % n == 0 and n >= columns_of_tiles)
    whole = torch.cat(
        [torch.cat(list(values[1 + r * across : 1 + (r + 1) * across]), dim=1) for r in range(tiles // across)]
    )
    top_, left = (whole.shape[0] - layout.height) // 2, (whole.shape[1] - layout.width) // 2
    found = {}
    for place, view, row, column in scored_places(picture):
        found[place] = float(values[0, row, column] if view == 0 else whole[top_ + row, left + column])
        if view:
            r, c = (top_ + row) // side, (left + column) // side
            assert view == 1 + r * across + c
    return found


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [
        ("fastervlm", dict(block=0), [0]),
        ("fastervlm", {}, [1]),
        ("vtc-cls", dict(blocks=2), [0, 1]),
        ("vtc-cls", {}, [1]),
    ],
)
def test_class_attention_is_transformers(
    folder: Path, attentions: list[torch.Tensor], name: str, options: dict[str, Any], blocks: list[int]
) -> None:
    rows = sum(attentions[block][:, :, 0, 1:].mean(dim=1) for block in blocks).unflatten(1, (4, 4))
    own = split_by_picture(folder, rows)
    for (picture, visual), values in zip(sampled(folder, name, per="tile", ratio=0.5, **options), own, strict=True):
        scores, places = of_token(picture, values), scored_places(picture)
        for view in {view for _, view, *_ in places}:
            of_view = {place: scores[place] for place, v, *_ in places if v == view}
            stays = set(kept_places(visual)) & set(of_view)
            assert stays == best(of_view, len(stays))
            total = len(kept_places(visual))
            assert abs(len(stays) - total * len(of_view) / len(places)) < 1


def test_hired(folder: Path, attentions: list[torch.Tensor]) -> None:
    maps = [a[:, :, 0, 1:].mean(dim=1).unflatten(1, (4, 4)) for a in (attentions[0], attentions[1])]
    first, last = (split_by_picture(folder, one) for one in maps)
    for (picture, visual), early, late in zip(sampled(folder, "hired", ratio=0.5), first, last, strict=True):
        scores, places = of_token(picture, late), scored_places(picture)
        total = len(kept_places(visual))
        room = {view: sum(v == view for _, v, *_ in places) for view in sorted({v for _, v, *_ in places})}
        if len(room) > 1:
            height, width = picture.map.shape[:2]
            weights = dict.fromkeys(room, 0.0)
            for row in range(4):
                for column in range(4):
                    shown = tiles_of(picture)[int((row + 0.5) * height / 4), int((column + 0.5) * width / 4)]
                    weights[int(shown)] += float(early[0, row, column])
            thumbnail = min(round(total / 2), room[0])
            tiles = spread(total - thumbnail, [room[v] for v in room if v], [weights[v] for v in room if v])
            counts = dict(zip([v for v in room if v], tiles, strict=True))
            counts[0] = min(total - sum(tiles), room[0])
        else:
            counts = {next(iter(room)): total}
        expected = set()
        for view, count in counts.items():
            expected |= best({place: scores[place] for place, v, *_ in places if v == view}, count)
        assert set(kept_places(visual)) == expected


def last_block_queries_and_keys(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """In the tower's last block, the class token's query [tiles, C] and all keys [tiles, 1 + g², C], from transformers."""
    kind = "llava_next" if "llava_next" in folder.name else "llava"
    oracle = ORACLES[kind].from_pretrained(folder).eval().model.vision_tower
    pixels = torch.cat(tiles_and_sizes(minifocus.load(folder, "none"))[0])
    hidden = oracle(pixels, output_hidden_states=True).hidden_states[LAYERS - 1]
    block = next(m for n, m in oracle.named_modules() if n.endswith(f"encoder.layers.{LAYERS - 1}"))
    normed = block.layer_norm1(hidden)
    return block.self_attn.q_proj(normed)[:, 0], block.self_attn.k_proj(normed)


def between(values: torch.Tensor, row: float, column: float) -> float:
    """A map's value between its cells, whose centres are at whole numbers; beyond the outermost centres it is level."""
    found = 0.0
    for r in range(values.shape[0]):
        for c in range(values.shape[1]):
            down = 1 - abs(r - min(max(row, 0), values.shape[0] - 1))
            across = 1 - abs(c - min(max(column, 0), values.shape[1] - 1))
            found += max(down, 0) * max(across, 0) * float(values[r, c])
    return found


@torch.inference_mode()
def test_globalcom2(folder: Path, attentions: list[torch.Tensor]) -> None:
    q, keys = last_block_queries_and_keys(folder)
    heads = attentions[0].shape[1]
    size = q.shape[1] // heads
    logits = torch.zeros(len(q), 16)
    for tile in range(len(q)):
        for patch in range(16):
            own = [slice(head * size, (head + 1) * size) for head in range(heads)]
            logits[tile, patch] = sum(q[tile, h] @ keys[tile, 1 + patch, h] for h in own) / heads / size**0.5
    for (picture, visual), values in zip(
        sampled(folder, "globalcom2", ratio=0.5, temperature=2.0),
        split_by_picture(folder, logits.unflatten(1, (4, 4))),
        strict=True,
    ):
        scores, places = of_token(picture, values), scored_places(picture)
        views = sorted({view for _, view, *_ in places})
        of_view = {view: [place for place in places if place[1] == view] for view in views}
        total = len(kept_places(visual))
        counts = [total]
        if len(views) > 1:
            height, width = picture.map.shape[:2]
            for view in views[1:]:
                own = [scores[place] for place, *_ in of_view[view]]
                seen = [
                    between(values[0], (row + 0.5) * 4 / height - 0.5, (column + 0.5) * 4 / width - 0.5)
                    for _, _, row, column in of_view[view]
                ]
                for (place, *_), one, other in zip(of_view[view], own, seen, strict=True):
                    scores[place] = one / math.hypot(*own) + other / math.hypot(*seen)
            richness = [0.0] * len(views)
            for row in range(4):
                for column in range(4):
                    shown = tiles_of(picture)[int((row + 0.5) * height / 4), int((column + 0.5) * width / 4)]
                    richness[views.index(int(shown))] += float(values[0, row, column]) / 2.0
            weight = [math.exp(s) for s in richness[1:]]
            room = [len(of_view[view]) for view in views]
            thumbnail = spread(total, room, room)[0]
            shares = [(1 + w / sum(weight) - 1 / len(weight)) * n for w, n in zip(weight, room[1:], strict=True)]
            counts = [thumbnail, *spread(total - thumbnail, room[1:], shares)]
        expected = set()
        for view, count in zip(views, counts, strict=True):
            expected |= best({place: scores[place] for place, *_ in of_view[view]}, count)
        assert set(kept_places(visual)) == expected


@pytest.mark.parametrize("name", ["prumerge", "hired", "globalcom2", "fastervlm"])
@torch.inference_mode()
def test_pictures_encoded_without_the_sampler_are_refused(folder: Path, name: str) -> None:
    model = minifocus.load(folder, name)
    assert model.before_llm is not None
    for picture in model.encode_pictures(*tiles_and_sizes(model)):
        with pytest.raises(minifocus.InputError, match="before_llm: expected pictures that were encoded with this"):
            model.before_llm(picture, torch.zeros(0, 32))


@pytest.mark.parametrize("axis", ["column", "row"])
@pytest.mark.parametrize("strategy", ["rank", "rows"])
def test_fopru(folder: Path, attentions: list[torch.Tensor], axis: str, strategy: str) -> None:
    whole = attentions[1].mean(dim=1)
    values = whole.mean(dim=1)[:, 1:] if axis == "column" else whole[:, 1:, 1:].mean(dim=2)
    own = split_by_picture(folder, values.unflatten(1, (4, 4)))
    for (picture, visual), of_views in zip(
        sampled(folder, "fopru", ratio=0.6, axis=axis, strategy=strategy), own, strict=True
    ):
        scores, places = of_token(picture, of_views), scored_places(picture)
        if strategy == "rows":
            lines: dict[tuple[int, int], list[float]] = {}
            for place, view, row, _ in places:
                lines.setdefault((view, row), []).append(scores[place])
            scores = {place: sum(lines[view, row]) / len(lines[view, row]) for place, view, row, _ in places}
        for view in {view for _, view, *_ in places}:
            of_view = [place for place, v, *_ in places if v == view]
            stays = [place for place in of_view if place in set(kept_places(visual))]
            gone = [place for place in of_view if place not in set(stays)]
            assert not gone or min(scores[p] for p in stays) >= max(scores[p] for p in gone) - 1e-6
            if strategy == "rows" and len(stays) > 0:
                rows_kept = {(v, r) for place, v, r, _ in places if place in set(stays)}
                complete = sum(all(p in set(stays) for p, v, r, _ in places if (v, r) == line) for line in rows_kept)
                assert complete >= len(rows_kept) - 1


@pytest.mark.parametrize("options", [{}, dict(ratio=0.5), dict(keep=10, neighbours=2), dict(ratio=0.3, neighbours=0)])
@torch.inference_mode()
def test_prumerge(folder: Path, options: dict[str, Any]) -> None:
    q, keys = last_block_queries_and_keys(folder)
    attention = torch.stack([(q[i] @ keys[i].T / math.sqrt(q.shape[1])).softmax(0)[1:] for i in range(len(q))])
    neighbours = options.get("neighbours", 32)
    for (picture, visual), score, key in zip(
        sampled(folder, "prumerge", **options),
        split_by_picture(folder, attention.unflatten(1, (4, 4))),
        split_by_picture(folder, keys[:, 1:].unflatten(1, (4, 4))),
        strict=True,
    ):
        scores, places = of_token(picture, score), scored_places(picture)
        by_place = {}
        channels = [of_token(picture, key[..., c]) for c in range(key.shape[-1])]
        for place in scores:
            by_place[place] = torch.tensor([channel[place] for channel in channels])
        tokens, kept = uncompressed(picture).tokens, set(kept_places(visual))
        got = dict(zip(visual.source.tolist(), visual.tokens, strict=True))
        for view in {view for _, view, *_ in places}:
            own = [place for place, v, *_ in places if v == view]
            stays = best({place: scores[place] for place in own}, len(kept & set(own)))
            assert stays == kept & set(own)
            if not options:
                values = torch.tensor([scores[place] for place in own])
                low, high = values.quantile(0.25), values.quantile(0.75)
                assert len(stays) == max(int((values > high + 1.5 * (high - low)).sum()), 1)
            for place in stays:
                others = [other for other in own if other != place]
                likeness = {o: float(torch.cosine_similarity(by_place[place], by_place[o], dim=0)) for o in others}
                expected = tokens[place] + sum(scores[near] * tokens[near] for near in best(likeness, neighbours))
                assert torch.allclose(got[place], expected, atol=1e-4)


def test_prumerge_plus_adds_a_grid_to_the_outliers(folder: Path) -> None:
    for (_, plain), (picture, plus) in zip(sampled(folder, "prumerge"), sampled(folder, "prumerge+"), strict=True):
        assert set(kept_places(plain)) <= set(kept_places(plus))
        by_view = {view: [place for place, v, *_ in scored_places(picture) if v == view] for view in range(9)}
        outliers_of = {view: len(set(own) & set(kept_places(plain))) for view, own in by_view.items()}
        expected = sum(min(4 * outliers_of[view], len(own)) for view, own in by_view.items())
        assert len(kept_places(plus)) == expected


def test_prumerge_plus_gives_the_grid_three_quarters_of_a_budget(folder: Path) -> None:
    few, plus = (sampled(folder, name, per="picture", keep=keep) for name, keep in (("prumerge", 3), ("prumerge+", 12)))
    for (picture, best_three), (_, visual) in zip(few, plus, strict=True):
        places = [place for place, *_ in scored_places(picture)]
        if len(places) == 16:  # one view
            on_grid = {place for place, on in zip(places, stride_grid(4, 4, 9).flatten(), strict=True) if on}
            assert set(kept_places(best_three)) | on_grid <= set(kept_places(visual))


def test_outliers() -> None:
    assert outliers(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 100, 50])) == 2
    assert outliers(torch.ones(5)) == 1


def test_merging_by_hand() -> None:
    """Two pairs of near-equal tokens and two that stand alone: the pairs go, in one pass, as means."""
    tokens = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0, 1], [0, 0.1, 1], [-1, -1, 0.3]])
    merged, places = merge(tokens, 4)
    assert places.tolist() == [1, 2, 3, 5]
    assert torch.allclose(merged, torch.stack([tokens[:2].mean(0), tokens[2], tokens[3:5].mean(0), tokens[5]]))
    # A second pass weighs a token by what it is made of.
    everything, _ = merge(torch.tensor([[1.0], [2.0], [4.0], [7.0], [11.0]]), 1)
    assert torch.allclose(everything, torch.tensor([[5.0]]))


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 99))
def test_merging_keeps_the_sum_and_the_budget(count: int, wanted: int, seed: int) -> None:
    tokens = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    merged, places = merge(tokens, wanted)
    assert len(merged) == len(places) == min(count, wanted)
    assert bool((places.diff() > 0).all())
    if count <= wanted:
        assert torch.equal(merged, tokens)
    if wanted == 1 and count:
        assert torch.allclose(merged[0], tokens.mean(0))


@pytest.mark.parametrize("ratio", [0.5, 0.2, 1.0])
def test_aim_merges_to_its_budget(folder: Path, ratio: float) -> None:
    for picture, visual in sampled(folder, "aim", ratio=ratio):
        scored, newlines = len(scored_places(picture)), picture.layout.height * picture.layout.newlines
        assert len(kept_places(visual)) == Budget(ratio).of(scored, newlines)
        assert bool((visual.source.diff() > 0).all())
        if ratio == 1:
            assert torch.equal(visual.tokens, uncompressed(picture).tokens)


# ---- inside it ----


def full_attention(layer: Any, rows: Any, row: int, rope: bool, sharpen: float = 1.0) -> tuple[Any, Any]:
    """Logits and weights [H, S, S] of a layer's causal attention among a row's valid tokens; weights are 0 for padding."""
    hidden = layer.input_layernorm(rows.hidden[row])
    q = layer.self_attn.q_proj(hidden).view(-1, 4, 8).transpose(0, 1)
    k = layer.self_attn.k_proj(hidden).view(-1, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)
    if rope:
        angles = rows.positions[row][:, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        q = q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin
        k = k * cos + torch.cat([-k[..., 4:], k[..., :4]], -1) * sin
    valid = rows.valid[row]
    seen = torch.ones(len(valid), len(valid)).tril().bool() & valid & valid[:, None]
    logits = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~seen, -torch.inf)
    return logits, (logits * sharpen).softmax(-1).nan_to_num(0)


def pictures_in(rows: Any, row: int) -> list[torch.Tensor]:
    return [
        ((rows.picture[row] == number) & ~rows.newline[row]).nonzero().squeeze(1) for number in range(len(SIZES[row]))
    ]


@pytest.mark.parametrize(
    ("name", "options", "index"),
    [
        ("fastv", {}, 1),
        ("fastv", dict(layer=3, ratio=0.2), 2),
        ("fastv", dict(keep=4), 1),
        ("pyramiddrop", {}, 1),
        ("pyramiddrop", dict(ratio=0.3, layers=2), 2),
        ("pyramiddrop", dict(ratio=0.7, layers=(0, 3)), 3),
        ("feather", {}, 0),
        ("feather", dict(second=0.4), 1),
        ("feather", dict(stride=2, ratio=0.1, layers=(3,)), 2),
        ("aim", dict(begin=0, end=4), 0),
        ("aim", dict(begin=0, end=4, rounds=1), 2),
        ("aim", dict(begin=1, end=3), 2),
    ],
)
@torch.inference_mode()
def test_inside_rules(folder: Path, name: str, options: dict[str, Any], index: int) -> None:
    model = minifocus.load(folder, "none")
    inputs = make_inputs(model, SIZES, seed=2)
    sampler = methods.build(name, model.config, folder, options).inside
    assert sampler is not None
    rows, pictures = rows_before_layer(model, inputs, None, index)
    layers = [*model.language_model.model.layers]
    layer = layers[index]
    # The others look at a layer that has been run, before the next.
    at, context = (index, Context(pictures)) if name == "pyramiddrop" else (index + 1, Context(pictures, (layer, rows)))
    selection = sampler(at, layers[at], rows, context)
    assert selection is not None
    for row in range(3):
        logits, attention = full_attention(layer, rows, row, name != "feather", 10.0 if name == "aim" else 1.0)
        scores = attention.mean(0)[-1]
        if name == "feather":
            for visual in pictures_in(rows, row):
                scores[visual] = torch.stack([head[-1, visual].softmax(0) for head in logits]).mean(0)
        if name == "aim":
            valid = rows.valid[row].float()
            walks = []
            for head in attention:
                weight = valid / valid.sum()
                for _ in range(options.get("rounds", 5)):
                    weight = weight @ head
                walks.append(weight)
            scores = (sum(weight**2 for weight in walks) / len(walks)) ** 0.5
        expected = rows.valid[row].clone()
        for visual in pictures_in(rows, row):
            if not len(visual):
                continue
            count, newlines = (
                len(visual),
                int(rows.newline[row, rows.picture[row] == rows.picture[row, visual[0]]].sum()),
            )
            keep = {
                "fastv": lambda n=count, lines=newlines: (
                    options.get("keep") or max(math.floor(options.get("ratio", 0.5) * (n + lines) + 0.5) - lines, 1)
                ),
                "pyramiddrop": lambda n=count: max(int((0.49 if index == 3 else options.get("ratio", 0.5)) * n), 1),
                "feather": lambda n=count: max(
                    int((options.get("second", 0.09) if index == 1 else options.get("ratio", 0.3)) * n), 1
                ),
                "aim": lambda n=count: int(n * (options["end"] - 1 - index) / (options["end"] - options["begin"])),
            }[name]()
            stays = set(visual[scores[visual].argsort(descending=True, stable=True)[:keep]].tolist())
            if name == "feather" and index != 1:
                picture = pictures[row][int(rows.picture[row, visual[0]])]
                cells = coordinates(picture.layout, rows.source[row, visual] - picture.begin)
                on_grid = (cells % options.get("stride", 3) == 0).all(dim=1)
                stays |= set(visual[on_grid].tolist())
            for column in visual.tolist():
                expected[column] = column in stays
            assert torch.allclose(selection.scores[row, visual], scores[visual], atol=1e-6)
        if name == "aim" and index + 1 == options["end"]:
            expected &= rows.picture[row] < 0
        assert torch.equal(selection.kept[row], expected)


@pytest.mark.parametrize(
    ("depth", "pyramid", "feather", "aim"),
    [(2, [1], [1], (1, 2)), (28, [7, 14, 21], [7, 14], (14, 22)), (32, [8, 16, 24], [8, 16], (16, 26))],
)
def test_default_layers(folder: Path, depth: int, pyramid: list[int], feather: list[int], aim: tuple[int, int]) -> None:
    config = load_config(folder)
    config = replace(config, text=replace(config.text, num_hidden_layers=depth))
    of: dict[str, Any] = {
        name: methods.build(name, config, folder, {}).inside for name in ("pyramiddrop", "feather", "aim")
    }
    assert [*of["pyramiddrop"].layers] == pyramid and [*of["feather"].layers] == feather
    assert (of["aim"].begin, of["aim"].end) == aim


@torch.inference_mode()
def test_cells_are_where_the_tokens_are(folder: Path) -> None:
    model = minifocus.load(folder, "none")
    inputs = make_inputs(model, SIZES, seed=2)
    pictures = model.encode_pictures(*split_pixels(model.config, inputs.pixel_values, inputs.image_sizes))
    rows, visual = model.embed(inputs.input_ids, pictures, inputs.attention_mask)
    number = 0
    for row, own in enumerate(SIZES):
        for index in range(len(own)):
            picture, mine = pictures[number], (rows.picture[row] == index) & ~rows.newline[row]
            number += 1
            expected = [[r, c] for _, _, r, c in scored_places(picture)]
            layout, begin = visual[row][index].layout, visual[row][index].begin
            assert coordinates(layout, rows.source[row, mine] - begin).tolist() == expected
            others = rows.source[row][(rows.picture[row] == index) & rows.newline[row]] - begin
            assert bool((coordinates(layout, others) == -1).all())


@pytest.mark.parametrize(
    ("name", "options", "lengths"),
    [
        ("fastv", dict(layer=2, keep=3), [None, None, 3, 3]),
        ("pyramiddrop", {}, [None, 0.5, 0.25, 0.125]),
        ("pyramiddrop", dict(ratio=0.9), [None, 0.9, 0.81, 0.729]),
        ("aim", dict(ratio=1.0), [None, None, None, 0.5]),
        ("aim", dict(ratio=1.0, begin=0, end=4), [None, 0.75, 0.5, 0.25]),
        ("aim", dict(ratio=1.0, begin=0, end=2), [None, 0.5, 0, 0]),
    ],
)
@torch.inference_mode()
def test_tokens_leave_where_the_method_says_and_keep_their_positions(
    folder: Path, name: str, options: dict[str, Any], lengths: list[float | None]
) -> None:
    model = minifocus.load(folder, name, **options)
    inputs = make_inputs(model, [[(57, 91)]], seed=2)
    pictures = model.encode_pictures(
        *split_pixels(model.config, inputs.pixel_values, inputs.image_sizes), model.before_llm
    )
    rows, visual = model.embed(inputs.input_ids, pictures, before_llm=model.before_llm)
    caches = [LayerCache() for _ in range(4)]
    done = model.prefill(rows, visual, caches)
    assert torch.equal(done.rows.positions[0], done.rows.source[0])
    assert bool((done.rows.source[0].diff() > 0).all())
    scored = len(scored_places(pictures[0]))
    text = rows.hidden.shape[1] - scored - int(rows.newline.sum())
    for cache, wanted in zip(caches, lengths, strict=True):
        visible = cache.length - text - (0 if wanted == 0 else int(rows.newline.sum()))
        if wanted is None:
            assert visible == scored
        else:
            assert visible == (int(wanted * scored) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text", dict(keep=1)),
        ("fastv", dict(keep=1)),
        ("pyramiddrop", dict(ratio=0.05)),
        ("feather", dict(ratio=0.05, second=0.05, stride=9)),
        ("aim", dict(begin=0, end=1)),
    ],
)
@torch.inference_mode()
def test_the_last_token_stays_though_the_prompt_ends_in_a_picture(
    folder: Path, name: str, options: dict[str, Any]
) -> None:
    model = minifocus.load(folder, name, **options)
    inputs = make_inputs(model, [[(57, 91)]], seed=2)
    missing = model(inputs.input_ids[:, :-7], inputs.pixel_values, inputs.image_sizes).isnan().any(dim=-1)[0]
    assert int(missing.sum()) > 3 and not bool(missing[-1])


@torch.inference_mode()
def test_a_batch_without_pictures_is_not_shown_to_the_sampler(folder: Path) -> None:
    model = minifocus.load(folder, "none")
    ids = torch.tensor([[1, 5, 7, 9]])
    expected = model(ids)
    model.inside_llm = lambda *_: pytest.fail("called")
    assert torch.equal(model(ids), expected)


# ---- in other models ----

EVERY = methods.training_free()


@pytest.mark.parametrize("name", EVERY)
@torch.inference_mode()
def test_a_class_token_that_is_kept_stays(tmp_path: Path, name: str) -> None:
    """LLaVA-1.5 with vision_feature_select_strategy "full" has the class token in front of the map."""
    folder = save(build("llava", seed=1, vision_feature_select_strategy="full"), tmp_path)
    model = minifocus.load(folder, name)
    inputs = make_inputs(model, [[(28, 28)]], seed=2)
    pictures = model.encode_pictures(
        *split_pixels(model.config, inputs.pixel_values, inputs.image_sizes), model.before_llm
    )
    rows, ((visual,),) = model.embed(inputs.input_ids, pictures, before_llm=model.before_llm)
    first = (rows.picture[0] == 0).nonzero()[0]
    assert coordinates(visual.layout, rows.source[0, first] - visual.begin).tolist() == [[-1, -1]]
    assert torch.equal(rows.hidden[0, first], pictures[0].leading)
    assert bool(model(**inputs.arguments())[0, -1].isfinite().all())


@pytest.mark.parametrize(
    ("name", "options"),
    [("text", dict(keep=1)), ("fastv", dict(keep=1)), ("pyramiddrop", dict(ratio=0.05)), ("aim", dict(begin=0, end=4))],
)
@torch.inference_mode()
def test_a_class_token_is_not_for_samplers_inside_to_drop(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    folder = save(build("llava", seed=1, vision_feature_select_strategy="full"), tmp_path)
    model = minifocus.load(folder, name, **options)
    inputs = make_inputs(model, [[(28, 28)]] * 4, seed=2)
    gone = model(**inputs.arguments()).isnan().any(dim=-1)
    for row, ids in enumerate(inputs.input_ids):
        first = (ids == IMAGE_TOKEN).nonzero()[0]
        assert not bool(gone[row, first]) and bool(gone[row, first + 1 :].any())


@pytest.mark.parametrize("name", methods.names())
def test_torch_s_default_dtype_changes_nothing(folder: Path, name: str) -> None:
    """Programs set it to what their own models have."""
    options = WITHOUT_LEARNING.get(name, {})
    arguments = make_inputs(minifocus.load(folder, "none"), SIZES, seed=2).arguments()

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return minifocus.load(folder, name, **options)(**arguments)

    expected = logits()
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            found = logits()
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32 and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_half_precision(folder: Path, name: str, dtype: str) -> None:
    """The same number of tokens as in float32, and logits near those of the same tokens."""
    model = minifocus.load(folder, name, dtype=dtype)
    inputs = make_inputs(model, SIZES, seed=2)
    arguments = {**inputs.arguments(), "pixel_values": inputs.pixel_values.to(getattr(torch, dtype))}
    logits = model(**arguments)
    assert logits.dtype == getattr(torch, dtype)
    present = inputs.attention_mask.bool() & (inputs.input_ids != IMAGE_TOKEN)
    assert bool(logits[present].isfinite().all())
    model.float()
    count = (~logits.isnan().any(dim=-1)).sum(dim=1)
    if not name.startswith("prumerge"):  # whose count follows from the scores
        assert torch.equal((~model(**inputs.arguments()).isnan().any(dim=-1)).sum(dim=1), count)


# ---- refusing ----


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", dict(ratio=0), "ratio: expected a number above 0 and at most 1, got 0"),
        ("random", dict(keep=0), "keep: expected a 64-bit whole number of at least 1, got 0"),
        ("random", dict(per="row"), "per: expected one of 'picture', 'map', 'tile', got 'row'"),
        ("random", dict(seed=-1), "seed: expected a 64-bit whole number of at least 0"),
        ("uniform", dict(per="tile"), "per: not an option of sampler 'uniform'; its options: keep, ratio"),
        ("similarity", dict(flip=1), "flip: expected True or False, got 1"),
        ("avgpool", dict(window=0), "window: expected a whole number from 1 to 24, got 0"),
        ("maxpool", dict(thumbnail="no"), "thumbnail: expected one of 'keep', 'compress', 'drop', got 'no'"),
        ("fastervlm", dict(block=3), "block: expected a whole number from 0 to 2, got 3"),
        ("vtc-cls", dict(blocks=3), "blocks: expected a whole number from 1 to 2, got 3"),
        ("hired", dict(per="map"), "per: not an option of sampler 'hired'"),
        ("hired", dict(thumbnail=0), "thumbnail: expected a number above 0"),
        ("globalcom2", dict(temperature=0), "temperature: expected a finite number above 0, got 0"),
        ("globalcom2", dict(per="map"), "per: not an option of sampler 'globalcom2'"),
        ("fopru", dict(axis="both"), "axis: expected 'column' or 'row', got 'both'"),
        ("fopru", dict(strategy="best"), "strategy: expected 'rank' or 'rows', got 'best'"),
        ("prumerge", dict(ratio=2), "ratio: expected a number above 0 and at most 1, got 2"),
        ("prumerge+", dict(neighbours=-1), "neighbours: expected a whole number from 0"),
        ("fastv", dict(layer=0), "layer: expected a whole number from 1 to 3, got 0"),
        ("fastv", dict(ratio="half"), "ratio: expected a number above 0 and at most 1, got 'half'"),
        ("pyramiddrop", dict(layers=(2, 1)), r"layers: expected layers in ascending order, got \(2, 1\)"),
        ("pyramiddrop", dict(layers=(1, 4)), "layers: expected a whole number from 0 to 3, got 4"),
        ("pyramiddrop", dict(layers=[1, "a"]), "layers: expected a whole number from 0 to 3, got 'a'"),
        ("pyramiddrop", dict(layers=[[1]]), r"layers: expected a whole number from 0 to 3, got \[1\]"),
        ("feather", dict(layers=0), "layers: expected a whole number from 1 to 3, got 0"),
        ("feather", dict(layers=(1, 2, 3)), "layers: expected at most two"),
        ("feather", dict(stride=0), "stride: expected a whole number from 1"),
        ("aim", dict(begin=2, end=2), "end: expected a layer after begin, 2, got 2"),
        ("aim", dict(rounds=0), "rounds: expected a whole number from 1 to 100, got 0"),
    ],
)
def test_wrong_options_are_named(folder: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        minifocus.load(folder, name, **options)


def test_options_of() -> None:
    assert methods.options_of("fastv") == {"ratio", "keep", "layer"}
    with pytest.raises(minifocus.InputError, match="sampler: expected one of"):
        methods.options_of("best")
