"""The runtime's text part, called through ctypes. As a program it does what may go wrong in memory, under the sanitizers:

    text_pieces.py LIBRARY FOLDER

reads FOLDER's tables, damaged ones too, its manifests and its texts, and prints what came of them. It imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = [f"csrc/runtime/text/{name}.cpp" for name in (
    "added_tokens", "merges", "model_text", "prompt", "split", "stream_decoder", "token_table", "tokenizer", "utf8",
)]  # fmt: skip
SOURCES += ["csrc/runtime/manifest.cpp", "tests/embedding/pieces_tokenizer.cpp"]


class RuntimeFails(Exception):
    """An Error of the runtime's."""


class Library:
    """The functions of pieces_tokenizer.cpp. Text goes in as bytes, so that it may be bad."""

    def __init__(self, file: Path | str):
        self._functions = ctypes.CDLL(str(file))
        self._functions.minifocus_error.restype = ctypes.c_char_p
        self._functions.minifocus_free.argtypes = [ctypes.c_void_p]

    def made(self, name: str, *arguments: Any) -> int:
        """The pointer that a function returns. Raises RuntimeFails."""
        function = self._functions[name]
        function.restype = ctypes.c_void_p
        pointer = function(*arguments)
        if pointer is None:
            raise RuntimeFails(self._functions.minifocus_error().decode())
        return int(pointer)

    def numbers(self, name: str, *arguments: Any) -> list[int]:
        pointer = self.made(name, *arguments)
        size = ctypes.c_int64.from_address(pointer).value
        values = list((ctypes.c_int64 * size).from_address(pointer + 8))
        self._functions.minifocus_free(pointer)
        return values

    def bytes_(self, name: str, *arguments: Any) -> bytes:
        pointer = self.made(name, *arguments)
        value = ctypes.string_at(pointer + 8, ctypes.c_int64.from_address(pointer).value)
        self._functions.minifocus_free(pointer)
        return value

    def number(self, name: str, *arguments: Any) -> int:
        function = self._functions[name]
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        self._functions[name](*arguments)


class EmbeddedTokenizer:
    """csrc/runtime/text/tokenizer.h's Tokenizer."""

    def __init__(self, library: Library, file: Path):
        self._library = library
        self.handle = ctypes.c_void_p(library.made("tokenizer_read", bytes(file)))
        self.vocab_size = library.number("tokenizer_vocab_size", self.handle)

    def close(self) -> None:
        self._library.call("tokenizer_close", self.handle)

    def encode(self, text: bytes, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        values = self._library.numbers("tokenizer_encode", self.handle, text, ctypes.c_int64(len(text)), special)
        return values[::3], list(zip(values[1::3], values[2::3], strict=True))

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self._library.bytes_("tokenizer_decode", self.handle, *_ids(ids), skip_special).decode()

    def stream(self, ids: list[int], skip_special: bool = True) -> list[str]:
        """What each of `ids` makes final, and the rest."""
        left, pieces = self._library.bytes_("tokenizer_stream", self.handle, *_ids(ids), skip_special), []
        while left:
            size, _, left = left.partition(b" ")
            pieces.append(left[: int(size)].decode())
            left = left[int(size) :]
        return pieces

    def model_text(self, manifest: Path, question: bytes, num_pictures: int) -> tuple[list[int], list[bool]]:
        """model_text.h's, read with this tokenizer."""
        sizes = ctypes.c_int64(len(question)), ctypes.c_int64(num_pictures)
        values = self._library.numbers("model_text", self.handle, bytes(manifest), question, *sizes)
        return values[::2], [bool(value) for value in values[1::2]]


class EmbeddedPrompts:
    """csrc/runtime/text/prompt.h's Prompts."""

    def __init__(self, library: Library, manifest: Path):
        self._library = library
        self._handle = ctypes.c_void_p(library.made("prompts_read", bytes(manifest)))

    def close(self) -> None:
        self._library.call("prompts_close", self._handle)

    def write(self, question: bytes, num_pictures: int) -> tuple[str, tuple[int, int]]:
        sizes = ctypes.c_int64(len(question)), ctypes.c_int64(num_pictures)
        begin, end, text = self._library.bytes_("prompts_write", self._handle, question, *sizes).decode().split(" ", 2)
        return text, (int(begin), int(end))


def _ids(ids: list[int]) -> tuple[Any, ctypes.c_int64]:
    return (ctypes.c_int64 * len(ids))(*ids), ctypes.c_int64(len(ids))


def damaged(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """A file cut off at any place, and with a few bytes changed, `count` times each."""
    rng = random.Random(seed)
    for _ in range(count):
        yield content[: rng.randrange(len(content))]
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        yield bytes(changed)


def attempt(function: Any, *arguments: Any) -> Any:
    """What a function returns, or the error that it raises, without the names of files."""
    try:
        return function(*arguments)
    except (RuntimeFails, UnicodeDecodeError) as error:
        return str(error).rpartition("/")[2]


def main(library: Library, folder: Path) -> None:
    rng = random.Random(0)
    texts = [text.encode() for text in json.loads((folder / "texts.json").read_text())]
    bad = [text[: len(text) // 2] + b"\xff" + text[len(text) // 2 :] for text in texts[:20]]
    bad += [text.replace(b"\xf0", b"\xed") for text in texts[:20]]
    results: list[Any] = []
    for file in sorted(folder.glob("*.bin")):
        tokenizer = EmbeddedTokenizer(library, file)
        for text in (*texts, *bad):
            results.append(attempt(tokenizer.encode, text))
            ids = [rng.randrange(-2, tokenizer.vocab_size + 2) for _ in range(12)]
            results += [attempt(tokenizer.decode, ids, False), attempt(tokenizer.stream, ids)]
        tokenizer.close()
        changed = folder / "changed"
        for content in damaged(file.read_bytes(), 40, 1):
            changed.write_bytes(content)
            try:
                tokenizer = EmbeddedTokenizer(library, changed)
            except RuntimeFails as error:
                results.append(str(error).rpartition("/")[2])
                continue
            for text in texts[:6]:
                results.append(attempt(tokenizer.encode, text))
            results.append(attempt(tokenizer.stream, list(range(0, tokenizer.vocab_size, 7))))
            tokenizer.close()
    for file in sorted(folder.glob("*.txt")):
        prompts = EmbeddedPrompts(library, file)
        results += [attempt(prompts.write, text, number) for text in (*texts, *bad) for number in (0, 1, 2)]
        prompts.close()
    print(len(results), hashlib.sha256(repr(results).encode()).hexdigest())


if __name__ == "__main__":
    main(Library(sys.argv[1]), Path(sys.argv[2]))
