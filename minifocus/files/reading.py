"""Opening files: only regular files, or links to them.

Reading a FIFO could wait for ever, and reading a device need not end. Code that has a library open a file by its path asks
`regular` first. A file that is there but cannot be read is an error; it is never treated as absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from ..arguments import brief
from ..errors import CheckpointError, InputError

FILE, FOLDER, NOTHING = "a file", "a folder", "nothing"
_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: FOLDER,
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# The largest tokenizer file, and the largest other JSON file, in bytes: ten times what any known one has. Of JSON, Python
# makes objects that take twenty times the file's size.
_LONGEST_TEXT, _LONGEST_JSON = 2**28, 2**25

Failure = type[CheckpointError] | type[InputError]


def kind(path: str | os.PathLike[str]) -> str:
    """What is at a path, links followed: FILE, FOLDER, NOTHING, or words for anything else. Raises nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(Path(path).stat().st_mode), "something that is not a file")
    except (FileNotFoundError, NotADirectoryError):
        return "a link that leads nowhere" if Path(path).is_symlink() else NOTHING
    except OSError as error:
        return f"a name that cannot be used ({error.strerror})"
    except (TypeError, ValueError) as error:  # bytes from __fspath__, a NUL, a character that no name has
        return f"a name that cannot be used ({error})"


def present(path: str | os.PathLike[str]) -> bool:
    """Whether anything at all is at a path."""
    return kind(path) != NOTHING


def regular(path: str | os.PathLike[str], failure: Failure = CheckpointError) -> Path:
    """`path`, if a regular file is there. Otherwise raises `failure`, which says what is there."""
    found = kind(path)
    if found == NOTHING:
        raise failure(f"{named(path)}: there is no such file")
    if found != FILE:
        raise failure(f"{named(path)}: expected a file, found {found}")
    return Path(path)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], failure: Failure = CheckpointError) -> Iterator[BinaryIO]:
    """A regular file, opened for reading as bytes."""
    file = regular(path, failure)
    try:
        # Opened so that a FIFO which has just taken the file's place is not waited for; its kind is then checked once more.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise failure(f"{named(path)}: cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise failure(f"{named(path)}: expected a file, found {kind(file)}")
        yield stream


def read_bytes(path: str | os.PathLike[str], failure: Failure = CheckpointError, most: int = _LONGEST_TEXT) -> bytes:
    """The content of a regular file of at most `most` bytes."""
    with opened(path, failure) as stream:
        try:
            content = stream.read(most + 1)
        except OSError as error:
            raise failure(f"{named(path)}: cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise failure(f"{named(path)}: expected at most {most} bytes, found more")
    return content


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file of a model's folder. Raises CheckpointError, which names the file."""
    try:
        fields = json.loads(read_bytes(path, most=_LONGEST_JSON).decode("utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{named(path)}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{named(path)}: expected a JSON object, got {type(fields).__name__}")
    return fields


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A safetensors file, opened by the library's `safe_open`. Its errors are raised as CheckpointError."""
    file = regular(path)
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{named(path)}: not readable as safetensors: {brief(str(error))}") from error


def named(path: str | bytes | os.PathLike[str]) -> str:
    """A path as an error message names it. Of a very long one, only the beginning and the end."""
    return brief(os.fsdecode(path).encode(errors="backslashreplace").decode())
