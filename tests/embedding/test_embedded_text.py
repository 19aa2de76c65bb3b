"""The runtime's tokenizers and prompts (csrc/runtime/text) against Python's, on the layouts of the hub's folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from chat_templates import PICTURES, TEMPLATED, WORDS, each
from compiled import ROOT, SANITIZED, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_tokenizers import (
    IMAGE,
    LLAMA3_SPLIT,
    TEXT,
    corpus,
    pieces_of,
    texts,
    train_sentencepiece,
    write,
    write_llama,
    write_llama3,
    write_llama_json,
)
from text_pieces import SOURCES, EmbeddedPrompts, EmbeddedTokenizer, Library, RuntimeFails, damaged
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

import minifocus
from minifocus.errors import CheckpointError, InputError
from minifocus.export import prompt_table, token_table
from minifocus.inputs.chat_template import ChatTemplate
from minifocus.inputs.model_inputs import num_visual_tokens
from minifocus.inputs.prompt import TEMPLATES, Template, build_prompt
from minifocus.inputs.tokenizer import StreamDecoder, Tokenizer

TINY, SMOLLM2 = ROOT / "weights/tiny", ROOT / "weights/small/next"
SPECIAL = (("bos_token", "<s>"), ("eos_token", "</s>"))
PARTS = [
    *TEXT.split(),
    *("<s>", "</s>", "<unk>", "<image>", "<image>\n", "<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *("<left>", "<right>", "<both>", "<word>", "<normal>", "plain", "▁the", "the▁", "<late>", "<0x0A>", "<0x4", "<", ">"),
    *(" ", "  ", "     ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "▁", "▁▁", "\x00", "\u200b"),
    *("'s", "'RE", "'ſ", "'ll", "'d'd", "'", "12345", "1", "١٢", "Ⅷ", "²", "\U00011de0", ".", "...", "!?\n", "A-b", "_"),
    *("你好", "こ", "é", "e\u0301", "\u0301", "ﬁ", "Ä", "ß", "🙂", "👩‍👩‍👧", "🇩🇪", "\U0010ffff", "\ue000", "\u0378", "\x04"),
    *("aaaaa", "bbb", "<right> <left>", "<both>  <both>", "aplain", "lai"),
]  # fmt: skip
REPEATS = ["aaa bbbb hahaha      \n\n\n\n" * 9] * 20  # so that a pair is one of the same token twice
SPLIT_PARTS = [
    *("'s", "'RE", "'ſ", "'ll", "'", "the", "A", "é", "ſ", "你", "\u0301", "1", "12345", "Ⅷ", "²", ".", "...", "!?\n", "_"),
    *(" ", "  ", "\n", "\r\n", "\n\n", "\t", "\u00a0"),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12).map("".join)


@dataclass
class Pair:
    """A folder's tokenizer in Python, its table, and the runtime's tokenizer of that."""

    python: Tokenizer
    table: Path
    embedded: EmbeddedTokenizer


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(compiled([ROOT / source for source in SOURCES], name="text"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tokenizers by their layouts."""
    made = {"tiny": TINY}
    for name in (
        "tiny model",
        "llama 3",
        "vicuna",
        "vicuna, old",
        "vicuna json",
        "vicuna json, old",
        "flags",
        "flags json",
    ):
        made[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, made["tiny model"])
    write_llama3(made["llama 3"])
    trained = [REPEATS + corpus() for _ in range(2)]
    model = train_sentencepiece(user_defined_symbols=["<0x4", "the▁"], sentence_iterator=iter(trained[0]))
    vocabulary, merges = pieces_of(train_sentencepiece(sentence_iterator=iter(trained[1])))
    for old in (False, True):
        write_llama(made["vicuna, old" if old else "vicuna"], old, model)
        write_llama_json(made["vicuna json, old" if old else "vicuna json"], vocabulary, merges, old)
    tokens: dict[str, Any] = {}
    flags = {
        "lai": [],
        "<left>": ["lstrip"],
        "<right>": ["rstrip"],
        "<both>": ["lstrip", "rstrip"],
        "plain": ["single_word"],
    }
    for text, true in (flags | {"<normal>": ["normalized"], "<word>": ["single_word", "normalized", "lstrip"]}).items():
        tokens[str(420 + len(tokens))] = {
            "content": text,
            "special": False,
            "normalized": False,
            **dict.fromkeys(true, True),
        }
    for name in ("flags", "flags json"):
        shutil.copytree(made["vicuna" if name == "flags" else "vicuna json, old"], made[name], dirs_exist_ok=True)
        more = {"440": {"content": "\n\n"}} if name == "flags" else {}
        settings_ = {
            "added_tokens_decoder": {**tokens, "430": IMAGE, **more},
            "add_eos_token": True,
            "bos_token": "<s>",
        }
        write(made[name], tokenizer_config={**settings_, "eos_token": "</s>"})
    for name, layout in LAYOUTS.items():
        made[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        layout().save(str(made[name] / "tokenizer.json"))
    if (SMOLLM2 / "tokenizer.json").exists():
        made["SmolLM2"] = SMOLLM2
    return made


def byte_level(steps: list[Any], **options: Any) -> tokenizers.Tokenizer:
    """Byte-level, without tokens for the bytes that SPLIT_PARTS do not have. It is trained on texts that were not split, so that
    it joins what the steps keep apart wherever they do not."""
    library = tokenizers.Tokenizer(models.BPE(**options))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<|im_start|>", "<unk>"], show_progress=False)
    rng = random.Random(3)
    lines = ["".join(rng.choices(SPLIT_PARTS, k=9)) for _ in range(1000)]
    library.train_from_iterator([*REPEATS, *lines], trainer)
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    library.add_special_tokens([AddedToken("<image>", rstrip=True)])
    library.add_tokens([AddedToken("a b>")])
    return library


def split_first(expression: str) -> list[Any]:
    """The pre-tokenizers of Llama 3's kind."""
    split = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def with_unknown(fuse_unk: bool) -> tokenizers.Tokenizer:
    """Words that each begin with "▁", and a token for unknown characters."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=fuse_unk))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    library.train_from_iterator(corpus(), trainer)
    pieces = "<s> $A </s> </s>"
    library.post_processor = processors.TemplateProcessing(pieces, special_tokens=[("<s>", 1), ("</s>", 2)])
    return library


LAYOUTS = {
    "smollm": lambda: byte_level([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "gpt 2": lambda: byte_level(
        [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=True)], unk_token="<unk>"
    ),
    "llama 3's split": lambda: byte_level(split_first(LLAMA3_SPLIT)),
    "qwen 2's split": lambda: byte_level(split_first(LLAMA3_SPLIT.replace("{1,3}", ""))),
    "unknown": lambda: with_unknown(False),
    "unknown, fused": lambda: with_unknown(True),
}


@pytest.fixture(scope="session")
def pairs(library: Library, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    tables = tmp_path_factory.mktemp("tables")
    made = {}
    for name, folder in folders.items():
        python, table = Tokenizer.from_folder(folder), tables / f"{name}.bin"
        token_table.write(python, folder, table)
        made[name] = Pair(python, table, EmbeddedTokenizer(library, table))
    return made


# -------------------------------------------------------------------------------------------------------- tokenizers


def check(pair: Pair, name: str, text: str, special: bool) -> None:
    expected = pair.python.encode(text, special)
    ids, offsets = pair.embedded.encode(text.encode(), special)
    assert ids == expected.ids, (name, text)
    assert offsets == expected.offsets, (name, text)
    check_ids(pair, name, ids, special)


def check_ids(pair: Pair, name: str, ids: list[int], skip_special: bool) -> None:
    assert pair.embedded.decode(ids, skip_special) == pair.python.decode(ids, skip_special), (name, ids)
    decoder = StreamDecoder(pair.python, skip_special)
    expected = [decoder.push(token) for token in ids]
    assert pair.embedded.stream(ids, skip_special) == [*expected, decoder.flush()], (name, ids)


@given(TEXTS, st.booleans())
def test_tokens_and_spans_are_python_s(pairs: dict[str, Pair], text: str, special: bool) -> None:
    for name, pair in pairs.items():
        check(pair, name, text, special)


@settings(max_examples=150)
@given(st.lists(st.integers(0, 10**6), max_size=30), st.booleans())
def test_any_ids_decode_and_stream_as_python_s(pairs: dict[str, Pair], ids: list[int], skip_special: bool) -> None:
    for name, pair in pairs.items():
        check_ids(pair, name, [token % (pair.python.vocab_size + 4) - 2 for token in ids], skip_special)
        assert pair.embedded.vocab_size == pair.python.vocab_size


def test_every_two_parts(pairs: dict[str, Pair]) -> None:
    """Each at the beginning of a text, and behind and before each other one."""
    for name, pair in pairs.items():
        for part in (*PARTS, *SPLIT_PARTS):
            text = "".join(part + other for other in (*PARTS, *SPLIT_PARTS))
            expected = pair.python.encode(text)
            assert pair.embedded.encode(text.encode()) == (expected.ids, expected.offsets), (name, part)


def test_every_character_and_every_token(pairs: dict[str, Pair]) -> None:
    """All of Unicode, a block at a time, and each token's text."""
    for name in ("tiny", "tiny model", "llama 3", "smollm"):
        for begin in range(0, 0x110000, 0x800):
            block = "".join(chr(code) for code in range(begin, begin + 0x800, 1 if begin < 0x4000 else 37))
            if not 0xD800 <= begin < 0xE000:
                expected = pairs[name].python.encode(block)
                assert pairs[name].embedded.encode(block.encode()) == (expected.ids, expected.offsets), (name, begin)
    for name, pair in pairs.items():
        step = 1 + pair.python.vocab_size // 2000
        tokens = [pair.python.token(token_id) or "" for token_id in range(0, pair.python.vocab_size, step)]
        for at in range(0, len(tokens), 50):
            check(pair, name, " ".join(tokens[at : at + 50]), True)


def test_long_and_hostile_texts(pairs: dict[str, Pair]) -> None:
    """The time is about in proportion to the length: were it to the square, this would take hours."""
    names = ("tiny", "tiny model", "llama 3", "smollm", "flags", "flags json")
    began = time.process_time()
    for part in ("a", " ", "the", "\n", "'", "<", "<s>", "1", "🙂", "\t<left>", " \x00"):
        for name in names:
            ids, offsets = pairs[name].embedded.encode(part.encode() * (50_000 // len(part)))
            assert len(ids) == len(offsets)
    assert len(pairs["tiny"].embedded.encode(b"a" * 500_000)[0]) > 100_000
    assert time.process_time() - began < 40
    for part in ("a", " ", "the", "\n", "1", "\t<left>"):
        for name in names:
            expected = pairs[name].python.encode(part * 3000)
            assert pairs[name].embedded.encode(part.encode() * 3000) == (expected.ids, expected.offsets), (name, part)


@pytest.mark.parametrize("text, place", [
    (b"ab\xff", 2), (b"\xc0\x80", 0), (b"a\xed\xa0\x80", 1), (b"\xf4\x90\x80\x80", 0), (b"abc\xe4\xbd", 3), (b"\x80", 0),
    (b"\xf0\x9f\x99", 0), (b"\xe0\x9f\xbf", 0), (b"\xf8\x88\x80\x80\x80", 0),
])  # fmt: skip
def test_bad_text(pairs: dict[str, Pair], text: bytes, place: int) -> None:
    with pytest.raises(RuntimeFails, match=f"text: expected text in UTF-8, got a byte that is not, number {place}$"):
        pairs["tiny"].embedded.encode(text)


# ------------------------------------------------------------------------------------------------------------ tables


def test_damaged_tables(library: Library, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """They are refused, or do something harmless."""
    content, file = pairs["flags json"].table.read_bytes(), tmp_path / "tokenizer.bin"
    refused = 0
    for changed in damaged(content, 300, 0):
        file.write_bytes(changed)
        try:
            tokenizer = EmbeddedTokenizer(library, file)
        except RuntimeFails as error:
            assert str(error).startswith(f"{file}: ")
            refused += 1
            continue
        tokenizer.encode(b"A lazy <left> dog's <image> 12 \xf0\x9f\x99\x82")
        tokenizer.stream(list(range(tokenizer.vocab_size)))
        tokenizer.close()
    assert refused > 350
    for changed, words in (
        (b"", "expected a tokenizer's table"),
        (b"x" + content[1:], "expected a tokenizer's table"),
        (content[:16] + b"\x02" + content[17:], "expected version 1 of a tokenizer's table, found 2"),
        (content[:-1], "cut off"),
        (content + b"\x00", "expected its end, found 1 bytes more"),
    ):
        file.write_bytes(changed)
        with pytest.raises(RuntimeFails, match=words):
            EmbeddedTokenizer(library, file)
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(RuntimeFails, match="found no such file"):
            EmbeddedTokenizer(library, place)


def changed_json(change: Any) -> Any:
    def write_to(folder: Path) -> None:
        shutil.copy(TINY / "tokenizer.json", folder)
        definition = json.loads((folder / "tokenizer.json").read_text())
        change(definition)
        write(folder, tokenizer=definition)

    return write_to


def with_model(**options: Any) -> Any:
    return lambda folder: (folder / "tokenizer.model").write_bytes(train_sentencepiece(**options))


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("made, words", [
    (changed_json(lambda d: d.update(normalizer={"type": "NFC"})), "normalizer.type: expected Prepend or Replace, got"),
    (changed_json(lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}]})),
     r"json: normalizer.normalizers.0.prepend: expected '▁', got '_'"),
    (changed_json(lambda d: d.update(pre_tokenizer=SPLIT)), r"json: pre_tokenizer.pattern: expected the expression of GPT-2"),
    (changed_json(lambda d: d.update(pre_tokenizer={"type": "Punctuation", "behavior": "Isolated"})), "pre_tokenizer.type: exp"),
    (changed_json(lambda d: d.update(decoder=None)), "json: decoder: expected ByteLevel, or Llama's"),
    (changed_json(lambda d: d["decoder"]["decoders"].pop(1)), "json: decoder: expected ByteLevel, or Llama's"),
    (changed_json(lambda d: d.update(post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]})),
     "json: post_processor.type: expected TemplateProcessing"),
    (changed_json(lambda d: d.update(post_processor=processor(trim_offsets=True))), "post_processor.trim_offsets: expected f"),
    (changed_json(lambda d: d["model"].update(dropout=0.5)), "json: model.dropout: expected none, got 0.5"),
    (changed_json(lambda d: d["model"].update(end_of_word_suffix="</w>")), "json: model.end_of_word_suffix: expected none"),
    (changed_json(lambda d: d["model"]["vocab"].pop("<0x41>")), "json: model.vocab: expected a token for each byte"),
    (changed_json(lambda d: d.update(model={"type": "Unigram", "vocab": [["<unk>", 0.0]], "unk_id": 0})), "model.type: expected"),
    (changed_json(lambda d: d["model"]["vocab"].update({"<0x+F>": 600})), "tokenizer.json: <0x\\+F>: a token that the package"),
    (changed_json(lambda d: d["added_tokens"].extend([added(514, " \n"), added(515, "<r>", rstrip=True)])),
     "json: added_tokens: '<r>' takes the white space with which"),
    (changed_json(lambda d: d["post_processor"]["special_tokens"]["<s>"].update(ids=[999])), "post_processor: adds a token"),
    (with_model(byte_fallback=False, vocab_size=200), "model: trainer_spec.byte_fallback: expected true"),
])  # fmt: skip
def test_a_tokenizer_that_the_table_cannot_hold(tmp_path: Path, made: Any, words: str) -> None:
    made(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        token_table.write(Tokenizer.from_folder(tmp_path), tmp_path, tmp_path / "tokenizer.bin")
    assert not (tmp_path / "tokenizer.bin").exists()


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    return {**IMAGE, "id": token_id, "content": content, **flags}


def processor(**options: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True, **options}


# ----------------------------------------------------------------------------------------------------------- prompts

TINY_S = ChatTemplate("weights/tiny", (TINY / "chat_template.jinja").read_text(), SPECIAL)
OWN = {name: ChatTemplate(name, source, SPECIAL) for name, source in TEMPLATED.items()}
QUESTIONS = st.lists(
    st.sampled_from(
        [
            "<image>",
            "<image>\n",
            "<image> \t\n",
            "<image",
            "im<image>age>",
            " ",
            "\n",
            "\u3000\x1f",
            "What",
            "<s>",
            "{{",
        ]
    )
    | st.text(max_size=4),
    max_size=8,
).map("".join)


def manifest(file: Path, template: Template, **sizes: Any) -> Path:
    """A manifest with a template's lines, for a model of some sizes."""
    text = SimpleNamespace(max_position_embeddings=2048, vocab_size=sizes.get("vocab_size", 600))
    folder = SimpleNamespace(
        template=template,
        config=SimpleNamespace(image_token_id=512, text=text),
        text_tokenizer=SimpleNamespace(special_tokens=dict(SPECIAL)),
        stop_token_ids=lambda: {2},
    )
    return write_lines(file, prompt_table.lines(folder))  # type: ignore[arg-type]


def write_lines(file: Path, lines: dict[str, list[object]]) -> Path:
    file.write_text("".join(" ".join(map(str, [key, *values])) + "\n" for key, values in lines.items()))
    return file


@pytest.fixture(scope="session")
def prompts(
    library: Library, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Template, EmbeddedPrompts]]]:
    folder = tmp_path_factory.mktemp("prompts")
    made = {}
    for number, template in enumerate([*TEMPLATES, TINY_S, *OWN.values()]):
        name = template if isinstance(template, str) else template.place
        made[name] = template, EmbeddedPrompts(library, manifest(folder / f"{number}.txt", template))
    yield made
    for _, embedded in made.values():
        embedded.close()


@settings(max_examples=120)
@given(QUESTIONS, st.sampled_from([None, None, 0, 1, 2]))
def test_prompts_are_python_s(
    prompts: dict[str, tuple[Template, EmbeddedPrompts]], question: str, number: int | None
) -> None:
    """Their texts, and the spans of the question's words; and what cannot be asked is refused in the same words."""
    number = question.count("<image>") if number is None else number
    for name, (template, embedded) in prompts.items():
        try:
            expected = build_prompt(question, number, template)
        except InputError as error:
            with pytest.raises(RuntimeFails) as ours:
                embedded.write(question.encode(), number)
            assert str(ours.value)[:25] == str(error)[:25], (name, question)
        else:
            assert embedded.write(question.encode(), number) == (expected.text, expected.instruction), (name, question)


@pytest.mark.parametrize("source, words", [
    (PICTURES + each("text", "{{ c['text'] | upper }}"), "writes 'WHAT IS IT.' for 'What is it.'"),
    (PICTURES + each("text", "{{ c['text'] | e }}"), "writes '&#39;s"),
    (PICTURES + WORDS + "{{ m['content'] | length }}", "writes something else for each number of pictures|writes '"),
    (PICTURES + WORDS + "{{ strftime_now('%Y') }}", "asks for the date"),
    (PICTURES + WORDS + "{{ [1, 2, 3, 4, 5] | random }}", "writes '"),
    (WORDS, "needs a template that takes any question: template: .* has 0 places for pictures, expected 1"),
    ("{% if 'tool' in m['content'][-1]['text'] %}{{ raise_exception('no tools') }}{% endif %}" + PICTURES + WORDS,
     "needs a template that takes any question: .* no tools"),
])  # fmt: skip
def test_a_template_that_does_more(source: str, words: str) -> None:
    template = ChatTemplate("chat_template.jinja", "{% for m in messages %}" + source + "{% endfor %}", SPECIAL)
    with pytest.raises(CheckpointError, match=f"chat_template.jinja: .*({words})"):
        prompt_table.form_of(template)


def test_a_manifest_that_is_none(library: Library, tmp_path: Path) -> None:
    file = manifest(tmp_path / "manifest.txt", "vicuna")
    good = file.read_text()
    for old, new, words in (
        ("places kept", "places here", "text.prompt.places: expected kept or the like, got here"),
        ('start "USER:%20" ""', 'start "USER:%20"', "text.prompt.start: expected two texts, got 1"),
        ("USER:%20", "USER:%2", "text.prompt.start: expected a text in quotes"),
        ("USER:%20", "USER:%zz", "text.prompt.start: expected a text in quotes"),
        ("USER:%20", "%ff", "text.prompt.start: expected a text in quotes"),
        ("raw false", "raw no", "text.prompt.raw: expected true or false, got no"),
        ("white_space 9 13", "white_space 9 8", "text.white_space: expected ascending ranges"),
        ("text.prompt.picture", "text.prompt.pictures", "text.prompt.picture: no such key"),
    ):
        assert old in good
        file.write_text(good.replace(old, new))
        with pytest.raises(RuntimeFails) as error:
            EmbeddedPrompts(library, file)
        assert words in str(error.value)


# -------------------------------------------------------------------------------------------------------- both of them


def test_what_the_model_reads(library: Library, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """The ids and the instruction of Processor's, but for the image tokens, which are not repeated yet."""
    processor = minifocus.load(TINY, "none").processor
    config = processor.config
    embedded, picture = pairs["tiny"].embedded, Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    questions = [text for text in texts(40) if "<image>" not in text and text.strip()]
    for name, template in ("own", processor.template), ("bos", OWN["llama-3, with BOS and trim"]):
        processor.template = template
        file = write_lines(tmp_path / f"{name}.txt", prompt_table.lines(processor))
        for question in [*questions, "Is <image> red?", "What <image>\nis <image>"]:
            number = question.count("<image>") or len(question) % 2
            inputs = processor([picture] * number, question)
            ids, instruction = embedded.model_text(file, question.encode(), number)
            image, counts = config.image_token_id, iter([num_visual_tokens(config, size) for size in inputs.sizes])
            repeats = [next(counts) if token == image else 1 for token in ids]
            assert np.repeat(ids, repeats).tolist() == inputs.input_ids.tolist(), question
            assert np.repeat(instruction, repeats).tolist() == inputs.instruction.tolist(), question
    for question, number, words in (
        ("a" * 3000, 1, "prompt: takes 30.. tokens, more than the context length of"),
        (" ", 0, "prompt: expected a question"),
        ("Is <image> red?", 2, "prompt: expected one <image> for each of 2 pictures, got 1 of them"),
        ("Hi", -1, "pictures: expected 0 to 65536, got -1"),
    ):
        with pytest.raises(RuntimeFails, match=words):
            embedded.model_text(file, question.encode(), number)
    for key, value, words in (
        ("text.image_token", "5", "text.image_token: the tokenizer's <image> is not token 5"),
        ("text.vocab_size", "300", "text.vocab_size: the tokenizer gives token 5.., but the model has 300"),
    ):
        lines = {**prompt_table.lines(processor), key: [value]}
        with pytest.raises(RuntimeFails, match=words):
            embedded.model_text(write_lines(file, lines), b"Is it red?", 1)


def test_under_the_sanitizers(pairs: dict[str, Pair], tmp_path: Path, library: Library) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer end the program at the first fault; its results stay the same."""
    for name in ("tiny", "vicuna, old", "llama 3", "flags", "flags json", "gpt 2", "unknown"):
        shutil.copy(pairs[name].table, tmp_path)
    manifest(tmp_path / "text.txt", "vicuna")
    manifest(tmp_path / "order.txt", OWN["parts in order"])
    rng = random.Random(2)
    drawn = ["".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(40)]
    (tmp_path / "texts.json").write_text(json.dumps(["", "<image>", *drawn]))
    said = []
    sources = [ROOT / source for source in SOURCES]
    plain, sanitized = compiled(sources, name="text"), compiled(sources, (), [*SANITIZED, "-shared"], "text-sanitized")
    for file in (plain, sanitized):
        environment = dict(os.environ)
        if file == sanitized:
            names = ("libasan.so", "libubsan.so")
            found = [
                subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
                for name in names
            ]
            environment |= {"LD_PRELOAD": ":".join(map(str.strip, found)), "ASAN_OPTIONS": "detect_leaks=0"}
        program = [sys.executable, str(ROOT / "tests/embedding/text_pieces.py")]
        command = [*program, str(file), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] != ""
