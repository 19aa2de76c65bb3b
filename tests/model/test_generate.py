"""The Python API of text and pictures, and the command line, on a small random model."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import add_tokenizer, build, save
from forked import python
from PIL import Image

import minifocus
from minifocus import figure
from minifocus.figure import draw_answers
from minifocus.generate import Generation, sample
from minifocus.inputs.token_layout import Layout
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler
from minifocus.trace import PictureTrace

ROOT = Path(__file__).resolve().parents[2]
SAMPLERS = [("none", {}), ("text", dict(gamma=0.5)), ("vision", {}), ("focus", dict(keep=5))]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build(request.param, seed=11), tmp_path_factory.mktemp(request.param))
    add_tokenizer(folder)
    return folder


def load(folder: Path, sampler: str = "none", **options: Any) -> minifocus.Llava:
    if sampler in ("vision", "focus"):
        options["selector"] = "variance"
    return minifocus.load(folder, sampler, **options)


def picture(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


# ---- answers ----


def test_answer_equals_transformers_generate(folder: Path) -> None:
    """Text in, text out, against the processor-and-generate of transformers, written with its parts."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    model = load(folder)
    answer = model.generate(picture(), "What is it?", max_new_tokens=20)

    assert model.image_processor is not None
    pixels, size = model.image_processor(picture())
    text = "USER: " + "<image>" * model.num_visual_tokens(size) + "\nWhat is it? ASSISTANT:"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    oracle_class = LlavaNextForConditionalGeneration if model.config.anyres else LlavaForConditionalGeneration
    inputs = (
        dict(pixel_values=pixels[None], image_sizes=torch.tensor([size]))
        if model.config.anyres
        else dict(pixel_values=pixels)
    )
    oracle = oracle_class.from_pretrained(folder)
    expected = oracle.generate(input_ids=ids, **inputs, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    ended = expected[-1] == 2
    assert answer.token_ids == (expected[:-1] if ended else expected)
    assert answer.finish == ("stop" if ended else "length")
    assert (
        answer.text == AutoTokenizer.from_pretrained(folder).decode(answer.token_ids, skip_special_tokens=True).strip()
    )


@pytest.mark.parametrize(("sampler", "options"), SAMPLERS)
@pytest.mark.parametrize("how", [dict(), dict(temperature=1.3, top_p=0.8, seed=4)])
def test_batch_equals_one_by_one(folder: Path, sampler: str, options: dict[str, Any], how: dict[str, Any]) -> None:
    model = load(folder, sampler, **options)
    images = [picture(70, 50), [picture(30, 90, 1), picture(200, 10, 2)], picture(40, 40, 3), None]
    prompts = ["What is it?", "Is <image> left of <image>, as I think it is?", "Where", "No picture at all"]
    batch = model.generate_batch(images, prompts, max_new_tokens=25, **how)
    for image, prompt, answer in zip(images, prompts, batch, strict=True):
        single = model.generate(image, prompt, max_new_tokens=25, **how)
        assert (answer.token_ids, answer.text, answer.finish) == (single.token_ids, single.text, single.finish)
        assert answer.tokens == single.tokens
        for ours, alone in zip(answer.pictures, single.pictures, strict=True):
            assert torch.equal(ours.kept, alone.kept) and torch.equal(ours.entered, alone.entered)
            assert torch.allclose(ours.importance, alone.importance, atol=1e-6, equal_nan=True)


def test_rows_that_end_early_do_not_disturb_the_others(folder: Path) -> None:
    """Make the token that one row would say first its end; the other rows go on as before."""
    model = load(folder)
    images, prompts = [picture(seed=s) for s in range(3)], ["one", "two", "three three"]
    before = model.generate_batch(images, prompts, max_new_tokens=12)
    stop = before[1].token_ids[0]
    model.config = replace(model.config, generation=replace(model.config.generation, eos_token_ids=(stop,)))
    after = model.generate_batch(images, prompts, max_new_tokens=12)
    assert after[1].token_ids == [] and after[1].finish == "stop" and after[1].text == ""
    for old, new in zip(before, after, strict=True):
        cut = old.token_ids.index(stop) if stop in old.token_ids else len(old.token_ids)
        assert new.token_ids == old.token_ids[:cut]


@pytest.mark.parametrize(("sampler", "options"), SAMPLERS)
def test_stream_gives_the_answer_s_text(folder: Path, sampler: str, options: dict[str, Any]) -> None:
    model = load(folder, sampler, **options)
    stream = model.stream(picture(), "What is it?", max_new_tokens=20)
    pieces = list(stream)
    answer = model.generate(picture(), "What is it?", max_new_tokens=20)
    assert stream.answer is not None and stream.answer.token_ids == answer.token_ids
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 3


def test_streaming_leaves_inference_mode_between_pieces(folder: Path) -> None:
    for _ in load(folder).stream(picture(), "What is it?", max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()


def test_a_stream_that_is_over_holds_its_answer_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    steps = Generation.tokens
    monkeypatch.setattr(Generation, "tokens", lambda run: runs.append(weakref.ref(run)) or steps(run))
    stream = load(folder).stream(picture(), "What is it?", max_new_tokens=5)
    pieces = [next(stream)]
    assert runs[0]() is not None and not runs[0]().inputs  # nor the pixels, once they are read
    pieces += stream
    gc.collect()
    assert runs[0]() is None
    assert stream.answer is not None and "".join(pieces).strip() == stream.answer.text


def test_a_model_in_training_answers_as_at_inference(folder: Path) -> None:
    """The sampler's factor of Eq. 2 is of training alone; the model is in training again afterwards."""
    model = load(folder, "vision")
    model.before_llm = VisionGuidedSampler(LinearSelector(16, 3), VisionGuidedOptions()).eval()  # p is a third
    expected = model.generate(picture(), "What is it?", max_new_tokens=20)
    model.train()
    model.multi_modal_projector.eval()
    modes = [module.training for module in model.modules()]
    meanwhile = []

    def look(module: torch.nn.Module, _: Any) -> None:
        """What another thread would find while the answer is made."""
        meanwhile.append(([m.training for m in model.modules()], module.training))
        model.set_sampler("none")

    model.before_llm.register_forward_pre_hook(look)
    sampler = model.before_llm
    answer = model.generate(picture(), "What is it?", max_new_tokens=20)
    assert answer.token_ids == expected.token_ids and answer.tokens == expected.tokens
    assert meanwhile == [(modes, False)] and model.before_llm is None
    model.before_llm = sampler
    assert [module.training for module in model.modules()] == modes


def test_a_sampler_that_is_set_meanwhile_is_the_next_question_s(folder: Path) -> None:
    model = load(folder, "vision")
    expected = model.generate(picture(), "What is it?", max_new_tokens=9)
    model.vision_tower.register_forward_pre_hook(lambda *_: model.set_sampler("none"))
    answer = model.generate(picture(), "What is it?", max_new_tokens=9)
    assert model.before_llm is None and answer.tokens == expected.tokens and answer.token_ids == expected.token_ids
    assert model.generate(picture(), "What is it?", max_new_tokens=9).tokens.after_vision == expected.tokens.full


def test_double_precision_answers_as_single(folder: Path) -> None:
    for sampler, options in SAMPLERS:
        model = load(folder, sampler, **options)
        expected = model.generate(picture(), "What is it?", max_new_tokens=9)
        answer = model.double().generate(picture(), "What is it?", max_new_tokens=9)
        assert answer.token_ids == expected.token_ids
        assert answer.pictures[0].importance.dtype == torch.float32
        assert torch.allclose(answer.pictures[0].importance, expected.pictures[0].importance, atol=1e-5, equal_nan=True)


def test_no_attention_kernel_plans_for_each_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's does, for 30 ms each on an H200; the switch is the process', and others find it as they left it."""
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((tensors[0].shape[2], torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = load(folder, "focus")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    model.generate(picture(), "What is it?", max_new_tokens=3)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert {enabled for _, enabled in seen} == {False}
    assert len({length for length, _ in seen}) >= 3  # of the tower, of the prompt, and of a token


def test_the_default_dtype_has_no_say(folder: Path) -> None:
    model = load(folder, "focus", keep=5)
    expected = model.generate(picture(), "What is it?", max_new_tokens=9)
    torch.set_default_dtype(torch.bfloat16)
    try:
        answer = load(folder, "focus", keep=5).generate(picture(), "What is it?", max_new_tokens=9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert answer.token_ids == expected.token_ids
    assert torch.equal(answer.pictures[0].importance.nan_to_num(-1), expected.pictures[0].importance.nan_to_num(-1))


def test_picture_as_path_image_or_list(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    file = tmp_path / "p.png"
    picture().save(file)
    answers = {
        model.generate(source, "What?", max_new_tokens=8).text for source in (file, str(file), picture(), [file])
    }
    assert len(answers) == 1


def test_token_accounting_is_section_4_4(folder: Path) -> None:
    model = load(folder, "focus", window=2, keep=5, layer=3)
    tokens = model.generate(picture(), "What?", max_new_tokens=1).tokens
    full = model.num_visual_tokens((50, 70))
    assert tokens.full == full
    assert tokens.after_text < tokens.after_vision < full
    removed = tokens.after_vision - tokens.after_text
    assert tokens.equivalent == pytest.approx((tokens.after_vision - removed + 3 * removed / 4) / full)
    plain = load(folder).generate(picture(), "What?", max_new_tokens=1).tokens
    assert (plain.full, plain.after_vision, plain.after_text, plain.equivalent) == (full, full, full, 1.0)


def test_instruction_is_the_question_without_the_template(folder: Path) -> None:
    """With text="instruction" only the question's characters vote."""
    model = load(folder, "text", gamma=0.5)
    seen: list[Any] = []
    inside = model.inside_llm
    assert inside is not None

    def spy(index: int, layer: Any, rows: Any, context: Any) -> Any:
        if index == 0:
            seen.append(rows)
        return inside(index, layer, rows, context)

    model.inside_llm = spy
    model.generate(picture(), "Where is it?", max_new_tokens=1)
    rows, tokenizer = seen[0], model.tokenizer
    assert tokenizer is not None
    assert int(rows.instruction.sum()) == len("Where is it?")
    last = rows.instruction[0].nonzero().max()
    assert rows.valid.shape[1] - 1 - int(last) == len(" ASSISTANT:")


def test_trace_says_what_was_kept(folder: Path) -> None:
    answer = load(folder, "focus", keep=5).generate(picture(), "Where?", max_new_tokens=1)
    (trace,) = answer.pictures
    assert len(trace.entered) == answer.tokens.after_vision and len(trace.kept) == answer.tokens.after_text
    assert set(trace.kept.tolist()) <= set(trace.entered.tolist())
    scored = ~trace.importance.isnan()
    best = trace.entered[scored][trace.importance[scored].argsort(descending=True, stable=True)[:5]]
    assert set(best.tolist()) <= set(trace.kept.tolist())
    cells = trace.layout.cells(trace.entered)
    covered = torch.zeros(trace.layout.height, trace.layout.width, dtype=torch.int64)
    for cell, (down, across) in zip(cells.tolist(), trace.extent.tolist(), strict=True):
        if cell >= 0:
            row, column = divmod(cell, trace.layout.width)
            covered[row : row + down, column : column + across] += 1
    assert bool((covered == 1).all())  # pooled tokens tile the map


# ---- sampling ----


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(logits, 1.0, generator)] += 1
    assert torch.allclose(counts / 4000, logits.softmax(0), atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.1, {0}), (0.64, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_likely_set(top_p: float, allowed: set[int]) -> None:
    """softmax(2, 1, 0, -1) is 0.644, 0.237, 0.087, 0.032."""
    generator = torch.Generator().manual_seed(1)
    drawn = {sample(torch.tensor([2.0, 1.0, 0.0, -1.0]), top_p, generator) for _ in range(800)}
    assert drawn == allowed


def test_seed_repeats_and_no_seed_varies(folder: Path) -> None:
    model = load(folder)
    ask = dict(max_new_tokens=12, temperature=2.0)
    same = {model.generate(picture(), "What?", seed=3, **ask).text for _ in range(2)}
    varied = {model.generate(picture(), "What?", **ask).text for _ in range(3)}
    assert len(same) == 1 and len(varied) > 1


def test_a_tiny_temperature_is_greedy(folder: Path) -> None:
    model = load(folder)
    cold = model.generate(picture(), "What?", max_new_tokens=8, temperature=5e-324)
    assert cold.token_ids == model.generate(picture(), "What?", max_new_tokens=8).token_ids


# ---- refusals ----


@pytest.mark.parametrize(
    ("image", "prompt", "options", "message"),
    [
        (picture(), "", {}, "prompt"),
        (picture(), "  \n", {}, "prompt"),
        (picture(), 7, {}, "prompt: expected text, got int"),
        (picture(), "<image> and <image>", {}, "expected one <image> for each of 1 pictures, got 2"),
        ([picture()] * 2, "<image>?", {}, "expected one <image> for each of 2 pictures, got 1"),
        (picture(), "no place", dict(template="raw"), "expected one <image> for each of 1 pictures, got 0"),
        (None, "<image>?", {}, "each of 0 pictures, got 1"),
        (picture(), "a" * 5000, {}, "more than the context length of 4096"),
        (picture(), "?", dict(template="alpaca"), "template: expected one of 'vicuna'"),
        (picture(), "?", dict(template=["vicuna"]), r"template: expected one of 'vicuna'.* got \['vicuna'\]"),
        (picture(), "?", dict(max_new_tokens=0), "max_new_tokens: expected .* got 0"),
        (picture(), "?", dict(temperature=-1), "temperature: expected .* got -1"),
        (picture(), "?", dict(temperature=float("nan")), "temperature"),
        (picture(), "?", dict(top_p=0), "top_p: expected .* got 0"),
        (picture(), "?", dict(seed="x"), "seed: expected .* got 'x'"),
        (picture(), "?", dict(max_length=5), "max_length: not an option of generation; its options: max_new_tokens"),
        ("nowhere.png", "?", {}, "nowhere.png"),
        (3, "?", {}, "image"),
    ],
)
def test_bad_input_is_named(folder: Path, image: Any, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        load(folder).generate(image, prompt, **options)


def test_lists_of_different_lengths(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(minifocus.InputError, match="as many of each, got 2 and 1"):
        model.generate_batch([picture(), picture()], ["?"])
    with pytest.raises(minifocus.InputError, match="as many of each"):
        model.generate_batch([], [])
    with pytest.raises(minifocus.InputError, match="images: expected a list .* got NoneType"):
        model.generate_batch(None, ["?"])  # type: ignore[arg-type]
    with pytest.raises(minifocus.InputError, match="prompts: expected a list .* got NoneType"):
        model.generate_batch([None], None)  # type: ignore[arg-type]


def test_answers_end_with_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(build("llava", seed=11, text_max_position_embeddings=64), tmp_path)
    add_tokenizer(folder)
    monkeypatch.setattr("minifocus.inputs.processor.Processor.stop_token_ids", lambda _: set())
    answer = load(folder).generate(picture(), "What?", max_new_tokens=1000)
    prompt = 16 + len("\nUSER: What? ASSISTANT:") + 1
    assert answer.finish == "length"
    assert len(answer.token_ids) == 64 - prompt + 1  # the last token said takes no place


def test_folder_without_a_tokenizer_loads_and_only_text_asks_for_it(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path)
    assert model(torch.tensor([[1, 5, 7]])).shape == (1, 3, 96)
    with pytest.raises(minifocus.CheckpointError, match=r"tokenizer\.json"):
        model.generate(picture(), "What?")


def test_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    key = "image_token_id" if "image_token_id" in config else "image_token_index"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 91}))
    with pytest.raises(minifocus.CheckpointError, match="image token 91"):
        load(tmp_path).generate(picture(), "What?")


def test_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    folder = save(build(seed=11), tmp_path)
    add_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["W"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(minifocus.CheckpointError, match="token 1000, but config.json's vocab_size is 96"):
        load(folder).generate(picture(), "What?")


@pytest.mark.parametrize("size", [(60000, 2), (2, 60000), (1, 1)])
@pytest.mark.parametrize("sampler", ["none", "focus"])
def test_extreme_pictures_are_answered_about(folder: Path, size: tuple[int, int], sampler: str) -> None:
    assert load(folder, sampler).generate(picture(*size), "What?", max_new_tokens=2).tokens.full >= 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input_ids=torch.tensor([1, 2])), r"input_ids: expected int64 \[rows, tokens\]"),
        (dict(input_ids=torch.tensor([[1.0]])), "input_ids: expected int64"),
        (dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)), "input_ids"),
        (dict(input_ids=torch.tensor([[1, 96]])), "input_ids: expected numbers from 0 to 95, got 1 to 96"),
        (dict(input_ids=torch.tensor([[-1, 5]])), "input_ids: expected numbers from 0"),
        (dict(input_ids=torch.tensor([[1, 90, 5]])), "picture 0 takes .* image placeholders in a run, got 1"),
        (dict(input_ids=torch.tensor([[1, 5]])), "pixel_values: 1 pictures more than input_ids has placeholders for"),
        (dict(pixel_values=None, image_sizes=None), "image placeholders more than the pictures fill"),
        (dict(pixel_values=torch.zeros(1, 3, 5, 5)), "pixel_values: expected"),
        (dict(attention_mask=torch.ones(1, 3)), "attention_mask: expected the shape of input_ids"),
        (dict(attention_mask="holes"), "attention_mask: expected every row to have one run of ones"),
        (dict(attention_mask="none"), "attention_mask: expected every row to have one run of ones"),
        (dict(instruction_mask=torch.ones(2, 3)), "instruction_mask: expected the shape"),
    ],
)
def test_bad_tensors(folder: Path, change: dict[str, Any], message: str) -> None:
    from checkpoints import make_inputs

    model = load(folder)
    arguments = make_inputs(model, [[(50, 70)]]).arguments()
    mask = torch.ones_like(arguments["input_ids"])
    mask[0, 2] = 0
    change = {k: {"holes": mask, "none": mask * 0}[v] if isinstance(v, str) else v for k, v in change.items()}
    if "input_ids" in change:
        arguments.pop("attention_mask")
    with pytest.raises(minifocus.InputError, match=message):
        model(**{**arguments, **change})


def test_bad_image_sizes(tmp_path: Path) -> None:
    from checkpoints import make_inputs

    model = minifocus.load(save(build(), tmp_path), sampler="none")
    arguments = make_inputs(model, [[(50, 70)]]).arguments()
    for sizes, message in [
        (None, "image_sizes: expected positive"),
        (torch.tensor([[50, 70, 3]]), "image_sizes"),
        (torch.tensor([[0, 70]]), "image_sizes"),
        (torch.tensor([[50, 70]] * 2), "image_sizes"),
    ]:
        with pytest.raises(minifocus.InputError, match=message):
            model(**{**arguments, "image_sizes": sizes})
    with pytest.raises(minifocus.InputError, match=r"image_sizes: expected positive .* got \[\(50,\)\]"):
        model(**{**arguments, "image_sizes": [(50,)]})
    pixels = arguments["pixel_values"]
    with pytest.raises(minifocus.InputError, match="pixel_values: expected 5 tiles by image_sizes, got 4"):
        model(**{**arguments, "pixel_values": pixels[0, :4]})
    with pytest.raises(minifocus.InputError, match=r"3, 28, 28\], got \[2, 5, 3, 28, 27\]"):  # the one that is wrong
        model(**{**arguments, "pixel_values": [pixels[0], pixels[0, ..., 1:]]})
    arguments["pixel_values"] = arguments["pixel_values"][:, :2]
    with pytest.raises(minifocus.InputError, match=r"picture 0 of \(50, 70\) needs 5 tiles, got 2"):
        model(**arguments)


@torch.inference_mode()
def test_tensors_as_transformers_takes_them(folder: Path) -> None:
    """Sizes in a list, tiles of all pictures one after the other, no pictures at all."""
    from checkpoints import make_inputs
    from transformers import LlavaNextForConditionalGeneration

    model = load(folder)
    assert torch.equal(model(torch.tensor([[1, 5]]), []), model(torch.tensor([[1, 5]])))
    arguments = make_inputs(model, [[(50, 70)], [(20, 90), (30, 30)]]).arguments()
    if model.config.anyres:
        sizes = [tuple(size) for size in arguments["image_sizes"].tolist()]
        tiles = [own[: model.num_tiles(size)] for own, size in zip(arguments["pixel_values"], sizes, strict=True)]
        stacked = {**arguments, "image_sizes": sizes, "pixel_values": torch.cat(tiles)}
        oracle = LlavaNextForConditionalGeneration.from_pretrained(folder)
        logits = oracle(**{**stacked, "image_sizes": arguments["image_sizes"]}).logits
        present = arguments["attention_mask"].bool()
        assert (model(**stacked) - logits)[present].abs().max() <= 1e-5
    else:
        assert arguments["pixel_values"].shape == (3, 3, 28, 28)


# ---- the command line ----


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return python("examples/generate.py", *arguments, timeout=120)


def test_command_line_json_and_figure(folder: Path, tmp_path: Path) -> None:
    file, figure = tmp_path / "p.png", tmp_path / "f.png"
    picture().save(file)
    done = command(
        "--model", folder, "--image", file, "--image", file, "--prompt", "Is <image> <image>?", "--sampler", "focus",
        "--selector", "variance", "--gamma", 0.5, "--layer", 2, "--max-new-tokens", 9, "--json", "--figure", figure,
        "--temperature", 0.7, "--top-p", 0.9, "--seed", 1, "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    model = minifocus.load(folder, "focus", selector="variance", gamma=0.5, layer=2)
    answer = model.generate([file, file], "Is <image> <image>?", max_new_tokens=9, temperature=0.7, top_p=0.9, seed=1)
    assert report["answer"] == answer.text and report["token_ids"] == answer.token_ids
    assert report["visual_tokens"] == vars(answer.tokens)
    with Image.open(io.BytesIO(figure.read_bytes())) as image:
        assert image.size[0] > 500 and len(image.convert("RGB").getcolors(1 << 24) or []) > 100


def test_a_figure_shows_what_a_question_keeps() -> None:
    """Dropped tokens are dark. Of the kept ones the most important is the most orange, and one of no importance is as it was."""
    layout = Layout(leading=0, height=1, width=3, newlines=False, thumbnail_width=0, num_plain=3)
    entered, extent = torch.arange(3), torch.ones(3, 2, dtype=torch.int64)
    importance = torch.tensor([1.0, 0.5, 0.0])
    grey = Image.new("RGB", (448, 149), (120, 120, 120))

    def colours(kept: list[int]) -> list[tuple[int, int, int]]:
        trace = PictureTrace(layout, None, entered, extent, torch.tensor(kept), importance)
        panel = figure._draw_importance(grey, trace)
        return [panel.getpixel((x, 75)) for x in (75, 224, 373)]

    (red, _, blue), (red_half, _, blue_half), plain = colours([0, 1, 2])
    assert red - blue > 1.8 * (red_half - blue_half) > 60 and plain == (120, 120, 120)
    dropped = colours([0])[1]
    assert max(dropped) < 60


def test_a_figure_shows_what_the_model_sees(folder: Path) -> None:
    """LLaVA-1.5 the centre square, unless its processor squashes pictures into one; LLaVA-NeXT the whole."""
    model = load(folder)
    answer = model.generate(picture(), "What?", max_new_tokens=1)
    assert model.image_processor is not None
    whole, squashed, own = (
        draw_answers([picture()], [("What?", answer)], processor).height
        for processor in (None, replace(model.image_processor, size=(28, 28)), model.image_processor)
    )
    assert squashed == whole and (own == whole if model.config.anyres else own > whole + 100)  # 448x448, not 320x448


def test_command_line_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    picture().save(file)
    done = command("--model", folder, "--image", file, "--prompt", "What?", "--sampler", "none", "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    for part in ("question  What?", "answer    ", "visual tokens", "equivalent to 100.0%", "time "):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "error: nowhere: expected the folder of a model"),
        (["--gamma", "2", "--sampler", "text"], "error: gamma: expected"),
        (["--sampler", "focus"], "error: .*selector.safetensors.*selector='variance'"),
        (["--sampler", "none", "--image", "missing.png"], "error: .*missing.png"),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(folder: Path, arguments: list[str], message: str) -> None:
    import re

    done = command(*([] if "--model" in arguments else ["--model", folder]), *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.search(message, done.stderr) and len(done.stderr.strip().splitlines()) == 1
