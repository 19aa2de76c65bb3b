"""A package's answers by the C++ runtime: the same as Python's, from any thread, and errors where there are none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import runtime
from checkpoints import build, save
from PIL import Image

import minifocus
from experiments.embedding.binding import Answer, Failed, Model, png
from minifocus import InputError, cards
from minifocus.export.package import export, signed

TINY = runtime.ROOT / "weights/tiny"
SAMPLERS = ("none", "text", "vision", "focus")


@pytest.fixture(scope="session")
def library() -> Path:
    return runtime.built() / "libminifocus.so"


@pytest.fixture(scope="session")
def package() -> Path:
    return runtime.tiny_package()


@pytest.fixture(scope="module")
def embedded(library: Path, package: Path) -> Model:
    return Model(library, package, workers=4, check_weights=True)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Image.Image, str]]:
    """Questions of the test split, every third about a picture that was squeezed into one of four odd shapes."""
    shapes = [(37, 410), (611, 90), (113, 112), (1, 300)]
    found = []
    for number, (image, question, _, _) in enumerate(cards.questions("test", 12, 700_000)):
        found.append((image.resize(shapes[number // 3 % 4]) if number % 3 == 0 else image, question))
    return found


def same(found: Answer, expected: minifocus.Answer) -> None:
    assert (found.text, found.token_ids, found.finish) == (expected.text, expected.token_ids, expected.finish)
    tokens = expected.tokens
    assert found.counts == (tokens.full, tokens.after_vision, tokens.after_text)
    assert found.equivalent == pytest.approx(tokens.equivalent, rel=1e-6)
    assert found.layer_tokens == expected.layer_tokens


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_answers_are_python_s(embedded: Model, asked: list[tuple[Image.Image, str]], sampler: str) -> None:
    """By encoded pictures and by pixels, streamed, with the sampler chosen at the time of asking."""
    model = minifocus.load(TINY, sampler, dtype="float32")
    for number, (image, question) in enumerate(asked):
        found = embedded.ask(png(image) if number % 2 else image.convert("RGB"), question, sampler=sampler)
        same(found, model.generate(image, question))
        assert "".join(found.pieces).strip() == found.text
    same(embedded.ask(None, "How many?", sampler=sampler), model.generate(None, "How many?"))


def test_what_the_page_says(package: Path) -> None:
    """docs/embedding.md, its lines from the answer on; the fixtures run those before."""
    first, as_json, by_ctypes = runtime.said(package)
    assert (first, by_ctypes) == ("870\n", "no\n")
    assert json.loads(as_json)["visual_tokens"] == [664, 664, 664]


def test_options_of_a_request(embedded: Model, asked: list[tuple[Image.Image, str]]) -> None:
    image, question = asked[1]
    for options in ({"gamma": 0.3, "layer": 2}, {"keep": 7}, {"layer": 3, "keep": 1}):
        model = minifocus.load(TINY, "focus", dtype="float32", **options)
        same(embedded.ask(png(image), question, **options), model.generate(image, question))
    short = embedded.ask(png(image), "Describe the picture.", max_new_tokens=1)
    assert (len(short.token_ids), short.finish) == (1, "length")
    stopped = embedded.ask(png(image), question, keep_on=lambda text: False)
    assert stopped.finish == "cancelled" and len(stopped.pieces) == 1


def test_eight_threads_on_one_model(embedded: Model, asked: list[tuple[Image.Image, str]]) -> None:
    """More threads than workers, each with errors among its questions."""
    alone = [embedded.ask(png(image), question).token_ids for image, question in asked[:8]]

    def ask(number: int) -> list[list[int]]:
        order = [(number + step) % 8 for step in range(8)]
        answers = {}
        for one in order:
            with pytest.raises(Failed, match=f"keep: expected at least 1, got {-number}$"):
                embedded.ask(None, "?", keep=-number)
            answers[one] = embedded.ask(png(asked[one][0]), asked[one][1]).token_ids
        return [answers[one] for one in range(8)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [alone] * 8


@pytest.mark.parametrize(
    ("picture", "question", "options", "error"),
    [
        (b"GIF89a", "?", {}, "the picture: .*expected"),
        (b"", "?", {}, "the picture: "),
        (None, "", {}, "prompt: expected a question, got one without words"),
        (None, "\udcff", {}, "UTF-8"),
        (None, "<image> what?", {}, "expected one <image> for each of 0 pictures, got 1"),
        (None, "?", {"sampler": "fastv"}, "sampler: expected none, text, vision or focus, got fastv"),
        (None, "?", {"gamma": 1.5}, r"gamma: expected a number in \(0, 1\], got 1.5"),
        (None, "?", {"gamma": "nan"}, r"gamma: expected a number in \(0, 1\], got -?nan"),
        (None, "?", {"layer": 4}, "layer: expected 0 to 3, got 4"),
        (None, "?", {"gamma": 0.5, "sampler": "none"}, "gamma, keep and layer: .*got none"),
        (None, "?", {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        (None, "?", {"max_new_tokens": "many"}, "max_new_tokens: expected .* a number, got many"),
        (None, "?", {"temperature": 1}, "temperature: expected sampler, or gamma"),
        (None, "why " * 3000, {}, "more than the context length of 2048"),
    ],
)
def test_what_cannot_be_asked(
    embedded: Model, picture: bytes | None, question: str, options: dict[str, object], error: str
) -> None:
    with pytest.raises(Failed, match=error):
        embedded.ask(picture, question, **options)


def _line(key: str, values: str | None) -> Callable[[Path], object]:
    """Puts other values behind a key of the manifest, or takes the line away."""

    def change(package: Path) -> None:
        file = package / "manifest.txt"
        text = file.read_text(encoding="utf-8").partition("sha1.manifest ")[0]
        changed = re.sub(rf"(?m)^{re.escape(key)} .*\n", "" if values is None else f"{key} {values}\n", text)
        assert changed != text
        file.write_bytes(signed(changed))

    return change


def _flip(name: str) -> Callable[[Path], object]:
    def change(package: Path) -> None:
        content = bytearray((package / name).read_bytes())
        content[len(content) // 2] ^= 1
        (package / name).write_bytes(content)

    return change


def _cut(name: str) -> Callable[[Path], object]:
    return lambda package: (package / name).write_bytes((package / name).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda package: (package / "manifest.txt").unlink(),
            "manifest.txt: expected the manifest of an exported package",
        ),
        (lambda package: (package / "parts/step.so").unlink(), "parts/step.so: expected a file of the package"),
        (_flip("parts/layer.so"), "parts/layer.so: expected the file that was exported, with SHA-1"),
        (_flip("tokenizer.bin"), "tokenizer.bin: expected the file that was exported, with SHA-1"),
        (_flip("weights.bin"), "weights.bin: expected the file that was exported, with SHA-1"),
        (_cut("weights.bin"), r"weights.bin: expected \d+ bytes, found \d+"),
        (_line("format", "2"), "expected a package of format 1, found 2"),
        (_line("torch", "2.1.0"), "expected a package of torch .*, found one of torch 2.1.0"),
        (_line("cpu", "x86-64-v9"), "expected a processor of the level x86-64-v9"),
        (_line("parts", "picture"), "has no part"),
        (_line("model.layers", "5"), "weight.language_model.model.layers.4.* no such key"),
        (_line("model.layers", "-1"), "expected layers and a context"),
        (_line("model.context", None), "model.context: no such key"),
        (_line("guided.gamma", "half"), "guided.gamma: expected a number, got half"),
        (_line("weight.image_newline", "float32 64"), r"expected embeddings, .* and a newline that fit .* and \[\]"),
        (_line("weight.image_newline", "float32"), "weight.image_newline: expected a dtype, a place and a shape"),
        (_flip("manifest.txt"), "manifest.txt: expected the lines that were exported"),
        (_cut("manifest.txt"), "manifest.txt: expected the lines that were exported"),
        (_line("weight.image_newline", f"float32 {2**62} 128"), "weight.image_newline: expected a place"),
        (_line("weight.image_newline", f"float32 0 {2**40} {2**40}"), "weight.image_newline: expected a place"),
        (_line("weight.image_newline", "float32 0 -4"), "weight.image_newline: expected lengths"),
        (_line("weight.image_newline", "float99 0 4"), "weight.image_newline: expected a dtype"),
    ],
)
def test_hostile_packages(
    library: Path, package: Path, tmp_path: Path, change: Callable[[Path], object], error: str
) -> None:
    copy = shutil.copytree(package, tmp_path / "package")
    change(copy)
    with pytest.raises(Failed, match=error):
        Model(library, copy, check_weights=True)


def test_llava_1_5_with_int4_weights(library: Path, tmp_path: Path) -> None:
    """One tile, no newlines, a stand-in for a selector; int4 in the decoder, int8 in its head, bfloat16 in all else."""
    folder = tmp_path / "model"
    config = json.loads((TINY / "config.json").read_text())
    words, image = config["text_config"]["vocab_size"], config["image_token_index"]
    sizes = {"text_hidden_size": 128, "text_intermediate_size": 192, "text_num_hidden_layers": 2}
    save(build("llava", seed=5, text_vocab_size=words, image_token_index=image, **sizes), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)

    def load() -> minifocus.Llava:
        return minifocus.load(folder, "focus", dtype="int4", selector="variance")

    embedded, model = Model(library, runtime.packaged("llava", load, "focus")), load()
    for size in ((200, 120), (30, 31)):
        picture, given = Image.effect_noise(size, 90).convert("RGB"), {"max_new_tokens": 8}
        same(embedded.ask(png(picture), "What is it?", **given), model.generate(picture, "What is it?", **given))


def test_what_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sampler: expected none, text, vision or focus, got 'fastv'"):
        export(minifocus.load(TINY, "none"), "fastv", tmp_path / "out", [])
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine: expected no such folder, or a package"):
        export(minifocus.load(TINY, "none"), "none", tmp_path / "mine", [])
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    with pytest.raises(InputError, match=r"generation_config.json: repetition_penalty: expected none, .* got 1.5"):
        export(minifocus.load(folder, "none"), "none", tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
