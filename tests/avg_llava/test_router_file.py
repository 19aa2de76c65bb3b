"""The router's file, and the folder that it is in: saved, read strictly, and known by its content."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TILE, add_tokenizer, build, copy_with_projector, make_inputs, noise, save
from safetensors.torch import load_file, safe_open, save_file

import minifocus
from minifocus.avg_llava.sampler import AVGLLaVA, RouterOptions
from minifocus.inputs.model_inputs import split_pixels
from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions
from minifocus.training.model_digest import digest_of_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROUTER, SELECTOR = "router.safetensors", "selector.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build("llava_next", seed=1), tmp_path_factory.mktemp("plain"))
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def routed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a router of its own options."""
    folder = tmp_path_factory.mktemp("routed")
    begun(plain, granularities=[2, 8, 16], filtered_text=5, attention="views", text="prompt").save(folder)
    return folder


def begun(folder: Path, seed: int = 5, **options: Any) -> minifocus.Llava:
    model = minifocus.load(folder, "none")
    torch.manual_seed(seed)
    model.begin_sampler("avg-llava", **options)
    return model


def sampler_of(model: minifocus.Llava) -> AVGLLaVA:
    assert isinstance(model.before_llm, AVGLLaVA)
    return model.before_llm


def choices(model: minifocus.Llava) -> list[int]:
    inputs = make_inputs(model, [[(20 + 9 * n, 90 - 7 * n)] for n in range(8)], seed=2)
    tiles, sizes = split_pixels(model.config, inputs.pixel_values, inputs.image_sizes)
    with torch.inference_mode():
        features = model.encode_pictures(tiles, sizes, model.before_llm)
        _, pictures = model.embed(inputs.input_ids, features, inputs.attention_mask, before_llm=model.before_llm)
    found = [visual.choice for own in pictures for visual in own]
    return [int(choice) for choice in found if choice is not None]


def test_what_is_saved_chooses_the_same(plain: Path, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {},
        {"granularities": [1, 4, 16], "filtered_text": 3, "attention": "views", "text": "prompt", "crop": "released"},
    ]
    for number, options in enumerate(given):
        model = begun(plain, **options)
        folder = tmp_path / str(number)
        model.save(folder)
        with safe_open(folder / ROUTER, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "minifocus-router"
        assert metadata["granularities"] == ("1,4,16" if options else "1,2,4,8,16")
        loaded = minifocus.load(folder, "avg-llava")
        expected = RouterOptions(**{"granularities": (1, 2, 4, 8, 16), **options})
        assert sampler_of(loaded).options == expected and not loaded.training
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert choices(loaded) == choices(model) and len(set(choices(model))) > 1
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again" / ROUTER).read_bytes() == (folder / ROUTER).read_bytes()


def test_options_may_be_repeated_but_not_contradicted(plain: Path, routed: Path) -> None:
    own: dict[str, Any] = {"granularities": (2, 8, 16), "filtered_text": 5, "attention": "views", "text": "prompt"}
    own["crop"] = "whole"
    model = minifocus.load(routed, "avg-llava", **own)
    assert asdict(sampler_of(model).options) == own
    expected = choices(model)
    for name, value in own.items():
        assert choices(minifocus.load(routed, "avg-llava", **{name: value})) == expected
    assert choices(minifocus.load(routed, "avg-llava", granularities=None, router=None)) == expected
    others: dict[str, Any] = {"granularities": [2, 8], "filtered_text": 6, "attention": "tokens", "text": "question"}
    for name, value in {**others, "crop": "released"}.items():
        with pytest.raises(minifocus.InputError, match=rf"^{name}: the router in .*{ROUTER} was trained with "):
            minifocus.load(routed, "avg-llava", **{name: value})
    for name, wrong in {
        "granularities": [3, 4], "filtered_text": 0, "attention": "both", "text": "all", "crop": "half",
        "granularity": 3, "router": 5, "ratio": 0.5,
    }.items():  # fmt: skip
        with pytest.raises(minifocus.InputError, match=rf"^{name}: "):
            minifocus.load(routed, "avg-llava", **{name: wrong})
    for falls in ([16, 2], [2, 2], []):
        with pytest.raises(minifocus.InputError, match=r"^granularities: "):
            begun(plain, granularities=falls)


def test_a_router_s_file_can_be_named(plain: Path, routed: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copy(routed / ROUTER, file)
    expected = choices(minifocus.load(routed, "avg-llava"))
    assert choices(minifocus.load(plain, "avg-llava", router=file)) == expected
    model = minifocus.load(plain, "none")
    model.set_sampler("avg-llava", router=str(file))
    assert choices(model) == expected
    with pytest.raises(
        minifocus.CheckpointError, match=r"router.safetensors: this folder has no trained router. Pass "
    ):
        minifocus.load(plain, "avg-llava")
    with pytest.raises(minifocus.InputError, match=r"^router: expected a router's file, got "):
        minifocus.load(plain, "avg-llava", router=tmp_path / "none")
    with pytest.raises(minifocus.InputError, match=r"^router: expected none where the granularity is forced"):
        minifocus.load(plain, "avg-llava", router=file, granularity=4)
    with pytest.raises(minifocus.InputError, match=r"^router: expected none, as a new one begins"):
        model.begin_sampler("avg-llava", router=file)
    with pytest.raises(minifocus.InputError, match="expected one that learns"):
        model.begin_sampler("avg-llava", granularity=4)


def test_a_forced_granularity_needs_no_router(plain: Path, routed: Path) -> None:
    for folder in (plain, routed):
        for granularity, number in {"coarsest": 0, 1: 0, 4: 2, 16: 4, "finest": 4}.items():
            model = minifocus.load(folder, "avg-llava", granularity=granularity)
            assert sampler_of(model).router is None and choices(model) == [number] * 8
        model = minifocus.load(folder, "avg-llava", granularity=8, granularities=[2, 8])
        assert choices(model) == [1] * 8
    for wrong in (3, "middle", 0, True, 16.0, [16]):
        with pytest.raises(minifocus.InputError, match=r"^granularity: expected "):
            minifocus.load(plain, "avg-llava", granularity=wrong)
    with pytest.raises(minifocus.InputError, match=r"^granularity: expected 2 or 8, got 16"):
        minifocus.load(plain, "avg-llava", granularity=16, granularities=[2, 8])


Change = Callable[[dict[str, str], dict[str, torch.Tensor]], Any]
BAD: dict[str, tuple[Change, str]] = {
    "no metadata": (lambda m, t: m.clear(), "metadata: expected format=minifocus-router, got None"),
    "a selector's": (lambda m, t: m.update(format="minifocus-selector"), "metadata: expected format=minifocus-router"),
    **{
        f"no {name}": (lambda m, t, name=name: m.pop(name), "metadata: expected granularities, filtered_text")  # type: ignore[misc]
        for name in ("granularities", "filtered_text", "attention", "text", "crop")
    },
    "words": (lambda m, t: m.update(granularities="2,all"), "metadata: expected granularities, filtered_text, attention"),
    "a gap": (lambda m, t: m.update(granularities="2,,16"), "metadata: expected granularities, filtered_text, attention"),
    "another grid's": (lambda m, t: m.update(granularities="36,72,144"), "metadata: granularities: expected one of 1, 2"),
    "falling": (lambda m, t: m.update(granularities="16,8,2"), "metadata: granularities: expected them from coarse"),
    "no words": (lambda m, t: m.update(filtered_text="0"), "metadata: filtered_text: expected a whole number from 1"),
    "half a word": (lambda m, t: m.update(filtered_text="0.5"), "metadata: expected granularities, filtered_text"),
    "many words": (lambda m, t: m.update(filtered_text=str(10**30)), "metadata: filtered_text: expected a whole number"),
    "attention": (lambda m, t: m.update(attention="all"), "metadata: attention: expected 'tokens' or 'views', got 'all'"),
    "text": (lambda m, t: m.update(text="all"), "metadata: text: expected one of 'question', 'prompt', 'nothing', got 'all'"),
    "crop": (lambda m, t: m.update(crop=""), "metadata: crop: expected 'whole' or 'released', got ''"),
    "slots": (lambda m, t: m.update(filtered_text="6"), r"expected tensors {'voter': (32, 1)}, found {'voter': (31, 1)}"),
    "choices": (lambda m, t: m.update(granularities="2,16"), "expected tensors {'norm.bias': (2,)"),
    "missing": (lambda m, t: t.pop("voter"), "expected tensors {'voter': (31, 1)}, found {}"),
    "more": (lambda m, t: t.update(more=torch.ones(2)), "expected tensors {}, found {'more': (2,)}"),
    "shape": (lambda m, t: t.update(voter=t["voter"].T.contiguous()), "expected tensors {'voter': (31, 1)}, found {'voter': (1,"),
    "nan": (lambda m, t: t["voter"].fill_(float("nan")), "voter: expected finite floating-point values"),
    "infinite": (lambda m, t: t["norm.bias"].fill_(float("inf")), "norm.bias: expected finite floating-point values"),
    "whole numbers": (lambda m, t: t.update(voter=t["voter"].long()), "voter: expected finite floating-point values, got"),
    "two dtypes": (lambda m, t: t.update(voter=t["voter"].half()), "expected all in one of float32, bfloat16, float16"),
    "double": (lambda m, t: t.update({n: v.double() for n, v in t.items()}), "expected all in one of float32, bfloat16, float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(plain: Path, routed: Path, tmp_path: Path, name: str) -> None:
    """With the file's name, whether it is the folder's own or another."""
    change, words = BAD[name]
    tensors = load_file(routed / ROUTER)
    with safe_open(routed / ROUTER, "pt") as file:
        metadata = file.metadata()
    change(metadata, tensors)
    bad = tmp_path / ROUTER
    save_file(tensors, bad, metadata or None)
    with pytest.raises(minifocus.CheckpointError, match=re.escape(f"{bad}: {words}")):
        minifocus.load(plain, "avg-llava", router=bad)
    shutil.copytree(plain, tmp_path / "model")
    shutil.copy(bad, tmp_path / "model" / ROUTER)
    with pytest.raises(minifocus.CheckpointError, match=re.escape(f"model/{ROUTER}: {words}")):
        minifocus.load(tmp_path / "model", "avg-llava")
    minifocus.load(tmp_path / "model", "avg-llava", granularity="finest")  # and nobody else minds


@pytest.mark.parametrize("content", [b"", b"nonsense" * 9, b"\xff" * 8])
def test_what_is_no_safetensors(plain: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / ROUTER).write_bytes(content)
    with pytest.raises(minifocus.CheckpointError, match=rf"{ROUTER}: not readable as safetensors: "):
        minifocus.load(plain, "avg-llava", router=tmp_path / ROUTER)


def test_a_folder_keeps_what_it_has_and_others_get_what_is_used(plain: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(plain, own)
    save_selector(own / SELECTOR, LinearSelector(16, 3), VisionGuidedOptions())
    selector = (own / SELECTOR).read_bytes()

    model = begun(own)
    model.save(own)  # a router beside the selector
    router = (own / ROUTER).read_bytes()
    assert (own / SELECTOR).read_bytes() == selector
    model.save(tmp_path / "a")
    assert (tmp_path / "a" / ROUTER).read_bytes() == router and not (tmp_path / "a" / SELECTOR).exists()

    model.set_sampler("vision")
    model.save(own)
    assert (own / ROUTER).read_bytes() == router and (own / SELECTOR).read_bytes() == selector
    model.save(tmp_path / "b")
    assert (tmp_path / "b" / SELECTOR).read_bytes() == selector and not (tmp_path / "b" / ROUTER).exists()
    for name, options in (("none", {}), ("avg-llava", {"granularity": 4})):
        model.set_sampler(name, **options)  # type: ignore[arg-type]
        model.save(own)
        assert (own / ROUTER).read_bytes() == router and (own / SELECTOR).read_bytes() == selector
        model.save(tmp_path / name)
        assert not (tmp_path / name / ROUTER).exists() and not (tmp_path / name / SELECTOR).exists()
        model.save(tmp_path / "a")  # a save replaces a model: what the old one had learned goes
        assert not (tmp_path / "a" / ROUTER).exists()
    model.set_sampler("avg-llava")
    assert choices(model) == choices(minifocus.load(own, "avg-llava"))

    sampler_of(model).router.voter.data[3] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(minifocus.InputError, match=r"router\.voter: expected finite values"):
        model.save(own)
    assert (own / ROUTER).read_bytes() == router


def test_a_router_beside_other_weights_is_another_model_s(plain: Path, routed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(routed, folder)
    model = minifocus.load(folder, "none")
    other = minifocus.load(folder, "avg-llava")
    other.language_model.lm_head.weight.data[5] += 1
    other.save(folder)
    with pytest.raises(
        minifocus.CheckpointError, match=rf"{ROUTER}: is another model's: the weights beside it have changed"
    ):
        model.set_sampler("avg-llava")
    model.set_sampler("avg-llava", router=folder / ROUTER)  # by its name it is taken
    model.set_sampler("avg-llava", granularity="coarsest")
    assert other.before_llm is not None
    other.set_sampler("avg-llava")


def test_a_router_of_another_grid_or_width(plain: Path, routed: Path, tmp_path: Path) -> None:
    shutil.copy(routed / ROUTER, tmp_path / ROUTER)
    coarse = copy_with_projector(plain, tmp_path / "stf", {"name": "stf", "window": 2, "mbtf": False})
    with pytest.raises(minifocus.CheckpointError, match="metadata: granularities: expected one of 1, 2, 4, got 8"):
        minifocus.load(coarse, "avg-llava", router=tmp_path / ROUTER)
    wide, odd = (
        save(build("llava_next", seed=1, text_hidden_size=width, text_num_attention_heads=2), tmp_path / str(width))
        for width in (40, 36)
    )
    with pytest.raises(minifocus.CheckpointError, match="expected tensors {'merger.linear1.bias': "):
        minifocus.load(wide, "avg-llava", router=tmp_path / ROUTER)
    for act in (lambda: begun(odd), lambda: minifocus.load(odd, "avg-llava", router=tmp_path / ROUTER)):
        with pytest.raises(minifocus.InputError, match="a decoder of a multiple of 8 channels, got 36"):
            act()
    several = {"name": "stf", "window": 2, "tokens": 2, "mbtf": False}
    together = copy_with_projector(plain, tmp_path / "several", several)
    with pytest.raises(minifocus.InputError, match="AVG-LLaVA pools tokens that stand for one place each"):
        minifocus.load(together, "avg-llava", granularity="finest")


def test_a_model_s_digest_follows_its_router(plain: Path, routed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(routed, folder)
    before = digest_of_model(folder)
    assert before == digest_of_model(routed) != digest_of_model(plain)
    tensors = load_file(folder / ROUTER)
    with safe_open(folder / ROUTER, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / ROUTER, {name: metadata[name] for name in sorted(metadata, reverse=True)})
    assert digest_of_model(folder) == before
    save_file(tensors, folder / ROUTER, {**metadata, "text": "question"})
    assert digest_of_model(folder) != before
    tensors["voter"][7] += 1e-3
    save_file(tensors, folder / ROUTER, metadata)
    assert digest_of_model(folder) != before


def test_drawing_a_new_router_follows_the_generator_alone(plain: Path, routed: Path) -> None:
    """Reading one leaves the generator as it was."""
    first, second, third = (begun(plain, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["before_llm.router.voter"], third["before_llm.router.voter"])
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    model = minifocus.load(routed, "avg-llava")
    assert torch.equal(torch.rand(1), expected)
    assert model.generate(noise(TILE, TILE), "a?", max_new_tokens=1).pictures[0].choice is not None
