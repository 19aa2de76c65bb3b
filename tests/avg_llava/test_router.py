"""AVG-LLaVA's text filter and router against loops and layers written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checkpoints import TILE, add_tokenizer, build, make_inputs, noise, save

import minifocus
from minifocus import figure
from minifocus.avg_llava.router import HEADS, Router, filter_text
from minifocus.avg_llava.sampler import AVGLLaVA
from minifocus.figure import draw_answers
from minifocus.inputs.model_inputs import split_pixels

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_router(
    width: int = 16, slots: int = 11, choices: int = 3, attention: Any = "tokens", seed: int = 1
) -> Router:
    """In evaluation, with biases and norms that matter."""
    torch.manual_seed(seed)
    router = Router(width, slots, choices, attention).eval()
    for value in router.parameters():
        if value.dim() == 1:
            value.data += 0.3 * torch.randn(value.shape)
    return router


# ---- the text filter ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("words", "count"), [(7, 4), (4, 4), (3, 8), (1, 1), (0, 5), (40, 32)])
def test_words_are_taken_in_order_of_similarity(words: int, count: int, dtype: torch.dtype) -> None:
    thumbnail, text = randn(9, 12, seed=words).to(dtype), randn(words, 12, seed=count).to(dtype)
    means = []
    for word in text:
        cosines = [float(F.cosine_similarity(word.double(), token.double(), dim=0)) for token in thumbnail]
        means.append(sum(cosines) / len(cosines))
    best = sorted(range(words), key=lambda number: -means[number])[:count]
    expected = torch.cat([text[best], torch.zeros(max(0, count - words), 12, dtype=dtype)])
    found = filter_text(thumbnail, text, count)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_equal_words_keep_their_order_and_zeros_are_no_nan() -> None:
    """Equal ones are equally alike wherever they stand, with autocast too: no rounding depends on a word's place."""
    for width in (24, 40, 96):
        thumbnail, text = randn(16, width), randn(31, width, seed=1)
        for power, number in enumerate(range(4, 31, 5)):
            text[number] = text[4] * 2.0**power if power else text[4]  # the same direction, told apart by their lengths
        text[30] = 0
        found = filter_text(thumbnail, text, 31)
        assert bool(found.isfinite().all()) and sum(bool((row == 0).all()) for row in found) == 1
        same = [row for row in found if bool(row.any()) and float(F.cosine_similarity(row, text[4], dim=0)) > 0.999]
        lengths = [float(row.norm() / text[4].norm()) for row in same]
        assert lengths == [2.0**power for power in range(6)]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(filter_text(thumbnail, text, 31), found)
        assert torch.equal(filter_text(torch.zeros(4, width), text, 3), text[:3])  # all equal: the first


# ---- the router ----


def layer_by_hand(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A post-norm encoder layer [S, C], attention within the S rows, head by head."""
    attention, width = layer.self_attn, x.shape[1]
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).split(width, dim=1)
    heads, size = [], width // HEADS
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        weights = (q[:, own] @ k[:, own].T / size**0.5).softmax(dim=1)
        heads.append(weights @ v[:, own])
    mixed = torch.cat(heads, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias

    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias

    x = norm(x + mixed, layer.norm1)
    inner = (x @ layer.linear1.weight.T + layer.linear1.bias).clamp(min=0)
    return norm(x + inner @ layer.linear2.weight.T + layer.linear2.bias, layer.norm2)


def router_by_hand(router: Router, visual: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """One prompt: [T, N, C], [K, C] → [choices]."""
    x = torch.stack([torch.cat([view, words]) for view in visual])
    if router.attention == "tokens":
        x = torch.stack([layer_by_hand(router.merger, view) for view in x])
    else:
        x = torch.stack([layer_by_hand(router.merger, x[:, slot]) for slot in range(x.shape[1])], dim=1)
    first, _, last = router.router
    votes = []
    for view in x:
        total = torch.zeros(last.bias.shape, dtype=x.dtype)
        for slot, token in enumerate(view):
            hidden = first.weight @ token + first.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            total = total + router.voter[slot, 0] * (last.weight @ hidden + last.bias)
        votes.append(total)
    mean = sum(votes) / len(votes)
    assert isinstance(mean, torch.Tensor)
    centred = mean - mean.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * router.norm.weight + router.norm.bias


@pytest.mark.parametrize("attention", ["tokens", "views"])
@pytest.mark.parametrize("views", [1, 3])
def test_the_router_by_hand(attention: str, views: int) -> None:
    router = random_router(attention=attention).double()
    visual, words = randn(views, 7, 16, seed=2).double(), randn(5, 4, 16, seed=3).double()
    with torch.no_grad():
        found = router(visual, words)
        expected = torch.stack([router_by_hand(router, visual, own) for own in words])
        assert found.shape == (5, 3)
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)
        # Nor do prompts see one another, in training mode's slower way neither.
        singly = torch.cat([router(visual, words[i : i + 1]) for i in range(5)])
        assert torch.allclose(found, singly, rtol=0, atol=1e-12)
    with_gradient = router(visual, words)
    assert torch.allclose(found, with_gradient, rtol=0, atol=1e-9) and with_gradient.requires_grad


def test_the_released_form_is_torch_s_layer_given_the_axes_in_the_other_order() -> None:
    """Spec A3: a layer with batch_first False, fed [T, N, D]."""
    router = random_router(attention="views")
    torch.manual_seed(7)
    theirs = torch.nn.TransformerEncoderLayer(16, HEADS, 16).eval()
    theirs.load_state_dict(router.merger.state_dict())
    visual, words = randn(3, 7, 16, seed=2), randn(1, 4, 16, seed=3)
    with torch.no_grad():
        x = theirs(torch.cat([visual, words.expand(3, -1, -1)], dim=1))
        logits = (router.router(x) * router.voter).sum(dim=1).mean(dim=0)
        expected = F.layer_norm(logits, (3,), router.norm.weight, router.norm.bias)
        assert torch.allclose(router(visual, words)[0], expected, rtol=0, atol=1e-5)
        assert not torch.allclose(random_router(attention="tokens")(visual, words)[0], expected, rtol=0, atol=1e-2)


def test_names_shapes_and_first_values_are_the_public_code_s() -> None:
    """Spec A3's table, at the public model's width: 117 M parameters."""
    d, slots = 4096, 36 + 72 + 144 + 288 + 576 + 32
    with torch.device("meta"):
        router = Router(d, slots, 5)
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {
        "merger.self_attn.in_proj_weight": (3 * d, d),
        "merger.self_attn.in_proj_bias": (3 * d,),
        "router.0.weight": (d, d),
        "router.0.bias": (d,),
        "router.2.weight": (5, d),
        "router.2.bias": (5,),
        "voter": (1148, 1),
        "norm.weight": (5,),
        "norm.bias": (5,),
    }
    for name in ("self_attn.out_proj", "linear1", "linear2"):
        expected |= {f"merger.{name}.weight": (d, d), f"merger.{name}.bias": (d,)}
    for name in ("norm1", "norm2"):
        expected |= {f"merger.{name}.weight": (d,), f"merger.{name}.bias": (d,)}
    assert shapes == expected
    assert sum(value.numel() for value in router.parameters()) // 10**6 == 117
    layer = router.merger
    assert (layer.self_attn.num_heads, layer.norm_first, layer.dropout.p, layer.norm1.eps) == (8, False, 0.1, 1e-5)
    assert layer.activation is F.relu and layer.self_attn.dropout == layer.dropout1.p == layer.dropout2.p == 0.1

    torch.manual_seed(0)
    new = Router(256, 900, 5)
    assert float(new.router[0].weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert float(new.router[2].weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    bound = (6 / (256 + 3 * 256)) ** 0.5  # Xavier's, uniform
    assert bound * 0.99 < float(new.merger.self_attn.in_proj_weight.detach().abs().max()) <= bound
    assert float(new.voter.detach().std()) == pytest.approx(1, rel=0.1) and abs(float(new.voter.detach().mean())) < 0.15
    assert not new.merger.self_attn.in_proj_bias.any() and not new.merger.self_attn.out_proj.bias.any()
    assert bool((new.norm.weight == 1).all()) and not new.norm.bias.any()
    for width in (12, 4, 4095):
        with pytest.raises(minifocus.InputError, match=f"a multiple of 8 channels, got {width}"):
            Router(width, 10, 5)


@pytest.mark.parametrize("attention", ["tokens", "views"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_router_keeps_its_own_dtype(attention: str, dtype: torch.dtype) -> None:
    """It takes features of any other; with and without autocast, with and without a gradient, its numbers are close."""
    router = random_router(attention=attention)
    visual, words = randn(2, 7, 16, seed=2), randn(3, 4, 16, seed=3)
    exact = router(visual, words).detach()
    router = router.to(dtype)
    for given in (torch.float32, torch.bfloat16, torch.float16):
        for no_gradient in (True, False):
            with torch.inference_mode(no_gradient):
                found = router(visual.to(given), words.to(given))
            assert found.dtype == dtype and bool(found.isfinite().all())
            assert float((found.detach().float() - exact).abs().max()) < 0.15
    if dtype == torch.float16:  # which is not trained in
        return
    with torch.autocast("cpu", torch.bfloat16):
        found = router(visual.to(torch.bfloat16), words.to(torch.bfloat16))
    assert float((found.detach().float() - exact).abs().max()) < 0.15
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in router.parameters())


# ---- in a whole model ----


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> minifocus.Llava:
    """A random model with a random router, whose choices differ from picture to picture."""
    folder = save(build(request.param, seed=1), tmp_path_factory.mktemp(request.param))
    add_tokenizer(folder)
    model = minifocus.load(folder, "none")
    torch.manual_seed(5)
    model.begin_sampler("avg-llava")
    return model


SIZES = [[(57, 91)], [], [(30, 90), (100, 31)], [(57, 91)], [(5, 5)], [(90, 90), (28, 84), (31, 60)]]


def test_logits_in_a_model_are_those_of_the_router_by_hand(model: minifocus.Llava) -> None:
    """Whole tiles go in, all granularities from coarse to fine, then the question's words by similarity."""
    sampler = model.before_llm
    assert isinstance(sampler, AVGLLaVA) and sampler.router is not None
    assert sampler.granularities == (1, 2, 4, 8, 16)
    inputs = make_inputs(model, [[(57, 91)]], seed=3)
    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    with torch.no_grad():
        (features,) = model.encode_pictures(tiles, sizes)
        views = features.views
        assert views.shape[:3] == ((5 if model.config.anyres else 1), 4, 4)
        words = randn(50, 32, seed=2)
        visual = []
        for down, across in [(4, 4), (2, 4), (2, 2), (1, 2), (1, 1)]:
            for row in range(0, 4, down):
                for column in range(0, 4, across):
                    visual.append(views[:, row : row + down, column : column + across].mean(dim=(1, 2)))
        filtered = filter_text(views[0].flatten(0, 1), words, 32)
        expected = router_by_hand(sampler.router, torch.stack(visual, dim=1), filtered)
        assert torch.allclose(sampler.route(views, [words])[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", ["question", "prompt", "nothing"])
def test_the_words_that_a_router_is_given(model: minifocus.Llava, text: Any) -> None:
    """At inference: those of the question, of the whole prompt, or none."""
    before = model.before_llm
    heard: list[torch.Tensor] = []
    try:
        model.begin_sampler("avg-llava", text=text)
        route = AVGLLaVA.route

        def listening(self: AVGLLaVA, views: torch.Tensor, words: list[torch.Tensor]) -> torch.Tensor:
            heard.extend(words)
            return route(self, views, words)

        with mock.patch.object(AVGLLaVA, "route", listening):
            model.generate(noise(57, 91), "what is it?", max_new_tokens=1)
    finally:
        model.before_llm = before
    assert model.tokenizer is not None
    written = "USER: \nwhat is it? ASSISTANT:" if text == "prompt" else "what is it?"
    expected = [model.tokenizer.encode(letter).ids[-1] for letter in written]
    table = model.language_model.model.embed_tokens.weight
    ids = [int((table == word).all(dim=1).nonzero()) for word in heard[0]]
    assert len(heard) == 1 and ids == {"prompt": [1, *expected], "question": expected, "nothing": []}[text]


def test_a_row_does_not_depend_on_the_others(model: minifocus.Llava) -> None:
    """Choices and logits, with several pictures, none, and padding at either end."""
    rows = SIZES if model.config.anyres else [[(TILE, TILE)] * len(own) for own in SIZES]
    chosen = set()
    for side in ("left", "right"):
        inputs = make_inputs(model, rows, seed=1, side=side)
        tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
        with torch.inference_mode():
            features = model.encode_pictures(tiles, sizes, model.before_llm)
            ids, mask = inputs.input_ids, inputs.attention_mask
            _, together = model.embed(ids, features, mask, before_llm=model.before_llm)
            first = 0
            for row, own in enumerate(rows):
                mine, first = features[first : first + len(own)], first + len(own)
                keep = mask[row].bool()
                _, (alone,) = model.embed(ids[row : row + 1, keep], mine, before_llm=model.before_llm)
                for a, b in zip(together[row], alone, strict=True):
                    assert a.choice is not None and b.choice is not None
                    assert torch.equal(a.choice, b.choice) and torch.equal(a.tokens, b.tokens)
                    chosen.add(int(a.choice))
    assert len(chosen) > 1


def test_answers_name_the_granularity(model: minifocus.Llava) -> None:
    """One by one, in a batch and as a stream, with several pictures and with none; and a forced one needs no router."""
    prompts = ["what is it?", "and now?", "why", "which one is it?", "a?"]
    pictures: list[Any] = [noise(57, 91), [], [noise(30, 90), noise(100, 31)], noise(90, 90), noise(7, 300)]
    options: dict[str, Any] = {"max_new_tokens": 3}
    batch = model.generate_batch(pictures, prompts, **options)
    for picture, prompt, answer in zip(pictures, prompts, batch, strict=True):
        alone = model.generate(picture, prompt, **options)
        stream = model.stream(picture, prompt, **options)
        assert "".join(stream).strip() == alone.text == answer.text
        for traced in (alone, answer, stream.answer):
            assert traced is not None and traced.tokens == alone.tokens
            number = 1 if not isinstance(picture, list) else len(picture)
            assert len(traced.pictures) == number
            for ours, theirs in zip(traced.pictures, alone.pictures, strict=True):
                assert ours.choice is not None and ours.choice.shape == (1, 1) and ours.choice.dtype == torch.int64
                assert torch.equal(ours.choice, theirs.choice) and torch.equal(ours.entered, theirs.entered)
    assert batch[1].tokens.full == 0 and not batch[1].pictures
    sampler = model.before_llm
    try:
        counts = []
        for number, tokens in enumerate((1, 2, 4, 8, 16)):
            model.set_sampler("avg-llava", granularity=tokens)
            assert isinstance(model.before_llm, AVGLLaVA) and model.before_llm.router is None
            answers = model.generate_batch(pictures, prompts, **options)
            assert all(int(traced.choice) == number for answer in answers for traced in answer.pictures)
            counts.append(answers[0].tokens.after_vision)
            model.set_sampler("avg-llava", granularity=tokens, crop="released")
            cropped = model.generate(pictures[0], prompts[0], **options)
            assert cropped.tokens.after_vision <= answers[0].tokens.after_vision
            drawn = draw_answers(
                [pictures[0]], [(prompts[0], answers[0]), (prompts[0], cropped)], model.image_processor
            )
            assert 2 * 400 < drawn.width < 3 * 400  # the scales for each question, and nothing beside them
            seen = pictures[0].crop(model.image_processor.seen((pictures[0].height, pictures[0].width)))  # type: ignore[union-attr]
            for place, answer in enumerate((answers[0], cropped)):
                panel = figure._draw_scales(figure._fit(seen), answer.pictures[0])
                left = figure.MARGIN + place * (panel.width + figure.MARGIN)
                top = drawn.height - panel.height - figure.MARGIN
                shown = drawn.crop((left, top, left + panel.width, top + panel.height))
                assert shown.tobytes() == panel.tobytes()
        assert counts == sorted(set(counts)) and counts[-1] == batch[0].tokens.full
        model.set_sampler("avg-llava", granularity="finest")
        finest = model.generate_batch(pictures, prompts, **options)
        model.set_sampler("none")
        for ours, plain in zip(finest, model.generate_batch(pictures, prompts, **options), strict=True):
            assert ours.token_ids == plain.token_ids and ours.tokens == plain.tokens
    finally:
        model.before_llm = sampler


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_and_a_router_of_other_dtypes(model: minifocus.Llava, tmp_path: Path, dtype: str, stored: Any) -> None:
    assert isinstance(model.before_llm, AVGLLaVA) and model.before_llm.router is not None
    model.before_llm.router.to(stored)
    try:
        model.save(tmp_path)
    finally:
        model.before_llm.router.float()
    low = minifocus.load(tmp_path, "avg-llava", dtype=dtype)
    assert isinstance(low.before_llm, AVGLLaVA) and low.before_llm.router is not None
    assert {value.dtype for value in low.before_llm.parameters()} == {stored} and low.dtype != torch.float32
    answer = low.generate(noise(57, 91), "what is it?", max_new_tokens=2)
    assert 0 <= int(answer.pictures[0].choice or 0) < 5
    # Features in the model's dtype, so a decision may differ from float32's only where logits are close.
    inputs = make_inputs(low, [[(TILE, TILE)]], seed=3)
    tiles, sizes = split_pixels(low.config, inputs.pixel_values, inputs.image_sizes)
    with torch.inference_mode():
        logits = low.before_llm.route(low.encode_pictures(tiles, sizes)[0].views, [randn(6, 32)])
        exact = model.before_llm.route(model.encode_pictures(tiles, sizes)[0].views, [randn(6, 32)])
    assert bool(logits.isfinite().all()) and float((logits.float() - exact).abs().max()) < 0.3
