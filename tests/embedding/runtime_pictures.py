"""The picture part of csrc/runtime, called from Python: pieces_pictures.cpp by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from compiled import RUNTIME

SOURCES = [RUNTIME / "manifest.cpp", RUNTIME / "anyres.cpp", *sorted((RUNTIME / "pictures").glob("*.cpp"))]
LIBRARIES = ["png", "jpeg", "z"]


class Refused(Exception):
    """A minifocus::Error, with its message."""


class RuntimePictures:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.error_message.restype = ctypes.c_char_p
        for name in ("decode", "resize_picture", "make_tiles_of", "anyres_of"):
            getattr(library, name).restype = ctypes.c_bool

    def decode(self, content: bytes) -> np.ndarray:
        """A file's content → uint8 [height, width, 3]."""
        return self._picture("decode", content, ctypes.c_int64(len(content)))

    def resize(
        self, picture: np.ndarray, size: tuple[int, int], resample: int, box: Sequence[float] | None = None
    ) -> np.ndarray:
        """uint8 [height, width, 3] → the same in another size; box is (left, top, right, bottom)."""
        edges = None if box is None else (ctypes.c_float * 4)(*box)
        return self._picture("resize_picture", *_samples(picture), *_whole(size), resample, edges)

    def tiles(self, manifest: Path, picture: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """uint8 [height, width, 3] → float32 [T, 3, S, S] and (height, width)."""
        count, side, *size = self._call("make_tiles_of", 4, str(manifest).encode(), *_samples(picture))
        values = np.empty((count, 3, side, side), np.float32)
        self._library.take_tiles(values.ctypes.data_as(ctypes.c_void_p))
        return values, (size[0], size[1])

    def anyres(
        self, size: tuple[int, int], pinpoints: Sequence[Sequence[int]], image_size: int, grid: Sequence[int]
    ) -> list[int]:
        """The best pinpoint's height and width; the unpadded grid's top, left, rows and columns; the number of tokens."""
        edges = [edge for pinpoint in pinpoints for edge in pinpoint]
        array = (ctypes.c_int64 * len(edges))(*edges)
        cells = (ctypes.c_int64 * 4)(*grid)
        return self._call("anyres_of", 7, *_whole((*size,)), array, *_whole((len(pinpoints), image_size)), cells)

    def _call(self, name: str, results: int, *arguments: object) -> list[int]:
        found = (ctypes.c_int64 * results)()
        if not getattr(self._library, name)(*arguments, found):
            raise Refused(self._library.error_message().decode())
        return list(found)

    def _picture(self, name: str, *arguments: object) -> np.ndarray:
        picture = np.empty((*self._call(name, 2, *arguments), 3), np.uint8)
        self._library.take_picture(picture.ctypes.data_as(ctypes.c_void_p))
        return picture


def _whole(numbers: Sequence[int]) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def _samples(picture: np.ndarray) -> list[object]:
    """The address of a picture's samples, its height and its width."""
    assert picture.flags.c_contiguous and picture.dtype == np.uint8
    return [picture.ctypes.data_as(ctypes.c_void_p), *_whole(picture.shape[:2])]
