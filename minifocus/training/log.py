"""The log of a run, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..arguments import LARGEST, shown
from ..errors import InputError
from ..files.reading import present, regular
from ..files.writing import replace

LOG = "log.jsonl"


class Log:
    """The first process writes it. A resumed run drops the lines of the steps that it repeats.

    It always begins a new file: the old name may be a link to a file elsewhere. Raises InputError where the file cannot be
    written.
    """

    def __init__(self, file: Path, first_step: int):
        self.file = file
        kept = [line for line in read_log(file) if line["step"] <= first_step]

        def write(unfinished: Path) -> None:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

        replace(file, write)

    def write(self, **values: Any) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written: {error.strerror}") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log, but for a last one that was cut off. Raises InputError where a line is not of a run."""
    lines: list[dict[str, Any]] = []
    if not present(file):
        return lines
    cut_off = 0
    try:
        with regular(file, InputError).open("rb") as stream:
            for place, text in enumerate(stream, 1):
                if cut_off:
                    raise InputError(f"{file}: line {cut_off}: expected an object with a step, got what is not JSON")
                try:
                    line = json.loads(text.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise InputError(f"{file}: line {place}: expected text in UTF-8, got {shown(text)}") from error
                except RecursionError as error:
                    raise InputError(f"{file}: line {place}: nested too deeply") from error
                except ValueError:
                    cut_off = place
                    continue
                step = line.get("step") if isinstance(line, dict) else None
                if not isinstance(step, int) or not 0 <= step <= LARGEST:
                    raise InputError(f"{file}: line {place}: expected an object with a step, got {shown(line)}")
                lines.append(line)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    return lines
