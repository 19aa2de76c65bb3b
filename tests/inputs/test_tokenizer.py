"""Token ids, spans, decoding and streaming against transformers, on vocabularies trained here.

AutoTokenizer reads a tokenizer.json as it is. Of a folder with tokenizer.model alone it needs protobuf, and for LLaVA's
model types transformers 5.23 then leaves out the "▁" before the text altogether, whatever the files say. The oracles are
therefore its sentencepiece tokenizer (legacy) and its LlamaTokenizer on the same vocabulary (not legacy).
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    IMAGE,
    pieces_of,
    texts,
    train_sentencepiece,
    write,
    write_llama,
    write_llama3,
    write_llama_json,
)
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

import minifocus
from minifocus.errors import CheckpointError, InputError
from minifocus.inputs.tokenizer import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    write_llama3(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder for either value of `legacy`, and the pieces with their merges."""
    folders, model = {}, train_sentencepiece()
    for legacy in (True, False):
        folders[legacy] = tmp_path_factory.mktemp(f"llama-{legacy}")
        write_llama(folders[legacy], legacy, model)
    return folders, *pieces_of(model)


def oracle_of(llama, legacy):
    folders, vocabulary, merges = llama
    if legacy:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        oracle = SentencePieceBackend(vocab_file=str(folders[True] / "tokenizer.model"), legacy=True, **names)
    else:
        oracle = LlamaTokenizer(vocab=dict(vocabulary), merges=list(merges), legacy=False)
    oracle.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return oracle


# ------------------------------------------------------------------------------------------------------ tokenizer.json


def test_llama3_equals_autotokenizer(llama3):
    ours, oracle = Tokenizer.from_folder(llama3), AutoTokenizer.from_pretrained(llama3)
    ids = (ours.vocab_size, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id)
    assert ids == (len(oracle), oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id)
    assert ours.token_id("<late>") == oracle.convert_tokens_to_ids("<late>") == len(oracle) - 1
    assert ours.token_id("no such token") is None
    for text in [*texts(), "plain<pad> <late>x plain", "<|begin_of_text|><|begin_of_text|>"]:
        encoding, expected = ours.encode(text), oracle(text, return_offsets_mapping=True)
        twice = text.startswith("<|begin_of_text|>")  # AutoTokenizer puts a second BOS there
        assert encoding.ids == expected["input_ids"][twice:], text
        assert encoding.offsets == expected["offset_mapping"][twice:], text
        assert ours.decode(encoding.ids) == oracle.decode(encoding.ids, skip_special_tokens=True), text
        assert ours.decode(encoding.ids, skip_special_tokens=False) == oracle.decode(encoding.ids), text


def test_bos_is_not_doubled(llama3):
    ours = Tokenizer.from_folder(llama3)
    assert ours.encode("").ids == [0] and ours.encode("").offsets == [(0, 0)]
    encoding = ours.encode("<|begin_of_text|>the")
    assert encoding.ids == ours.encode("the").ids and encoding.offsets[0] == (0, 17)
    assert ours.encode("<|begin_of_text|><|begin_of_text|>").ids == [0, 0]


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_json_equals_autotokenizer(llama, legacy, tmp_path):
    _, vocabulary, merges = llama
    write_llama_json(tmp_path, vocabulary, merges, legacy)
    ours, oracle = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 421)
    assert ours.vocab_size == len(oracle) == 422
    for text in texts():
        encoding, twice = ours.encode(text), text.startswith("<s>")
        assert encoding.ids == oracle(text)["input_ids"][twice:], text
        assert ours.decode(encoding.ids) == oracle.decode(encoding.ids, skip_special_tokens=True), text
    # The same text, from tokenizer.model alone.
    model = Tokenizer.from_folder(llama[0][legacy])
    assert all(model.encode(text).ids == ours.encode(text).ids for text in texts())


# ----------------------------------------------------------------------------------------------------- tokenizer.model


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_equals_transformers(llama, legacy):
    ours, oracle = Tokenizer.from_folder(llama[0][legacy]), oracle_of(llama, legacy)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (421, 1, 2, 0)
    assert ours.token_id("<image>") == 420 and ours.token_id("▁the") == oracle.convert_tokens_to_ids("▁the")
    assert ours.token_id("no such token") is None
    decoder = oracle_of(llama, False)
    for text in texts():
        encoding = ours.encode(text)
        expected = oracle(text, add_special_tokens=False)["input_ids"]
        assert encoding.ids == ([] if text.startswith("<s>") else [1]) + expected, text
        assert ours.decode(encoding.ids) == decoder.decode(encoding.ids, skip_special_tokens=True), text
        assert ours.decode(encoding.ids, skip_special_tokens=False) == decoder.decode(encoding.ids), text


def test_prefix_after_special_tokens(llama):
    """Spec §5: with `legacy` a "▁" also follows <image>, and the prompt reads "USER:  \\n" with two spaces."""
    pieces = {i: piece for piece, i in llama[1].items()} | {420: "<image>"}

    def split(legacy, text):
        return [pieces[i] for i in Tokenizer.from_folder(llama[0][legacy]).encode(text).ids]

    text = "the <image>\nfox"
    assert split(True, text) == ["<s>", "▁the", "▁", "<image>", "▁", "<0x0A>", "fox"]
    assert split(False, text) == ["<s>", "▁the", "▁", "<image>", "<0x0A>", "fox"]
    assert split(True, "<image>the") == ["<s>", "<image>", "▁the"]
    assert split(False, "<image>the") == ["<s>", "<image>", "th", "e"]
    assert split(True, " the") == ["<s>", "▁", "▁the"]
    assert split(False, " the") == ["<s>", "▁the"]


@pytest.mark.parametrize("legacy", [True, False])
def test_spans_cover_the_text(llama, legacy):
    ours = Tokenizer.from_folder(llama[0][legacy])
    for text in texts():
        encoding = ours.encode(text)
        assert len(encoding.ids) == len(encoding.offsets)
        covered, at = "", 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            assert 0 <= start <= end <= len(text) and start <= at
            covered, at = covered + text[at:end], max(at, end)
            if token == 420:
                assert text[start:end] == "<image>"
        assert covered == text
    encoding = ours.encode("the你")
    assert encoding.offsets == [(0, 0), (0, 3), (3, 4), (3, 4), (3, 4)]


def test_flags_of_added_tokens(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama[0][True] / "tokenizer.model").read_bytes())
    tokens = {
        "420": {**IMAGE, "lstrip": True, "rstrip": True},
        "425": {"content": "<image>s", "special": False},
        "430": {"content": "a.b"},
    }
    settings = {"added_tokens_decoder": tokens, "add_bos_token": False, "add_eos_token": True, "pad_token": "<pad>"}
    write(tmp_path, tokenizer_config=settings)
    ours = Tokenizer.from_folder(tmp_path)
    the = ours.token_id("▁the")
    assert ours.encode("the \n<image> \t the").ids == [the, 420, the, 2]
    assert ours.encode("the \n<image> \t the").offsets == [(0, 3), (3, 15), (15, 18), (0, 0)]
    assert ours.encode("<image>s").ids == [425, 2]  # the longest token wins
    assert ours.encode("axb").ids[0] != 430 and ours.encode("a.b").ids == [430, 2]
    assert (ours.pad_token_id, ours.vocab_size) == (431, 432)  # no file gives <pad> an id
    assert ours.decode([the, 420, 425, 427, 10**6, -1, the]) == "the<image>s the"


def test_older_files_and_no_settings_at_all(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama[0][True] / "tokenizer.model").read_bytes())
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (420, 1, 2, None)
    write(
        tmp_path,
        added_tokens={"<image>": 420, "plain": 421},
        special_tokens_map={"additional_special_tokens": ["<image>"]},
    )
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("the<image>the").ids == [1, ours.token_id("▁the"), 420, ours.token_id("▁the")]
    assert ours.decode([420, 421]) == "plain"


# ----------------------------------------------------------------------------------------------------------- streaming


def check_stream(tokenizer, ids, skip_special_tokens):
    whole = tokenizer.decode(ids, skip_special_tokens)
    decoder, out = StreamDecoder(tokenizer, skip_special_tokens), ""
    for token in ids:
        out += decoder.push(token)
        assert whole.startswith(out)
    assert out + decoder.flush() == whole


@pytest.fixture(scope="module", params=["llama3", "legacy", "not legacy"])
def any_tokenizer(request, llama3, llama):
    folder = llama3 if request.param == "llama3" else llama[0][request.param == "legacy"]
    return Tokenizer.from_folder(folder)


def test_stream_equals_decode_for_every_prefix(any_tokenizer):
    for text in texts(40):
        ids = any_tokenizer.encode(text).ids
        for stop in range(len(ids) + 1):
            check_stream(any_tokenizer, ids[:stop], stop % 2 == 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 425), max_size=40), st.booleans())
def test_stream_equals_decode_for_any_ids(any_tokenizer, ids, skip_special_tokens):
    check_stream(any_tokenizer, ids, skip_special_tokens)


def test_any_ids_decode_as_in_transformers(llama3, llama):
    rng = random.Random(2)
    pairs = [
        (Tokenizer.from_folder(llama3), AutoTokenizer.from_pretrained(llama3)),
        (Tokenizer.from_folder(llama[0][False]), oracle_of(llama, False)),
    ]
    for ours, oracle in pairs:
        for _ in range(200):
            ids = rng.choices(range(ours.vocab_size), k=20)
            for skip in (True, False):
                assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), ids


def test_characters_come_whole_and_soon(llama3, llama):
    """Bytes wait for their character, words do not wait for the next one."""
    for tokenizer in (Tokenizer.from_folder(llama3), Tokenizer.from_folder(llama[0][False])):
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(token) for token in tokenizer.encode("the fox 🙂 dog").ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == "the fox 🙂 dog" and decoder.flush() == ""
        assert pieces[:2] == ["", "the"]
    decoder = StreamDecoder(tokenizer)
    cut = [decoder.push(token) for token in tokenizer.encode("🙂").ids[:-1]]
    assert "".join(cut) == "" and decoder.flush() == "\ufffd" * 3


# -------------------------------------------------------------------------------------------------------------- errors


def test_no_tokenizer_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json or tokenizer\.model, found neither"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00garbage" * 9])
def test_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("options", [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}])
def test_normalising_model_is_refused(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected a model that does not normalise"):
        Tokenizer.from_folder(tmp_path)


def test_model_without_prefix(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(add_dummy_prefix=False))
    ours = Tokenizer.from_folder(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.encode("the fox").ids[1:] == library.encode("the fox")
    assert ours.decode(ours.encode(" the").ids) == " the"


@pytest.mark.parametrize("name, content", [
    ("tokenizer_config", {"added_tokens_decoder": {"x": IMAGE}}),
    ("tokenizer_config", {"added_tokens_decoder": {"420": {"special": True}}}),
    ("tokenizer_config", {"added_tokens_decoder": {"420": "<image>"}}),
    ("tokenizer_config", {"added_tokens_decoder": {"-1": IMAGE}}),
    ("tokenizer_config", {"added_tokens_decoder": [IMAGE]}),
    ("tokenizer_config", [1]),
    ("tokenizer_config", {"additional_special_tokens": "<image>"}),
    ("special_tokens_map", {"additional_special_tokens": 7}),
    ("added_tokens", {"<image>": "many"}),
    ("special_tokens_map", 5),
])  # fmt: skip
def test_damaged_added_tokens(llama, tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes((llama[0][True] / "tokenizer.model").read_bytes())
    write(tmp_path, **{name: content})
    with pytest.raises(CheckpointError, match=rf"{name}\.json"):
        Tokenizer.from_folder(tmp_path)


def test_settings_that_are_not_followed_are_refused(llama, llama3, tmp_path):
    """transformers would split "<image>" into its letters, or draw the pieces by chance."""
    sampled, split = {"sp_model_kwargs": {"enable_sampling": True, "alpha": 0.1}}, {"split_special_tokens": True}
    for source, changes in ((llama3, split), (llama[0][True], split), (llama[0][True], sampled)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(source, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, tokenizer_config={**settings, **dict.fromkeys(changes)})
        Tokenizer.from_folder(folder)
        write(folder, tokenizer_config={**settings, **changes})
        with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {next(iter(changes))}: expected"):
            Tokenizer.from_folder(folder)


def test_missing_library_is_named(llama, llama3, monkeypatch):
    for name, folder in (("sentencepiece", llama[0][True]), ("tokenizers", llama3)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(CheckpointError, match=f"the package {name}, which reads it, is not installed"):
            Tokenizer.from_folder(folder)


def test_bad_text(any_tokenizer):
    with pytest.raises(InputError, match="got bytes"):
        any_tokenizer.encode(b"hello")
    with pytest.raises(InputError, match="surrogate pair at character 2"):
        any_tokenizer.encode("ab\ud83d")


def test_import_is_light():
    heavy = {"tokenizers", "sentencepiece", "transformers"}
    code = f"import sys, minifocus.inputs.tokenizer; print(sorted({heavy} & set(sys.modules)))"
    root = Path(minifocus.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
