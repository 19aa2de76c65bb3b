"""Classes of characters, as the libraries that tokenize have them: each has a version of Unicode of its own.

They are found by asking: all characters go through a part of the library that treats those of a class apart.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

Ranges = tuple[tuple[int, int], ...]  # code points, ascending: (first, last), both in the class

FOLDED = "strevmld"  # the letters of 's, 't, 're, 've, 'm, 'll and 'd


@cache
def of_expression(expression: str) -> Ranges:
    r"""What one character's expression, such as \p{L}, matches in the package tokenizers."""
    from tokenizers import Regex, normalizers

    return _not_in(normalizers.Replace(Regex(expression), "").normalize_str(_everything()))


@cache
def folded() -> tuple[Ranges, ...]:
    """For each of FOLDED, the characters that equal it there where case does not count."""
    return tuple(of_expression(f"(?i:{letter})") for letter in FOLDED)


@cache
def digits() -> Ranges:
    """What the pre-tokenizer Digits takes for one."""
    from tokenizers import pre_tokenizers

    return _every_second(pre_tokenizers.Digits(individual_digits=False), _everything())


@cache
def rust_space() -> Ranges:
    """The white space that added tokens take in the package tokenizers."""
    return _not_in(_without_rust_space())


@cache
def rust_word() -> Ranges:
    r"""\w of the package tokenizers, beside which a single word does not stand."""
    from tokenizers import pre_tokenizers

    return _every_second(pre_tokenizers.Whitespace(), _without_rust_space())


@cache
def python_space() -> Ranges:
    r"""What str.strip() and \s of Python's expressions take."""
    return _not_in(re.sub(r"\s", "", _everything()))


@cache
def _everything() -> str:
    return "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


@cache
def _without_rust_space() -> str:
    from tokenizers import pre_tokenizers

    return "".join(text for text, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(_everything()))


def _every_second(pre_tokenizer: Any, text: str) -> Ranges:
    """The class that a pre-tokenizer parts from all else, where U+0000, the first of `text`, is not in it."""
    pieces = [text[begin:end] for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text)]
    return _ranges(_codes("".join(pieces[1::2])))


def _not_in(text: str) -> Ranges:
    return _ranges(np.setdiff1d(_codes(_everything()), _codes(text), assume_unique=True))


def _codes(text: str) -> Any:
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)


def _ranges(codes: Any) -> Ranges:
    """Ascending code points as ranges."""
    if not len(codes):
        return ()
    cuts = np.flatnonzero(np.diff(codes) > 1)
    return tuple(zip(codes[[0, *(cuts + 1)]].tolist(), codes[[*cuts, -1]].tolist(), strict=True))
