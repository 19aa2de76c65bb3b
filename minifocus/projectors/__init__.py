"""Projectors by name, as config.json's `projector` has it. A further one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..arguments import choice
from ..errors import InputError
from .base import Ends, Grid, Projector, ProjectorOptions
from .mlp import MLPOptions
from .stf import STFOptions
from .tokenpacker import TokenPackerOptions

PROJECTORS: dict[str, type[ProjectorOptions]] = {
    "mlp": MLPOptions,
    "stf": STFOptions,
    "tokenpacker": TokenPackerOptions,
}

__all__ = ["PROJECTORS", "Ends", "Grid", "MLPOptions", "Projector", "ProjectorOptions", "describe", "options_of"]


def options_of(given: Mapping[str, Any]) -> ProjectorOptions:
    """The options that {"name": …, option: value …} stands for. Raises InputError for a bad name, option or value."""
    name = choice("name", given.get("name"), tuple(PROJECTORS))
    kind = PROJECTORS[name]
    known = {field.name for field in fields(kind)}
    for key in given:
        if key != "name" and key not in known:
            raise InputError(
                f"{key[:100]}: not an option of projector {name!r}; its options: {', '.join(sorted(known))}"
            )
    return kind(**{key: value for key, value in given.items() if key != "name"})


def describe(options: ProjectorOptions) -> dict[str, Any]:
    """The opposite of `options_of`."""
    name = next(name for name, kind in PROJECTORS.items() if type(options) is kind)
    return {"name": name, **asdict(options)}
