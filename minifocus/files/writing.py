"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import InputError

_UNFINISHED = ".unfinished-"


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a new file beside `file`, then give it that name. A link of that name is replaced, not followed.

    Raises InputError where the file cannot be written, and leaves nothing behind.
    """
    unfinished = file.with_name(_UNFINISHED + uuid.uuid4().hex[:8])
    try:
        try:
            unfinished.open("xb").close()
            write(unfinished)
            unfinished.replace(file)
        finally:
            with suppress(OSError):
                unfinished.unlink()
    except OSError as error:
        raise InputError(f"{os.fsdecode(file)}: cannot be written: {error.strerror or error}") from error


def clear(folder: Path) -> None:
    """Remove the unfinished files that a killed process left in `folder`."""
    for file in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            file.unlink()
