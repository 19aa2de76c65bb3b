"""A file of answers, written by one process or by several: a line for each question, in the questions' order.

While it is made, the answers lie in the folder OUT.run, in a file of each process, one line an answer. A process that is killed
leaves its lines there; the next run takes them, but for a last one that was cut off. In the end the first process writes OUT as a
whole. OUT.run/run.json stays and says what the answers were made with.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .arguments import shown
from .distributed.processes import Process
from .errors import CheckpointError, InputError
from .files.reading import FILE, NOTHING, kind, named, opened, present, read_json
from .files.writing import clear, replace
from .training.checkpoint import same_run

_RUN, _PART, _NUMBER = "run.json", "part-{}.jsonl", "number"
_ADVICE = "name another file or delete this one"


class AnswerFile:
    """The answers to `count` questions, by the questions' numbers.

    An answer is a JSON object. One with a key "error" in the place of "answer" is none yet: the next run asks again.
    """

    def __init__(self, file: Path, count: int, process: Process):
        self.file, self.count, self.process = file, count, process
        self.folder = file.with_name(f"{file.name}.run")
        self.part = self.folder / _PART.format(uuid.uuid4().hex[:8])
        self.lines: dict[int, dict[str, Any]] = {}

    @contextmanager
    def written_by(self, identity: dict[str, Any]) -> Iterator[None]:
        """Within it, no other run writes the file, and `lines` has what was written before.

        identity  what the answers are made with. All processes have to give the same.

        Raises InputError, in all processes, for a file that was made with something else or is none of answers.
        """
        if kind(self.file) not in (FILE, NOTHING):
            raise InputError(f"{named(self.file)}: expected a file or nothing, found {kind(self.file)}")
        for rank, other in enumerate(self.process.gather(identity)):
            if other != identity:
                raise InputError(
                    f"process {rank} was given something else than process {self.process.rank}: {shown(other)}, and not "
                    f"{shown(identity)}"
                )
        with self.process.alone(self.folder):
            self.process.first(lambda: self._begin(identity))
            self.lines = self._read(self._parts())
            self.process.gather(None)  # nobody writes before all have read
            yield

    def _begin(self, identity: dict[str, Any]) -> None:
        run = self.folder / _RUN
        clear(self.folder)
        if present(run):
            try:
                there = read_json(run)
            except CheckpointError as error:
                raise InputError(f"{named(run)}: says nothing of a run: {error}") from error
            same_run(run, there, json.loads(json.dumps(identity)), _ADVICE)
        elif present(self.file):
            raise InputError(
                f"{named(self.file)}: is there already, without {run.name} that says what made it: {_ADVICE}"
            )
        else:
            text = json.dumps(identity, indent=1, ensure_ascii=False) + "\n"
            replace(run, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    def _read(self, parts: Iterable[Path]) -> dict[int, dict[str, Any]]:
        lines: dict[int, dict[str, Any]] = {}
        if present(self.file):
            found = list(_lines(self.file, cut_off=False))
            if len(found) != self.count:
                raise InputError(f"{named(self.file)}: expected {self.count} lines, got {len(found)}: {_ADVICE}")
            lines = {number: line for number, (_, line) in enumerate(found)}
        for part in sorted(parts):
            for place, line in _lines(part, cut_off=True):
                number = line.pop(_NUMBER, None)
                if type(number) is not int or not 0 <= number < self.count:
                    raise InputError(
                        f"{named(part)}: line {place}: expected the number of one of {self.count} questions, got {shown(number)}"
                    )
                if number not in lines or "error" in lines[number]:
                    lines[number] = line
        return lines

    def unanswered(self) -> list[int]:
        return [number for number in range(self.count) if "answer" not in self.lines.get(number, ())]

    def write(self, numbers: Sequence[int], lines: Sequence[dict[str, Any]]) -> None:
        """Add answers of this process, to be found by the next run however this one ends. Raises InputError."""
        numbered = [{_NUMBER: number, **line} for number, line in zip(numbers, lines, strict=True)]
        try:
            with self.part.open("ab") as stream:
                stream.write("".join(map(_line, numbered)).encode())
        except OSError as error:
            raise InputError(f"{named(self.part)}: cannot be written: {error.strerror}") from error

    def finish(self) -> None:
        """Write the file, when every question has a line, by all processes together. The first one's `lines` are then whole."""
        own = self.process.gather(self.part.name if present(self.part) else None)
        # By name: a folder's content may be an older one on a disk that is shared.
        parts = self._parts() | {self.folder / name for name in own if name is not None}
        self.process.first(lambda: self._finish(parts))

    def _finish(self, parts: set[Path]) -> None:
        self.lines = self._read(parts)
        missing = self.count - len(self.lines)
        if missing:
            raise InputError(f"{named(self.folder)}: expected {self.count} answers, got {missing} less: run it again")
        text = "".join(_line(self.lines[number]) for number in range(self.count))
        replace(self.file, lambda unfinished: unfinished.write_bytes(text.encode()))
        for part in parts:
            with suppress(OSError):
                part.unlink()

    def _parts(self) -> set[Path]:
        return set(self.folder.glob(_PART.format("*")))


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _lines(file: Path, cut_off: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """A file's lines and their places, from 1. `cut_off`: a last one without its end is left out. Raises InputError."""
    with opened(file, InputError) as stream:
        for place, text in enumerate(stream, 1):
            if cut_off and not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{named(file)}: line {place}: not readable as JSON: {error}") from error
            if not isinstance(line, dict) or ("answer" in line) == ("error" in line):
                raise InputError(f"{named(file)}: line {place}: expected an answer or an error, got {shown(line)}")
            yield place, line
