"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import InputError

_UNFINISHED = ".unfinished-"


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a new file beside `file`, which then takes its name: a link of that name leads nowhere any more.

    Raises InputError where it cannot be made, and leaves nothing behind.
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
    """Remove what was left unfinished there when a process was killed."""
    for file in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            file.unlink()
