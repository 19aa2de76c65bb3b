"""Text ↔ token ids, by the libraries that define them: `tokenizers` for tokenizer.json, else `sentencepiece`.

Each is imported only when a folder needs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import brief
from ..errors import CheckpointError, InputError
from ..files.reading import present, read_bytes
from ..loading.json_fields import JsonFields

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Encoding:
    """Token ids, and for each the span of characters that it stands for. A token that the tokenizer added has (0, 0)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Equals transformers' AutoTokenizer of the same folder, except that a BOS token is never put before another one."""

    def __init__(self, backend: TokenizersBackend | SentencePieceBackend, named: dict[str, str]):
        """`named` holds the texts of bos_token, eos_token and so on, as far as the folder has them."""
        self.backend = backend
        self.special_tokens = {key: named[key] for key in _NAMED if key in named}  # for chat templates
        self.vocab_size = backend.size()
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self.token_id(named[key]) if key in named else None for key in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Load tokenizer.json, or tokenizer.model where there is none. Raises CheckpointError, naming the file."""
        file = Path(folder) / "tokenizer.json"
        make: Any = TokenizersBackend
        if not present(file):
            file, make = Path(folder) / "tokenizer.model", SentencePieceBackend
        if not present(file):
            raise CheckpointError(f"{folder}: expected tokenizer.json or tokenizer.model, found neither")
        settings, added = _read_settings(Path(folder))
        contents = {key: _content(settings.get(key)) for key in (*_NAMED, *settings.members) if key.endswith("_token")}
        named = {key: content for key, content in contents.items() if content}
        try:
            return cls(make(file, settings, named, added), named)
        except CheckpointError:
            raise
        except ImportError as error:
            raise CheckpointError(f"{file}: the package {error.name}, which reads it, is not installed") from error
        except Exception as error:  # the libraries raise bare Exception and RuntimeError
            raise CheckpointError(f"{file}: not a tokenizer that can be read: {brief(str(error))}") from error

    def token_id(self, token: str) -> int | None:
        """The id of a whole token such as "<image>"; None when the vocabulary has no such token."""
        return self.backend.token_id(token)

    def token(self, token_id: int) -> str | None:
        """A token's text in the vocabulary; None for an id without a token."""
        return self.backend.piece(token_id) if 0 <= token_id < self.vocab_size else None

    def encode(self, text: str, special: bool = True) -> Encoding:
        """A special token that is written out in the text becomes that token. Raises InputError if `text` is not text.

        Without `special`, the tokenizer adds no tokens of its own at either end.
        """
        if not isinstance(text, str):
            raise InputError(f"expected text to tokenize, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text has half of a surrogate pair at character {error.start}") from error
        ids, offsets = self.backend.encode(text, special)
        if len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id and offsets[0] == (0, 0):
            ids, offsets = ids[1:], offsets[1:]
        return Encoding(ids, offsets)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Ids → text. Ids without a token, which a padded vocabulary has, are left out."""
        return self.backend.decode([token_id for token_id in ids if self._is_text(token_id, skip_special_tokens)])

    def _is_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        known = 0 <= token_id < self.vocab_size and self.backend.piece(token_id) is not None
        return known and not (skip_special_tokens and token_id in self.backend.special)


class StreamDecoder:
    """Decodes while tokens are generated. The pieces of `push` and the last one of `flush` join to `decode(all ids)`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # what is not out yet, after the last token that is: a first token loses its space
        self._out = ""  # the part of the text of _ids that is out

    def push(self, token_id: int) -> str:
        """The text that this token makes final; "" while a character may still be incomplete."""
        if not self._tokenizer._is_text(token_id, self._skip):
            return ""
        self._ids.append(token_id)
        # A run of byte tokens is decoded together: until it has ended, a bad byte can turn all of it into U+FFFD.
        if BYTE_TOKEN.fullmatch(self._tokenizer.backend.piece(token_id) or ""):
            return ""
        text = self._tokenizer.decode(self._ids, self._skip)
        if text.endswith("\ufffd"):
            return ""
        final = text[len(self._out) :]
        self._ids, self._out = [token_id], self._tokenizer.decode([token_id], self._skip)
        return final

    def flush(self) -> str:
        """The rest of the text, when no more tokens will come. The decoder then starts anew."""
        final = self._tokenizer.decode(self._ids, self._skip)[len(self._out) :]
        self._ids, self._out = [], ""
        return final


def _read_settings(folder: Path) -> tuple[JsonFields, dict[int, dict[str, Any]]]:
    """tokenizer_config.json, and the added tokens by id. If it does not list these, two older files do."""
    settings = JsonFields.of_file(folder / "tokenizer_config.json", default={})
    settings.check("split_special_tokens", not settings.get("split_special_tokens"), "false")
    added: dict[int, dict[str, Any]] = {}
    if "added_tokens_decoder" in settings:
        settings.check("added_tokens_decoder", settings.given("added_tokens_decoder"), "an object")
        decoder = settings.section("added_tokens_decoder")
        for token_id in decoder.members:
            decoder.check(token_id, token_id.isdecimal(), "a token's number as the key")
            token = decoder.section(token_id)
            content = token.get("content")
            token.check("content", isinstance(content, str) and content != "", "text")
            added[int(token_id)] = _added_token(content, token.members)
        return settings, added
    older = JsonFields.of_file(folder / "special_tokens_map.json", default={})
    _extra(older)
    settings = JsonFields({**settings.members, **older.members}, settings.where)
    special = {_content(value) for value in settings.members.values()} | set(_extra(settings))
    tokens = JsonFields.of_file(folder / "added_tokens.json", default={})
    for content in tokens.members:
        tokens.check(content, content != "", "a token's text as the key")
        added[tokens.integer(content, None, minimum=0)] = _added_token(content, {"special": content in special})
    return settings, added


def _added_token(content: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the library's AddedToken. Flags that are not `given` are as the library sets them."""
    flags = {flag: bool(given.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "special")}
    return {"content": content, "normalized": bool(given.get("normalized", not flags["special"])), **flags}


def _content(value: Any) -> str | None:
    """The text of a token, which files write as a string or as an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _extra(settings: JsonFields) -> list[str]:
    """The texts of special tokens without a role, under the key's new or old name."""
    key = "extra_special_tokens" if settings.get("extra_special_tokens") else "additional_special_tokens"
    tokens = settings.get(key) or []
    settings.check(key, isinstance(tokens, list | dict), "a list of special tokens")
    contents = map(_content, tokens.values() if isinstance(tokens, dict) else tokens)
    return [content for content in contents if content]


def _join(pieces: Iterable[str]) -> str:
    """Join pieces. In a run of byte tokens that is not UTF-8, each becomes one U+FFFD."""
    text, run = "", b""
    for piece in (*pieces, ""):
        if BYTE_TOKEN.fullmatch(piece):
            run += bytes.fromhex(piece[3:5])
            continue
        if run:
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            run = b""
        text += piece
    return text


class TokenizersBackend:
    """tokenizer.json, with the tokens that only the other files have. Its own post-processor decides about BOS."""

    def __init__(self, file: Path, settings: JsonFields, named: dict[str, str], added: dict[int, dict[str, Any]]):
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        self.library = Library.from_buffer(read_bytes(file))
        self.library.no_truncation()
        self.library.no_padding()
        present = self.library.get_added_tokens_decoder()
        if "added_tokens_decoder" not in settings:  # then tokenizer.json is more reliable than the older files
            added = {token_id: token for token_id, token in added.items() if token_id not in present}
        known = {repr(token) for token in present.values()}
        tokens = [AddedToken(**added[token_id]) for token_id in sorted(added)]
        tokens = [token for token in tokens if repr(token) not in known]
        contents = {token.content for token in [*tokens, *present.values()]}
        missing = dict.fromkeys(content for content in [*named.values(), *_extra(settings)] if content not in contents)
        self.library.add_tokens(tokens + [AddedToken(content, special=True) for content in missing])
        self.special = {i for i, token in self.library.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.library.encode(text, add_special_tokens=special)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)

    def piece(self, token_id: int) -> str | None:
        return self.library.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def size(self) -> int:
        return max(self.library.get_vocab(with_added_tokens=True).values()) + 1


class SentencePieceBackend:
    """tokenizer.model of Llama's kind: no normalisation, spaces as "▁", unknown characters as bytes.

    The text is split at added tokens. `legacy` in tokenizer_config.json (true when absent, as when the flag was new)
    puts a "▁" before each stretch of text between them. Otherwise only the start of the whole text gets one.
    """

    def __init__(self, file: Path, settings: JsonFields, named: dict[str, str], added: dict[int, dict[str, Any]]):
        from sentencepiece import SentencePieceProcessor

        # They may ask for pieces that are drawn at random.
        settings.check("sp_model_kwargs", not settings.get("sp_model_kwargs"), "none")
        model = read_bytes(file)
        with_prefix = _join(SentencePieceProcessor(model_proto=model).encode("ﬁ  x ", out_type=str))
        # The Python API cannot switch off the model's own "▁". Protobuf merges a repeated message into the first one, so these
        # four bytes set normalizer_spec.add_dummy_prefix (field 3 of field 3) to false.
        self.model = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        if _join(self.model.encode("ﬁ  x ", out_type=str)) != "ﬁ▁▁x▁":
            raise CheckpointError(
                f"{file}: expected a model that does not normalise text; this one needs a tokenizer.json"
            )
        add_prefix = with_prefix.startswith("▁") and settings.get("add_prefix_space") is not False
        self.prefix = "▁" if add_prefix else ""
        self.every_segment = settings.get("legacy") is not False

        for key in ("bos", "eos", "unk"):
            token_id = getattr(self.model, key + "_id")()
            if token_id >= 0:
                named.setdefault(key + "_token", self.model.id_to_piece(token_id))
        self.ids = {token["content"]: token_id for token_id, token in sorted(added.items())}
        specials = [*named.values(), *_extra(settings)]
        for content in specials:
            token_id = self.model.piece_to_id(content)
            if self.model.id_to_piece(token_id) != content:  # a token without an id in any file comes after all others
                token_id = max([self.model.get_piece_size() - 1, *self.ids.values()]) + 1
            self.ids.setdefault(content, token_id)
        self.special = {self.ids[content] for content in specials}
        self.special |= {token_id for token_id, token in added.items() if token["special"]}
        self._added = {token_id: content for content, token_id in self.ids.items()}
        self.bos = self.ids.get(named.get("bos_token", "")) if settings.get("add_bos_token", True) else None
        self.eos = self.ids.get(named.get("eos_token", "")) if settings.get("add_eos_token", False) else None

        self.order = sorted(self.ids, key=len, reverse=True)  # the longest token wins
        self.left = {token["content"] for token in added.values() if token["lstrip"]}
        self.right = {token["content"] for token in added.values() if token["rstrip"]}
        patterns = [r"\s*" * (t in self.left) + re.escape(t) + r"\s*" * (t in self.right) for t in self.order]
        self._split = re.compile("|".join(f"({pattern})" for pattern in patterns) or r"(?!)")

    def encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        ids = [self.bos] if special and self.bos is not None else []
        offsets, start = [(0, 0)] * len(ids), 0
        for match in self._split.finditer(text):
            self._encode_segment(text[start : match.start()], start, ids, offsets)
            ids.append(self.ids[self.order[(match.lastindex or 0) - 1]])
            offsets.append(match.span())
            start = match.end()
        self._encode_segment(text[start:], start, ids, offsets)
        end = [self.eos] if special and self.eos is not None else []
        return ids + end, offsets + [(0, 0)] * len(end)

    def _encode_segment(self, segment: str, start: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        first = start == 0 and not segment.startswith((" ", "▁"))
        prefix = self.prefix if segment and (self.every_segment or first) else ""
        text = prefix + segment
        ids += self.model.encode(text)
        at, end, bytes_left = 0, 0, 0
        for piece in self.model.encode(text, out_type=str):
            if not BYTE_TOKEN.fullmatch(piece):
                at, end = end, end + len(piece)
            elif bytes_left:
                bytes_left -= 1
            else:  # each byte of a character stands for that character
                at, end, bytes_left = end, end + 1, len(text[end].encode()) - 1
            offsets.append((start + max(at - len(prefix), 0), start + max(end - len(prefix), 0)))

    def decode(self, ids: list[int]) -> str:
        text = _join((self.piece(token_id) or "").replace("▁", " ") for token_id in ids)
        return text[1:] if self.prefix and text.startswith(" ") else text

    def piece(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id]
        return self.model.id_to_piece(token_id) if token_id < self.model.get_piece_size() else None

    def token_id(self, token: str) -> int | None:
        found = self.ids.get(token, self.model.piece_to_id(token))
        return found if self.piece(found) == token else None

    def size(self) -> int:
        return max(self.model.get_piece_size() - 1, *self._added) + 1
