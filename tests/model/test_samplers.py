"""Both samplers inside a model: their rules, every option, order, positions, the KV cache, batches, training."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import IMAGE_TOKEN, build, make_inputs, rows_before_layer, save

import minifocus
from minifocus import methods
from minifocus.inputs.model_inputs import split_pixels
from minifocus.inputs.token_layout import Layout
from minifocus.llama import LayerCache
from minifocus.methods.variance_selector import VarianceSelector
from minifocus.ops.reference import split_regions
from minifocus.rows import Rows
from minifocus.samplers.hooks import Context, PictureFeatures
from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.text_guided import TextGuidedOptions, TextGuidedSampler
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler, pools_for
from minifocus.training.sampler_loss import balance_loss

SIZES = [
    [(57, 91)],
    [(30, 90), (100, 31)],
    [(50, 50), (1, 400), (400, 1)],
]  # the last leave maps without rows or columns
VISION = [dict(window=w) for w in (1, 2, 4, 8, 12)] + [
    dict(branches=7),
    dict(thumbnail="compress"),
    dict(thumbnail="drop"),
    dict(score_pool="mean", score_norm="layer"),
    dict(score_norm="cosine"),
]
TEXT = [dict(), dict(gamma=0.3), dict(keep=3), dict(text="all"), dict(rope=True), dict(layer=0), dict(layer=3)]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(request.param, seed=1), tmp_path_factory.mktemp(request.param))


def random_selector(folder: Path, **options: Any) -> Path:
    """A selector file with random weights, so that different regions get different scales."""
    full = VisionGuidedOptions(**options)
    selector = LinearSelector(16, len(pools_for(full.window, full.branches)), full.score_pool, full.score_norm)
    generator = torch.Generator().manual_seed(4)
    for value in selector.parameters():
        value.data = torch.randn(value.shape, generator=generator)
    file = folder / "random-selector.safetensors"
    save_selector(file, selector, full)
    return file


def with_selector(folder: Path, sampler: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and a random selector where the sampler has one."""
    if sampler not in ("focus", "vision"):
        return options
    vision = {k: v for k, v in options.items() if k in ("window", "branches", "score_pool", "score_norm")}
    return {**options, "selector": random_selector(folder, **vision)}


def load(folder: Path, sampler: str = "focus", **options: Any) -> minifocus.Llava:
    return minifocus.load(folder, sampler, **with_selector(folder, sampler, options))


@pytest.fixture(scope="module")
def shared(folder: Path) -> minifocus.Llava:
    """A model for tests that set a sampler first."""
    return minifocus.load(folder, "none")


# ---- the vision-guided sampler ----


def features(height: int, width: int, seed: int = 0, channels: int = 6, newline: bool = True) -> PictureFeatures:
    generator = torch.Generator().manual_seed(seed)
    thumbnail = torch.randn(4, 4, channels, generator=generator)
    line = torch.full((channels,), 99.0) if newline else None
    whole = torch.randn(height, width, channels, generator=generator)
    return PictureFeatures(whole, thumbnail, thumbnail.flatten(0, 1), line, None, thumbnail[None], (9, 9), 16)


@pytest.mark.parametrize("norm", ["none", "layer", "cosine"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_selector_equals_the_paper_s_two_products_with_or_without_a_norm_between(pool: str, norm: str) -> None:
    selector = LinearSelector(16, 3, pool, norm)
    torch.manual_seed(0)
    for value in selector.parameters():
        torch.nn.init.normal_(value)
    x, thumbnail = torch.randn(7, 10, 6), torch.randn(16, 6)
    regions, exists = split_regions(x, 4)
    folded = selector.eval()(regions, exists, thumbnail)

    expected = []
    for top in range(0, 7, 4):
        for left in range(0, 10, 4):
            cells = x[top : top + 4, left : left + 4].flatten(0, 1)
            pooled = cells.amax(dim=0) if pool == "max" else cells.mean(dim=0)
            score = pooled @ thumbnail.T / math.sqrt(6)
            if norm == "layer":
                score = (score - score.mean()) / score.std(correction=0)
            elif norm == "cosine":
                score = pooled @ thumbnail.T / (pooled.norm() * thumbnail.norm(dim=1))
            expected.append(selector.weight @ score + selector.bias)
    assert torch.allclose(folded, torch.stack(expected), atol=1e-5)
    assert torch.allclose(selector.train()(regions, exists, thumbnail), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer", "cosine"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_loaded_selector_chooses_by_its_own_scores(folder: Path, pool: str, norm: str) -> None:
    """The branch with the largest logit of the paper's formula, whichever operator finds it; another norm chooses otherwise."""
    file = random_selector(folder, score_pool=pool, score_norm=norm)
    sampler = minifocus.load(folder, sampler="vision", selector=file).before_llm
    assert isinstance(sampler, VisionGuidedSampler) and isinstance(sampler.selector, LinearSelector)
    picture = features(40, 36)
    size = torch.linspace(0.02, 1, 40)[:, None, None]  # from where the bias decides to where the scores do
    region = features(10, 9, seed=1).map.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
    picture = replace(picture, map=size * (picture.map + 2 * region), thumbnail=picture.thumbnail + 1)
    regions, _ = split_regions(picture.map, 4)
    pooled = regions.amax(dim=(1, 2)) if pool == "max" else regions.mean(dim=(1, 2))
    score = pooled @ picture.thumbnail.flatten(0, 1).T / math.sqrt(6)
    scores = {"none": score, "layer": (score - score.mean(1, True)) / score.std(1, correction=0, keepdim=True)}
    lengths = pooled.norm(dim=1)[:, None] * picture.thumbnail.flatten(0, 1).norm(dim=1)
    scores["cosine"] = score * math.sqrt(6) / lengths
    choices = {
        name: (one @ sampler.selector.weight.T + sampler.selector.bias).argmax(1) for name, one in scores.items()
    }
    choice = sampler(picture, torch.zeros(0, 6)).choice
    assert choice is not None and torch.equal(choice.flatten(), choices.pop(norm))
    assert all(not torch.equal(choice.flatten(), other) for other in choices.values())


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (8, 3), (1, 1), (0, 6), (13, 9)])
@pytest.mark.parametrize("newline", [True, False])
def test_tokens_stand_region_by_region_with_a_newline_after_each_row_of_regions(
    grid: tuple[int, int], newline: bool
) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, regions: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.eye(3)[torch.arange(len(regions)) % 3]

    picture = features(*grid, newline=newline)
    visual = VisionGuidedSampler(Fixed(), VisionGuidedOptions()).eval()(picture, torch.zeros(0, 6))

    tokens, source, number = list(picture.leading), list(range(16)), 0
    layout = Layout(16, *grid, newline, 4 * newline, 16)
    for top in range(0, grid[0], 4):
        for left in range(0, grid[1], 4):
            side = (4, 2, 1)[number % 3]
            number += 1
            for r in range(top, min(top + 4, grid[0]), side):
                for c in range(left, min(left + 4, grid[1]), side):
                    window = picture.map[r : min(r + side, top + 4), c : min(c + side, left + 4)]
                    tokens.append(window.amax(dim=(0, 1)))
                    source.append(16 + r * layout.row_length + c)
        if newline:
            tokens.append(picture.newline)
            source.append(16 + min(top + 4, grid[0]) * layout.row_length - 1)
    assert torch.equal(visual.tokens, torch.stack(tokens))
    assert visual.source.tolist() == source
    unscored = [bool((t == 99).all()) if newline else place < 16 for t, place in zip(tokens, source, strict=True)]
    assert layout.unscored(visual.source).tolist() == unscored
    assert visual.choice is not None and visual.choice.flatten().tolist() == [n % 3 for n in range(number)]


@pytest.mark.parametrize("thumbnail", ["keep", "compress"])
def test_extents_cover_every_cell_once(thumbnail: Any) -> None:
    options = VisionGuidedOptions(window=8, thumbnail=thumbnail)
    sampler = VisionGuidedSampler(VarianceSelector(3), options).eval()
    for height, width in ((9, 14), (3, 1), (0, 5), (5, 0)):
        visual = sampler(features(height, width), torch.zeros(0, 6))
        covered = torch.zeros(height, width)
        for cell, (down, across) in zip(
            visual.layout.cells(visual.source).tolist(), visual.extent.tolist(), strict=True
        ):
            if cell >= 0:
                row, column = divmod(cell, width)
                assert row + down <= height and column + across <= width
                covered[row : row + down, column : column + across] += 1
        assert bool((covered == 1).all())


def test_the_selector_computes_in_float32_under_autocast() -> None:
    selector = LinearSelector(16, 3)
    torch.nn.init.normal_(selector.weight)
    sampler, picture = VisionGuidedSampler(selector, VisionGuidedOptions()), features(9, 6)
    with torch.no_grad():
        for mode in (True, False):
            plain = sampler.train(mode)(picture, torch.zeros(0, 6))
            with torch.autocast("cpu", torch.bfloat16):
                under = sampler(picture, torch.zeros(0, 6))
            assert torch.equal(under.tokens, plain.tokens)
            assert not mode or torch.equal(under.logits, plain.logits)


def test_a_default_device_is_not_that_of_the_grid() -> None:
    sampler = VisionGuidedSampler(LinearSelector(16, 3), VisionGuidedOptions()).eval()
    picture, text = features(9, 6), torch.zeros(0, 6)
    with torch.device("meta"):
        sampler(picture, text)


def test_ties_go_to_the_coarsest_branch() -> None:
    visual = VisionGuidedSampler(LinearSelector(16, 3), VisionGuidedOptions()).eval()(features(8, 8), torch.zeros(0, 6))
    assert visual.choice is not None and visual.choice.tolist() == [[0, 0], [0, 0]]


def test_window_1_drops_or_keeps_single_cells() -> None:
    class Odd(torch.nn.Module):
        def forward(self, regions: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.eye(2)[torch.arange(len(regions)) % 2]

    picture = features(3, 4)
    visual = VisionGuidedSampler(Odd(), VisionGuidedOptions(window=1)).eval()(picture, torch.zeros(0, 6))
    assert visual.source.tolist() == [*range(16), 17, 19, 20, 22, 24, 25, 27, 29, 30]


@pytest.mark.parametrize("thumbnail, leading", [("keep", 16), ("compress", 4), ("drop", 0)])
def test_thumbnail_is_kept_compressed_or_dropped(thumbnail: Any, leading: int) -> None:
    class Middle(torch.nn.Module):
        def forward(self, regions: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.eye(3)[torch.ones(len(regions), dtype=torch.int64)]

    picture = features(4, 4)
    visual = VisionGuidedSampler(Middle(), VisionGuidedOptions(thumbnail=thumbnail)).eval()(picture, torch.zeros(0, 6))
    assert len(visual.tokens) == leading + 4 + 1
    assert visual.source[leading:].tolist() == [16, 18, 26, 28, 35]
    if thumbnail == "compress":
        assert visual.source[:4].tolist() == [0, 2, 8, 10]
        assert visual.logits is not None and len(visual.logits) == 2
        assert torch.equal(visual.tokens[0], picture.thumbnail[:2, :2].amax(dim=(0, 1)))


def test_variance_selector_gives_finer_scales_to_more_varied_regions() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4, 24, 5)
    for region in range(6):
        x[:, 4 * region : 4 * region + 4] = torch.randn(4, 4, 5) * (region + 1)
    regions, exists = split_regions(x, 4)
    assert VarianceSelector(3)(regions, exists, x).argmax(dim=-1).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("straight_through", [False, True, None])
def test_eq_2_factor_in_training(straight_through: bool | None) -> None:
    """None: the default, which is the factor's gradient alone."""
    torch.manual_seed(0)
    selector = LinearSelector(16, 3)
    torch.nn.init.normal_(selector.weight)
    options = (
        VisionGuidedOptions() if straight_through is None else VisionGuidedOptions(straight_through=straight_through)
    )
    sampler = VisionGuidedSampler(selector, options)
    picture = features(9, 6)
    plain = sampler.eval()(picture, torch.zeros(0, 6))
    trained = sampler.train()(picture, torch.zeros(0, 6))
    assert plain.logits is None and trained.logits is not None
    probability = trained.logits.detach().softmax(dim=-1).max(dim=-1).values
    factor = torch.ones(len(plain.tokens))
    region = plain.layout.cells(plain.source) // 6 // 4 * 2 + plain.layout.cells(plain.source) % 6 // 4
    mapped = plain.layout.cells(plain.source) >= 0
    if straight_through is False:
        factor[mapped] = probability[region[mapped]]
    assert torch.allclose(trained.tokens, plain.tokens * factor[:, None], atol=1e-6)
    (trained.tokens[:-1] ** 2).sum().backward()
    assert selector.weight.grad is not None and selector.weight.grad.abs().sum() > 0


def test_balance_loss_is_eq_3_to_5_and_10() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.5], [5.0, 0.0, 0.0]])
    probability = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.tolist()]
    shares = [3 / 4, 1 / 4, 0]
    means = [sum(row[s] for row in probability) / 4 for s in range(3)]
    plain = 0.1 * sum(f * p for f, p in zip(shares, means, strict=True))
    assert float(balance_loss(logits)) == pytest.approx(plain)
    weighted = 0.5 * sum(w * f * p for w, f, p in zip([1.1, 1.0, 0.9], shares, means, strict=True))
    assert float(balance_loss(logits, 0.5, torch.tensor([1.1, 1.0, 0.9]))) == pytest.approx(weighted)


# ---- the text-guided sampler ----


@pytest.mark.parametrize("options", [*TEXT, dict(text="last")])
@torch.inference_mode()
def test_selection_is_the_paper_s_rule(folder: Path, options: dict[str, Any]) -> None:
    """Eq. 6 to 9 written out with full attention matrices, one picture at a time."""
    model = minifocus.load(folder, sampler="none")
    inputs = make_inputs(model, SIZES, seed=2)
    instruction = torch.zeros_like(inputs.input_ids)
    instruction[:, -3:-1] = 1  # the last token belongs to the template
    instruction[1, :] = 0  # a row without an instruction: its last token speaks
    sampler = TextGuidedSampler(TextGuidedOptions(**options), model.config.text)
    rows, pictures = rows_before_layer(model, inputs, instruction, sampler.layer)
    layer = model.language_model.model.layers[sampler.layer]
    selection = sampler(sampler.layer, layer, rows, Context(pictures))
    assert selection is not None

    attention, heads = layer.self_attn, 4
    for row in range(3):
        hidden = layer.input_layernorm(rows.hidden[row])
        q = attention.q_proj(hidden).view(-1, heads, 8).transpose(0, 1)
        k = attention.k_proj(hidden).view(-1, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)
        if options.get("rope"):
            angles = rows.positions[row][:, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
            q = q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin
            k = k * cos + torch.cat([-k[..., 4:], k[..., :4]], -1) * sin
        expected = rows.valid[row].clone()
        for number in range(len(SIZES[row])):
            visual = ((rows.picture[row] == number) & ~rows.newline[row]).nonzero().squeeze(1)
            words = [c for c in range(len(hidden)) if rows.instruction[row, c] and c > visual.max()]
            if options.get("text") == "all":
                words = [c for c in range(len(hidden)) if rows.valid[row, c] and rows.picture[row, c] < 0]
            elif options.get("text") == "last" or not words:
                words = [len(hidden) - 1]
            scores = (q[:, words] @ k[:, visual].transpose(1, 2) / 8**0.5).softmax(-1).amax(0).mean(0)
            order = scores.argsort(descending=True, stable=True)
            share = scores[order].cumsum(0) / scores.sum()
            count = options.get("keep") or int((share <= options.get("gamma", 0.85)).sum()) + 1
            expected[visual] = False
            expected[visual[order[:count]]] = True
            assert torch.allclose(selection.scores[row, visual], scores, atol=1e-6)
        assert torch.equal(selection.kept[row], expected)


def test_default_layer_is_a_quarter_of_the_depth(folder: Path) -> None:
    model = minifocus.load(folder, sampler="text")
    assert isinstance(model.inside_llm, TextGuidedSampler)
    assert model.inside_llm.layer == 1


@torch.inference_mode()
def test_kept_tokens_keep_their_positions_and_order(folder: Path) -> None:
    model = minifocus.load(folder, sampler="text", keep=3)
    inputs = make_inputs(model, [[(57, 91)]], seed=2)
    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    rows, pictures = model.embed(inputs.input_ids, model.encode_pictures(tiles, sizes), before_llm=model.before_llm)
    caches = [LayerCache() for _ in range(4)]
    done = model.prefill(rows, pictures, caches)
    source = done.rows.source[0]
    assert torch.equal(done.rows.positions[0], source)  # nothing was pooled, so a token's position is its column
    assert bool((source.diff() > 0).all())
    scored = (inputs.input_ids[0] == IMAGE_TOKEN).sum() - int(rows.newline.sum())
    assert [cache.length for cache in caches] == [rows.hidden.shape[1]] + [rows.hidden.shape[1] - int(scored) + 3] * 3
    assert int(done.rows.newline.sum()) == int(rows.newline.sum())


# ---- both, in the model ----

BOTH = [
    *(("vision", options) for options in VISION),
    *(("text", options) for options in TEXT),
    ("focus", dict()),
    ("focus", dict(window=2, keep=4, layer=2)),
    *((name, {}) for name in methods.training_free()),
    ("avg-llava", dict(granularity="coarsest")),
    ("avgpool", dict(window=3, thumbnail="compress")),
    ("maxpool", dict(thumbnail="drop")),
    ("prumerge+", dict(ratio=0.4, per="map")),
    ("fastv", dict(keep=5, layer=3)),
    ("pyramiddrop", dict(ratio=0.7, layers=(0, 3))),
    ("feather", dict(second=0.5, stride=2)),
    ("aim", dict(ratio=0.3, begin=0, end=4, rounds=3)),
]


@pytest.mark.parametrize(("sampler", "options"), BOTH)
@torch.inference_mode()
def test_cache_equals_recomputation(
    folder: Path, shared: minifocus.Llava, sampler: str, options: dict[str, Any]
) -> None:
    """Decode eight given tokens one by one; then run prompt and tokens at once, with the same question guiding."""
    if "thumbnail" in options and "llava_next" not in folder.name:
        with pytest.raises(minifocus.InputError, match="thumbnail: LLaVA-1.5 has no thumbnail"):
            shared.set_sampler(sampler, **options)
        return
    model = shared
    model.set_sampler(sampler, **with_selector(folder, sampler, options))
    inputs = make_inputs(model, SIZES, seed=7)
    rows, columns = inputs.input_ids.shape
    instruction = torch.zeros_like(inputs.input_ids)
    instruction[:, -4:] = 1
    answer = torch.randint(3, IMAGE_TOKEN, (rows, 8), generator=torch.Generator().manual_seed(1))

    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    embedded, pictures = model.embed(
        inputs.input_ids,
        model.encode_pictures(tiles, sizes, model.before_llm),
        inputs.attention_mask,
        instruction,
        model.before_llm,
    )
    caches = [LayerCache() for _ in range(4)]
    prefilled = model.prefill(embedded, pictures, caches).rows
    hidden, positions = [prefilled.hidden[:, -1]], prefilled.positions[:, -1]
    for token in answer.T:
        positions = positions + 1
        hidden.append(model.language_model.model.decode(token, positions, caches))
    cached = model.language_model.lm_head(torch.stack(hidden, dim=1))

    if model.inside_llm is not None and (sampler not in ("text", "focus") or options.get("text") == "all"):
        model.inside_llm = PromptVotes(model.inside_llm, 8)  # the answer's tokens would have a say
    whole = model(
        torch.cat([inputs.input_ids, answer], dim=1),
        inputs.pixel_values,
        inputs.image_sizes,
        torch.cat([inputs.attention_mask, torch.ones_like(answer)], dim=1),
        torch.cat([instruction, torch.zeros_like(answer)], dim=1),
    )[:, columns - 1 :]
    assert (whole - cached).abs().max() <= 1e-5


class PromptVotes:
    """An inside-LLM sampler that is shown the prompt alone; the answer's tokens, columns beyond it, stay."""

    def __init__(self, sampler: Any, answer: int):
        self.sampler, self.answer = sampler, answer

    def prompt(self, rows: Rows) -> Rows:
        return Rows(**{field.name: getattr(rows, field.name)[:, : -self.answer] for field in fields(Rows)})

    def __call__(self, index: int, layer: Any, rows: Rows, context: Context) -> Any:
        if context.previous is not None:
            context = replace(context, previous=(context.previous[0], self.prompt(context.previous[1])))
        selection = self.sampler(index, layer, self.prompt(rows), context)
        if selection is None:
            return None
        kept, scores = (F.pad(value, (0, self.answer), value=1) for value in (selection.kept, selection.scores))
        return replace(selection, kept=kept, scores=scores)


@pytest.mark.parametrize(("sampler", "options"), BOTH)
@torch.inference_mode()
def test_batch_equals_single_rows(folder: Path, shared: minifocus.Llava, sampler: str, options: dict[str, Any]) -> None:
    if "thumbnail" in options and "llava_next" not in folder.name:
        with pytest.raises(minifocus.InputError, match="thumbnail: LLaVA-1.5 has no thumbnail"):
            shared.set_sampler(sampler, **options)
        return
    model = shared
    model.set_sampler(sampler, **with_selector(folder, sampler, options))
    inputs = make_inputs(model, SIZES, seed=9, side="right")
    batch = model(**inputs.arguments())
    picture = 0
    for row, own in enumerate(SIZES):
        length = int(inputs.attention_mask[row].sum())
        pixels = inputs.pixel_values[picture : picture + len(own)]
        sizes = inputs.image_sizes[picture : picture + len(own)] if inputs.image_sizes is not None else None
        picture += len(own)
        single = model(inputs.input_ids[row : row + 1, :length], pixels, sizes)
        # Matrix products of other shapes round otherwise: by up to 1.05e-5 here, where logits reach 10.
        assert torch.allclose(single[0], batch[row, :length], rtol=0, atol=2e-5, equal_nan=True)


@torch.inference_mode()
def test_removed_rows_are_nan_and_text_rows_never(folder: Path) -> None:
    model = load(folder, sampler="focus", gamma=0.5)
    inputs = make_inputs(model, SIZES, seed=3)
    missing = model(**inputs.arguments()).isnan().any(dim=-1)
    text = (inputs.input_ids != IMAGE_TOKEN) & inputs.attention_mask.bool()
    assert not bool(missing[text].any())
    assert bool(missing[inputs.input_ids == IMAGE_TOKEN].any())


@torch.inference_mode()
def test_all_fine_and_gamma_1_change_only_the_order(folder: Path) -> None:
    """With every region at 1×1 in windows of one cell and γ = 1 nothing is removed: the logits are the plain model's."""
    plain, model = minifocus.load(folder, sampler="none"), load(folder, sampler="focus", window=1, gamma=1.0)
    assert isinstance(model.before_llm, VisionGuidedSampler)
    with torch.no_grad():
        model.before_llm.selector.bias.copy_(torch.tensor([-1e6, 1e6]))
    inputs = make_inputs(plain, SIZES, seed=3)
    present = inputs.attention_mask.bool()
    assert (plain(**inputs.arguments()) - model(**inputs.arguments()))[present].abs().max() <= 1e-5


# ---- choosing and refusing ----


def test_names() -> None:
    trained = ["focus", "vision", "text", "none", "avg-llava"]
    before = "avgpool maxpool random uniform similarity fastervlm vtc-cls hired globalcom2 fopru prumerge prumerge+"
    assert methods.names() == [*trained, *before.split(), "fastv", "pyramiddrop", "feather", "aim"]


def test_variance_is_announced_in_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    minifocus.load(folder, sampler="vision", selector="variance")
    assert len(caplog.records) == 1
    assert "training-free" in caplog.text and len(caplog.text.strip().splitlines()) == 1


def test_no_selector_is_an_error_that_names_the_ways_out(folder: Path) -> None:
    with pytest.raises(minifocus.CheckpointError, match=r"selector\.safetensors.*selector='variance'.*sampler='text'"):
        minifocus.load(folder, sampler="focus")


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (
            "fastest",
            {},
            "sampler: expected one of focus, vision, text, none, avg-llava, avgpool, .*, aim, got 'fastest'",
        ),
        ("focus", dict(gama=0.5), "gama: not an option of sampler 'focus'; its options: .*gamma"),
        ("none", dict(gamma=0.5), "gamma: not an option of sampler 'none'; its options: none"),
        ("vision", dict(gamma=0.5, selector="variance"), "gamma: not an option of sampler 'vision'"),
        ("text", dict(gamma=0), "gamma: expected a number above 0"),
        ("text", dict(gamma=1.01), "gamma: expected .* got 1.01"),
        ("text", dict(gamma=math.nan), "gamma: expected .* got nan"),
        ("text", dict(gamma="0.5"), "gamma: expected .* got '0.5'"),
        ("text", dict(keep=0), "keep: expected a 64-bit whole number of at least 1, got 0"),
        ("text", dict(keep=10**30), "keep: expected a 64-bit .* got a whole number of 100 bits"),
        ("text", dict(layer=4), "layer: expected a whole number from 0 to 3, got 4"),
        ("text", dict(layer=-1), "layer: expected .* got -1"),
        ("text", dict(text="some"), "text: expected one of 'instruction', 'all', 'last', got 'some'"),
        ("text", dict(rope=1), "rope: expected True or False, got 1"),
        ("vision", dict(selector="variance", window=3), "window: expected one of .* got 3"),
        ("vision", dict(selector="variance", window=4.0), "window: expected one of .* got 4.0"),
        ("vision", dict(selector="variance", window=True), "window: expected one of .* got True"),
        ("vision", dict(selector="variance", branches=5), "branches: expected 3 or 7, got 5"),
        ("vision", dict(selector="variance", branches=[3]), r"branches: expected 3 or 7, got \[3\]"),
        ("vision", dict(selector="variance", score_pool="sum"), "score_pool: expected"),
        ("vision", dict(selector="variance", score_norm=1), "score_norm: expected"),
        ("vision", dict(selector="variance", thumbnail="maybe"), "thumbnail: "),
        ("vision", dict(selector=7), "selector: expected 'variance' or a selector's file, got 7"),
        ("vision", dict(selector="nofile"), "selector: expected 'variance' or a selector's file, got 'nofile'"),
        ("vision", dict(selector="variance", straight_through=None), "straight_through: expected"),
    ],
)
def test_wrong_options_are_named(folder: Path, sampler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        minifocus.load(folder, sampler=sampler, **options)


def test_a_selector_s_own_settings_hold(folder: Path) -> None:
    file = random_selector(folder, window=8, branches=7, score_pool="mean", score_norm="layer")
    model = minifocus.load(folder, sampler="vision", selector=file)
    assert isinstance(model.before_llm, VisionGuidedSampler)
    assert model.before_llm.options == VisionGuidedOptions(window=8, branches=7, score_pool="mean", score_norm="layer")
    with pytest.raises(
        minifocus.InputError, match="window: the selector in .*random-selector.* was trained with 8, got 4"
    ):
        minifocus.load(folder, sampler="vision", selector=file, window=4)


def test_bad_selector_files(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    good = {"format": "minifocus-selector", "window": "4", "branches": "3", "score_pool": "max", "score_norm": "none"}
    file = tmp_path / "s.safetensors"

    def refused(message: str) -> None:
        with pytest.raises((minifocus.CheckpointError, minifocus.InputError), match=message) as error:
            minifocus.load(folder, sampler="vision", selector=file)
        assert "s.safetensors" in str(error.value) or message.startswith("selector")

    refused("selector: expected 'variance' or a selector's file")
    file.write_bytes(b"nonsense")
    refused("not readable as safetensors")
    save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, file)
    refused("metadata: expected format=minifocus-selector")
    save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, file, metadata={**good, "window": "four"})
    refused("metadata: expected window, branches")
    save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, file, metadata={**good, "score_norm": "l1"})
    refused("s.safetensors: metadata: score_norm: expected one of")
    save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, file, metadata={**good, "window": "5"})
    refused("s.safetensors: metadata: window: expected one of")
    save_file({"weight": torch.zeros(3, 25), "bias": torch.zeros(3)}, file, metadata=good)
    refused(r"expected tensors .*\(3, 16\).* found .*\(3, 25\)")
    save_file({"weight": torch.full((3, 16), math.nan), "bias": torch.zeros(3)}, file, metadata=good)
    refused("weight: expected finite")
    save_file({"weight": torch.full((3, 16), 1e300, dtype=torch.float64), "bias": torch.zeros(3)}, file, metadata=good)
    refused("weight: expected finite")
    save_file(
        {"weight": torch.full((3, 16), math.nan).to(torch.float8_e4m3fn), "bias": torch.zeros(3)}, file, metadata=good
    )
    refused("weight: expected finite")
    save_file({"w" * 9999: torch.zeros(3, 16), "bias": torch.zeros(3)}, file, metadata=good)
    refused("expected tensors .{1,500}$")
