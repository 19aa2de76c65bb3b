"""Where the packages are installed that hold the fonts and photographs of scenes."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import InputError


@cache
def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported. Raises InputError where there is none."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"{package}, which has fonts or photographs of scenes, is not installed: pip install 'minifocus[cards]'"
        )
    return Path(next(iter(found.submodule_search_locations)))
