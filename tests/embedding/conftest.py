"""What the tests of csrc/runtime share: its parts as shared libraries, which need neither torch nor a whole model."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from compiled import compiled

CompilePieces = Callable[[str, Sequence[Path], Sequence[str]], ctypes.CDLL]


@pytest.fixture(scope="session")
def compile_pieces() -> CompilePieces:
    """(name, sources, libraries) → pieces_{name}.cpp beside this file, with the sources that it calls, as a library of ctypes.

    Of the libraries, -l names are given. `error_message` is a function of every piece that returns text.
    """

    def compile_pieces(name: str, sources: Sequence[Path], libraries: Sequence[str] = ()) -> ctypes.CDLL:
        pieces = Path(__file__).with_name(f"pieces_{name}.cpp")
        return ctypes.CDLL(str(compiled([pieces, *sources], libraries)))

    return compile_pieces
