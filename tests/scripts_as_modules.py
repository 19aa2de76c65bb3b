"""The scripts of examples/, benchmarks/ and the like as modules, for tests that call their functions."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def on_the_path(folders: list[str]) -> Iterator[None]:
    """The folders have names that packages have too: they are on the path, and their modules known, only meanwhile.

    What they import from elsewhere stays: a second copy of a package would have other classes of the same names.
    """
    places = [str(ROOT / folder) for folder in folders]
    with mock.patch.object(sys, "path", [*places, *sys.path]):
        before = dict(sys.modules)
        yield
        for name, module in list(sys.modules.items()):
            if name not in before and str(Path(getattr(module, "__file__", None) or "/").parent) in places:
                del sys.modules[name]


def example(name: str) -> ModuleType:
    """examples/NAME.py"""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with on_the_path(["examples"]):
        spec.loader.exec_module(module)
    return module


def scripts(folders: str, names: str) -> list[ModuleType]:
    """Modules of some folders, which know one another."""
    with on_the_path([*folders.split(), "examples"]):
        return [importlib.import_module(name) for name in names.split()]
