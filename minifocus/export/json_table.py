"""The table of a tokenizer.json, from what the package tokenizers itself writes of the tokenizer that it has read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files.reading import named
from ..inputs.tokenizer import TokenizersBackend
from ..loading.json_fields import JsonFields
from . import character_classes
from . import table_format as form
from .table_format import Added, Step, Table

# The expressions by which byte-level vocabularies split, and the steps that do the same.
_LINE_ENDS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _LINE_ENDS_AND_SPACE
_SPLITS = {
    _SPLIT_LLAMA3: (form.SPLIT_LLAMA3, 3),
    _SPLIT_LLAMA3.replace("{1,3}", ""): (form.SPLIT_LLAMA3, 1),  # Qwen 2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": (form.SPLIT_GPT2, 0),
}
_SCHEMES = {"never": form.NEVER, "first": form.FIRST, "always": form.ALWAYS}


def table_of(backend: TokenizersBackend, file: Path) -> Table:
    """The table without its tokens' texts. Raises CheckpointError, which names `file` and the key."""
    definition = JsonFields(json.loads(backend.library.to_str()), named(file))
    table = Table(form.TOKENIZERS, _decoding(definition))
    table.normalizer = _steps(definition, "normalizer", "normalizers", _normalizer)
    table.pre_tokenizer = _steps(definition, "pre_tokenizer", "pretokenizers", _pre_tokenizer)
    table.before, table.after = _ends(definition)
    _add_model(table, definition.section("model"))
    _add_tokens(table, backend)
    kinds = {kind for kind, _ in table.pre_tokenizer}
    if kinds & {form.SPLIT_GPT2, form.SPLIT_LLAMA3}:
        names = (r"\p{L}", r"\p{N}", r"\s")
        table.letters, table.numbers, table.space = map(character_classes.of_expression, names)
    if form.SPLIT_LLAMA3 in kinds:
        table.folded = character_classes.folded()
    if form.DIGITS in kinds:
        table.digits = character_classes.digits()
    return table


def _add_model(table: Table, model: JsonFields) -> None:
    model.check("type", model.get("type") == "BPE", "BPE, as all LLaVA checkpoints have")
    model.check("dropout", not model.get("dropout"), "none")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        model.check(key, not model.get(key), "none")
    vocabulary, merges = model.section("vocab").members, model.get("merges")
    model.check(
        "merges", isinstance(merges, list) and all(isinstance(pair, list) for pair in merges), "pairs of tokens"
    )
    if len(set(vocabulary.values())) != len(vocabulary):
        raise model.error("vocab", "a number of its own for each token", "two with the same")
    table.characters = {text: token_id for text, token_id in vocabulary.items() if len(text) == 1}
    table.words = vocabulary if model.get("ignore_merges") else {}
    table.merges = [
        (vocabulary[left], vocabulary[right], rank, vocabulary[left + right])
        for rank, (left, right) in enumerate(merges)
    ]
    unknown = model.get("unk_token")
    if model.get("byte_fallback"):
        table.unknown = form.BYTES
        written = [f"<0x{byte:02X}>" for byte in range(256)]
        missing = next((token for token in written if token not in vocabulary), None)
        if missing is not None:
            raise model.error("vocab", "a token for each byte, as byte_fallback is true", f"none for {missing}")
        table.unknown_ids = [vocabulary[token] for token in written]
    elif unknown is not None:
        model.check("unk_token", unknown in vocabulary, "a token of the vocabulary")
        table.unknown = form.FUSED if model.get("fuse_unk") else form.EACH
        table.unknown_ids = [vocabulary[unknown]]
    # They stand for unknown characters only once all merges are done.
    merged = {token_id for left, right, _, result in table.merges for token_id in (left, right, result)}
    if merged & set(table.unknown_ids):
        raise model.error("merges", "none with the tokens of unknown characters", "one with them")


def _add_tokens(table: Table, backend: TokenizersBackend) -> None:
    normalizer = backend.library.normalizer
    for token_id, token in sorted(backend.library.get_added_tokens_decoder().items()):
        text = token.content
        if token.normalized and normalizer is not None:
            text = normalizer.normalize_str(text)
        tokens = table.normalized_added if token.normalized else table.added
        tokens.append(Added(token_id, text, token.lstrip, token.rstrip, token.single_word))
    every = (*table.added, *table.normalized_added)
    if any(token.takes_left or token.takes_right for token in every):
        table.added_space = character_classes.rust_space()
    if any(token.single_word for token in every):
        table.word = character_classes.rust_word()


def _steps(definition: JsonFields, key: str, members: str, step: Any) -> list[Step]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    part = definition.section(key)
    if not part.members:
        return []
    if part.get("type") != "Sequence":
        return list(step(part))
    return [one for inner in _each(part, members) for one in step(inner)]


def _each(part: JsonFields, members: str) -> list[JsonFields]:
    return [JsonFields(one, part.where, f"{part.path}{members}.{i}.") for i, one in enumerate(part.get(members) or [])]


def _normalizer(part: JsonFields) -> list[Step]:
    kind = part.get("type")
    part.check("type", kind in ("Prepend", "Replace"), "Prepend or Replace")
    if kind == "Prepend":
        part.check("prepend", part.get("prepend") == "▁", "'▁'")
        return [(form.PREPEND, 0)]
    part.check("pattern", part.get("pattern") == {"String": " "}, "a space")
    part.check("content", part.get("content") == "▁", "'▁'")
    return [(form.REPLACE_SPACES, 0)]


def _pre_tokenizer(part: JsonFields) -> list[Step]:
    kind = part.get("type")
    part.check("type", kind in ("Metaspace", "Digits", "Split", "ByteLevel"), "Metaspace, Digits, Split or ByteLevel")
    if kind == "Metaspace":
        part.check("replacement", part.get("replacement") == "▁", "'▁'")
        scheme = _SCHEMES[part.choice("prepend_scheme", "", tuple(_SCHEMES))]
        return [(form.METASPACE, scheme + form.SPLITS * part.boolean("split", True))]
    if kind == "Digits":
        return [(form.DIGITS, int(part.boolean("individual_digits", False)))]
    if kind == "Split":
        pattern = part.get("pattern")
        expression = str(pattern.get("Regex")) if isinstance(pattern, dict) else ""
        part.check("pattern", expression in _SPLITS, "the expression of GPT-2, Llama 3 or Qwen 2")
        part.check("behavior", part.get("behavior") == "Isolated", "Isolated")
        part.check("invert", not part.get("invert"), "false")
        return [_SPLITS[expression]]
    steps = [(form.PREFIX_SPACE, 0)] * part.boolean("add_prefix_space", True)
    steps += [(form.SPLIT_GPT2, 0)] * part.boolean("use_regex", True)
    return [*steps, (form.VISIBLE_BYTES, 0)]


def _ends(definition: JsonFields) -> tuple[list[int], list[int]]:
    """The ids before and behind a text."""
    part = definition.section("post_processor")
    parts = _each(part, "processors") if part.get("type") == "Sequence" else [part] * bool(part.members)
    ends: tuple[list[int], list[int]] = ([], [])
    for number, one in enumerate(parts):
        kind = one.get("type")
        is_last = number == len(parts) - 1
        one.check(
            "type",
            kind == "ByteLevel" or (kind == "TemplateProcessing" and is_last),
            "TemplateProcessing, or ByteLevel",
        )
        if kind == "ByteLevel":
            one.check("trim_offsets", one.get("trim_offsets") is False, "false")
            continue
        side, special = 0, one.section("special_tokens")
        for piece in one.get("single"):
            if "Sequence" in piece:
                side += 1
            else:
                ends[min(side, 1)].extend(special.section(piece["SpecialToken"]["id"]).get("ids"))
        one.check("single", side == 1, "one place for the text")
    return ends


def _decoding(definition: JsonFields) -> int:
    part = definition.section("decoder")
    if part.get("type") == "ByteLevel":
        return form.AS_BYTES
    steps: list[Any] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    found = part.get("decoders") if part.get("type") == "Sequence" else None
    if found == steps:
        return form.SPACES
    strips = [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    definition.check(
        "decoder", found == strips, "ByteLevel, or Llama's sequence of Replace, ByteFallback, Fuse and Strip"
    )
    return form.STRIPPED_SPACES
