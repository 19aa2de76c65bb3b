"""The C++ runtime from Python, by ctypes and its C functions: how tests and the record ask it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

ON_TEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    counts: tuple[int, int, int]
    equivalent: float
    layer_tokens: list[int]
    finish: str
    pieces: list[str]
    seconds: tuple[float, float]


class Failed(Exception):
    """What minifocus_error says."""


class Model:
    """A package, opened."""

    def __init__(self, library: Path, package: Path, workers: int = 1, check_weights: bool = False):
        self.c = c = ctypes.CDLL(str(library))
        pointers = ["open", "request_new", "ask_encoded", "ask_rgb", "ask_text", "answer_tokens", "answer_layer_tokens"]
        for name in pointers:
            getattr(c, f"minifocus_{name}").restype = ctypes.c_void_p
        for name in ("error", "answer_text", "answer_finish"):
            getattr(c, f"minifocus_{name}").restype = ctypes.c_char_p
        opened = c.minifocus_open(str(package).encode(), workers, int(check_weights))
        self.model = ctypes.c_void_p(opened or self.fail())

    def __del__(self) -> None:
        if hasattr(self, "model"):
            self.c.minifocus_close(self.model)

    def fail(self) -> int:
        raise Failed(self.c.minifocus_error().decode())

    def ask(
        self,
        picture: bytes | Image.Image | None,
        question: str,
        keep_on: Callable[[str], bool] = bool,
        **options: object,
    ) -> Answer:
        """Pixels of a Pillow image are handed over with a stride of their own. `keep_on` is told each piece of text."""
        c, pieces = self.c, list[str]()

        def on_text(text: bytes, context: object) -> int:
            pieces.append(text.decode())
            return keep_on(pieces[-1])

        called = ON_TEXT(on_text)
        request = ctypes.c_void_p(c.minifocus_request_new(question.encode("utf-8", "surrogateescape")))
        try:
            c.minifocus_request_on_text(request, called, None)
            for name, value in options.items():
                c.minifocus_request_set(request, name.encode(), str(value).encode()) or self.fail()
            if picture is None:
                got = c.minifocus_ask_text(self.model, request)
            elif isinstance(picture, bytes):
                got = c.minifocus_ask_encoded(self.model, picture, ctypes.c_size_t(len(picture)), request)
            else:
                stride = 3 * picture.width + 5
                rows = [picture.tobytes()[3 * picture.width * y :][: 3 * picture.width] for y in range(picture.height)]
                sizes = map(ctypes.c_int64, (picture.height, picture.width, stride))
                got = c.minifocus_ask_rgb(self.model, b"".join(row + b"-----" for row in rows), *sizes, request)
            return self._read(ctypes.c_void_p(got or self.fail()), pieces)
        finally:
            c.minifocus_request_free(request)

    def _read(self, answer: ctypes.c_void_p, pieces: list[str]) -> Answer:
        c = self.c

        def numbers(name: str) -> list[int]:
            count = ctypes.c_size_t()
            first = getattr(c, f"minifocus_answer_{name}")(answer, ctypes.byref(count))
            return list((ctypes.c_int64 * count.value).from_address(first)) if count.value else []

        counts, equivalent = (ctypes.c_int64 * 3)(), ctypes.c_double()
        c.minifocus_answer_counts(answer, counts, ctypes.byref(equivalent))
        prefill, decode = ctypes.c_double(), ctypes.c_double()
        c.minifocus_answer_seconds(answer, ctypes.byref(prefill), ctypes.byref(decode))
        try:
            return Answer(
                c.minifocus_answer_text(answer).decode(),
                numbers("tokens"),
                tuple(counts),
                equivalent.value,
                numbers("layer_tokens"),
                c.minifocus_answer_finish(answer).decode(),
                pieces,
                (prefill.value, decode.value),
            )
        finally:
            c.minifocus_answer_free(answer)
