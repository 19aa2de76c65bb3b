"""The fields of a tokenizer's table, and how they are written: csrc/runtime/text/token_table.h says what each is for.

Whole numbers are little-endian; an array is the number of its elements, in 64 bits, and the elements.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .character_classes import FOLDED, Ranges

_MAGIC, _VERSION = b"minifocus tokens", 1

TOKENIZERS, SENTENCEPIECE = 0, 1  # the library
DROPPED, EACH, FUSED, BYTES = range(4)  # what becomes of a character without a token
AS_BYTES, SPACES, STRIPPED_SPACES = range(3)  # how tokens are decoded
IS_TOKEN, IS_SPECIAL, IS_BYTE = 1, 2, 4

# The kinds of steps, and the options of METASPACE.
PREPEND, REPLACE_SPACES, PREFIX_SPACE, METASPACE, DIGITS, SPLIT_GPT2, SPLIT_LLAMA3, VISIBLE_BYTES = range(8)
NEVER, FIRST, ALWAYS, SPLITS = 0, 1, 2, 4

Step = tuple[int, int]  # kind and option


@dataclass(frozen=True)
class Added:
    """A token that is looked for in the text: `text` is what is looked for."""

    token_id: int
    text: str
    takes_left: bool
    takes_right: bool
    single_word: bool


@dataclass
class Table:
    """
    tokens      each one's text and IS_… flags, by id
    words       the model's own vocabulary by text; only where a word may be a token without merges
    characters  the ids of tokens of one character
    merges      (left, right, rank, result), ids but for the rank; of one rank, the leftmost is first
    """

    library: int
    decoding: int
    tokens: list[tuple[str, int]] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)
    merges: list[tuple[int, int, int, int]] = field(default_factory=list)
    unknown: int = DROPPED
    unknown_ids: Sequence[int] = ()
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    bos_id: int = -1
    added: list[Added] = field(default_factory=list)
    normalized_added: list[Added] = field(default_factory=list)
    normalizer: list[Step] = field(default_factory=list)
    pre_tokenizer: list[Step] = field(default_factory=list)
    whole: Sequence[int] = ()
    prefix: bool = False
    prefix_everywhere: bool = False
    letters: Ranges = ()
    numbers: Ranges = ()
    space: Ranges = ()
    digits: Ranges = ()
    added_space: Ranges = ()
    word: Ranges = ()
    folded: Sequence[Ranges] = ((),) * len(FOLDED)

    @property
    def by_expression(self) -> bool:
        """Whether added tokens are found as a regular expression finds them."""
        return self.library == SENTENCEPIECE

    def to_bytes(self) -> bytes:
        texts = [text.encode() for text, _ in self.tokens]
        words = sorted(self.words, key=str.encode)
        characters = sorted((ord(character), token_id) for character, token_id in self.characters.items())
        fields = [
            _MAGIC,
            struct.pack("<IB", _VERSION, self.library),
            _array("u1", [flags for _, flags in self.tokens]),
            _array("<u4", np.cumsum([len(text) for text in texts])),
            _text(b"".join(texts)),
            _array("<u4", [self.words[word] for word in words]),
            _array("<u4", characters, 2),
            _array("<u4", sorted(self.merges), 4),
            struct.pack("<B", self.unknown),
            _array("<u4", self.unknown_ids),
            _array("<u4", self.before),
            _array("<u4", self.after),
            struct.pack("<qB", self.bos_id, self.decoding),
            _added(self.added),
            _added(self.normalized_added),
            _array("u1", self.normalizer, 2),
            _array("u1", self.pre_tokenizer, 2),
            _array("<u4", self.whole),
            struct.pack("<BB", self.prefix, self.prefix_everywhere),
        ]
        sets = (self.letters, self.numbers, self.space, self.digits, self.added_space, self.word, *self.folded)
        return b"".join([*fields, *(_array("<u4", ranges, 2) for ranges in sets)])


def _array(dtype: str, values: object, width: int = 1) -> bytes:
    array = np.asarray(values, np.int64).reshape(-1, width)
    return struct.pack("<Q", len(array)) + array.astype(dtype).tobytes()


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _added(tokens: Iterable[Added]) -> bytes:
    written = [
        struct.pack("<IB", token.token_id, token.takes_left | token.takes_right << 1 | token.single_word << 2)
        + _text(token.text.encode())
        for token in tokens
    ]
    return struct.pack("<Q", len(written)) + b"".join(written)
