"""Reading a JSON object key by key. Every error names the file, the key, what was expected and what is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import Failure, named, present, read_json

# The largest size that a file may give, and the largest product of some sizes: the product of two such, in bytes, stays
# within 64 bits.
LARGEST_SIZE = 2**26


class JsonFields:
    """A JSON object and where it stands.

    members  its keys and values, as `json` reads them
    where    what an error begins with: the file's name, or a record's place in it
    path     the keys that lead from there to this object, each followed by a dot
    failure  the class of the errors
    """

    def __init__(self, members: dict[str, Any], where: str, path: str = "", failure: Failure = CheckpointError):
        self.members, self.where, self.path, self.failure = members, where, path, failure

    @classmethod
    def of_file(cls, file: Path, default: dict[str, Any] | None = None) -> JsonFields:
        """The object in a file of a model's folder. With a `default`, the file may be absent."""
        return cls(read_json(file) if default is None or present(file) else default, named(file))

    def __contains__(self, key: str) -> bool:
        return key in self.members

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, unchecked."""
        return self.members.get(key, default)

    def given(self, key: str) -> bool:
        """Whether the key is there and is not null."""
        return self.members.get(key) is not None

    def error(self, key: str, expected: str, got: str | None = None) -> CheckpointError | InputError:
        """The error to raise for a key. `got` replaces the key's value in the text."""
        if got is None:
            got = shown(self.members[key]) if key in self.members else "no such key"
        return self.failure(f"{self.where}: {self.path}{key}: expected {expected}, got {got}")

    def check(self, key: str, valid: bool, expected: str) -> None:
        """Raise the key's error unless `valid`."""
        if not valid:
            raise self.error(key, expected)

    def section(self, key: str) -> JsonFields:
        """The object under a key. An absent or null one has no members."""
        value = self.members.get(key)
        self.check(key, value is None or isinstance(value, dict), "an object")
        return JsonFields(value or {}, self.where, f"{self.path}{key}.", self.failure)

    def integer(self, key: str, default: int | None, minimum: int = 1) -> int:
        """A whole number from `minimum` to LARGEST_SIZE. With the default None, the key has to be there."""
        value = self.members.get(key, default)
        if type(value) is not int or not minimum <= value <= LARGEST_SIZE:
            raise self.error(key, f"a whole number from {minimum} to {LARGEST_SIZE}")
        return value

    def number(self, key: str, default: float | None) -> float:
        """A positive number. With the default None, the key has to be there."""
        value: Any = self.members.get(key, default)
        if not _finite(value) or value <= 0:
            raise self.error(key, "a positive number")
        return float(value)

    def three_numbers(self, key: str, default: Sequence[float]) -> tuple[float, float, float]:
        """Three finite numbers, or one that stands for all three."""
        value = self.members.get(key, default)
        values = value if isinstance(value, list | tuple) else [value] * 3
        self.check(key, len(values) == 3 and all(map(_finite, values)), "a number or three")
        return float(values[0]), float(values[1]), float(values[2])

    def boolean(self, key: str, default: bool) -> bool:
        value = self.members.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of some names."""
        value = self.members.get(key, default)
        self.check(key, value in allowed, "one of " + ", ".join(allowed))
        return value


def _finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold. NaN is not, and neither are very large whole numbers."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
