"""The decoder, its tokenizer and its template are those of the GGUF file, as transformers and its own template read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
import regex
import torch
from safetensors import safe_open

import minifocus
from minifocus.inputs.prompt import build_conversation, build_prompt

Load = Callable[..., minifocus.Llava]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gguf(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file, which is read once: by its library it takes seconds, and so does a table that transformers asks it for."""
    import gguf

    from experiments.small.wheels import SMOLLM2

    file = tmp_path_factory.mktemp("gguf") / "decoder.gguf"
    file.write_bytes(SMOLLM2.read(wheels))
    with pytest.MonkeyPatch.context() as patched:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patched.setattr(gguf, name, cache(getattr(gguf, name)))
        yield file


@pytest.fixture(scope="module")
def fields(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    names = ("tokens", "merges", "token_type")
    reader = GGUFReader(gguf)
    found = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in names}
    return found | {"template": reader.fields["tokenizer.chat_template"].contents()}


# ---- weights and config ----


def test_weights_and_config_are_those_that_transformers_reads(gguf: Path, small: Path) -> None:
    """Exactly: dequantised, and with the channels of queries and keys in Hugging Face's order."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    own = json.loads((small / "llava/config.json").read_text())
    text = own["text_config"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**text))  # for its numbers of heads, which are compared below
    read = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)
    expected, config = read["tensors"], read["config"]
    with safe_open(small / "llava/model-00001-of-00002.safetensors", framework="pt") as stored:
        assert {f"language_model.{name}" for name in expected} == set(stored.keys())
        for name, value in expected.items():
            weight = stored.get_tensor(f"language_model.{name}")
            if name == "model.embed_tokens.weight":
                assert torch.allclose(weight[-1], value.mean(dim=0), atol=1e-6)
                weight = weight[:-1]  # the picture's token is beyond
            assert torch.equal(weight, value), name
    assert own["tie_word_embeddings"] and text["rms_norm_eps"] == 1e-5 == pytest.approx(config["rms_norm_eps"])
    assert own["image_token_id"] == config["vocab_size"] == text["vocab_size"] - 1
    same = ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads")
    for key in (*same, "num_key_value_heads", "rope_theta", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert text[key] == config[key], key


# ---- tokenizer ----

TEXTS = [
    "",
    " ",
    "What is the capital of France?",
    "  two  spaces, and     936 after five; 12,345.67 and v2.0",
    "don't I'LL we've\t\r\n\n\u00a0z",
    "naïve café 🙂🙂 漢字 ½ ² Ⅷ ٣ \u200b",
    "<|im_start|>user\nx<|im_end|>\ny <|endoftext|> <file_sep>",
    "def f(x):\n    return x**2  # 4\n\n\n",
]


def written_out(text: str, fields: dict[str, Any]) -> list[int]:
    """llama.cpp's tokenizer "smollm", a second time: numerals one by one, GPT-2's words, then always the earliest merge."""
    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(fields["merges"])}
    special = [t for t, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == 3]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in letters)}
    word = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = []
    for chunk in regex.split(f"({'|'.join(map(regex.escape, special))})", text):
        if chunk in special:
            ids.append(vocab[chunk])
            continue
        for part in regex.split(r"(\p{N})", chunk):
            for piece in word.findall(part):
                symbols = [letters[byte] for byte in piece.encode()]
                while len(symbols) > 1:
                    pairs = list(pairwise(symbols))
                    rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairs))
                    if rank == len(ranks):
                        break
                    symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
                ids += [vocab[symbol] for symbol in symbols]
    return ids


def test_tokenizer_against_its_rule_written_out(load: Load, fields: dict[str, Any]) -> None:
    tokenizer = load("llava").tokenizer
    assert tokenizer is not None
    for text in [*TEXTS, (ROOT / "README.md").read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text).ids
        assert ids == written_out(text, fields), text[:80]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("a<image>b").ids == [81, tokenizer.vocab_size - 1, 82]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_tokenizer_against_transformers(load: Load, small: Path, gguf: Path) -> None:
    """That of the folder always; that of the GGUF file where no space is before a numeral, as it knows no rule for those."""
    from transformers import AutoTokenizer

    tokenizer = load("llava").tokenizer
    of_folder = AutoTokenizer.from_pretrained(small / "llava")
    of_gguf = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer is not None
    for text in [*TEXTS, (ROOT / "README.md").read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text).ids
        assert of_folder(text)["input_ids"] == ids
        assert of_folder.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
        plain = regex.sub(r"\s+(?=\p{N})", "", text)
        plain = regex.sub(r"[\p{N}--[0-9]]", "", plain, flags=regex.VERSION1)
        assert of_gguf(plain)["input_ids"] == tokenizer.encode(plain).ids


# ---- chat template ----


def test_chat_template_is_that_of_the_file(load: Load, fields: dict[str, Any]) -> None:
    """Of text: one question, and a conversation, whose turns all end with the token that ends an answer."""
    template, own = jinja2.Template(fields["template"]), load("llava").template
    question = {"role": "user", "content": "What is it?"}
    expected = template.render(messages=[question], add_generation_prompt=True)
    assert build_prompt("What is it?", 0, own).text == expected
    messages = [question, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Which?"}]
    messages += [{"role": "assistant", "content": "Chelsea."}]
    turns = [("What is it?", 0, "A cat."), ("Which?", 0, "Chelsea.")]
    text, spans = build_conversation(turns, own, ["<|im_end|>"], "<|im_end|>")
    assert text.rstrip() == template.render(messages=messages).rstrip()
    assert [text[span.asked : span.ended] for span in spans] == ["A cat.<|im_end|>", "Chelsea.<|im_end|>"]


# ---- answers ----

ANSWERS = [
    ("What is the capital of France?", "Paris"),
    ("What is 2+2?", "4"),
    ("What is the opposite of hot?", "cold"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_to_text_are_right(load: Load, dtype: str) -> None:
    """One by one, and in a batch whose rows differ in length."""
    model = load("llava", dtype)
    questions = [question for question, _ in ANSWERS]
    alone = [model.generate(None, question, max_new_tokens=12) for question in questions]
    for answer, (_, word) in zip(alone, ANSWERS, strict=True):
        assert word.lower() in answer.text.lower()
    if dtype == "float32":
        together = model.generate_batch([None] * len(questions), questions, max_new_tokens=12)
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
