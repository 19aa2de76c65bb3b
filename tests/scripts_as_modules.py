"""The scripts of examples/, benchmarks/ and the like as modules, for tests that call their functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


def example(name: str) -> ModuleType:
    """examples/NAME.py. Its folder is on the path only meanwhile, and what it imports from there known only to it: the
    folder has names that packages have too."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]), mock.patch.dict(sys.modules):
        spec.loader.exec_module(module)
    return module


def scripts(folders: str, names: str) -> list[ModuleType]:
    """Modules of some folders, which know one another; likewise on the path only meanwhile."""
    path = [str(ROOT / folder) for folder in folders.split()]
    with mock.patch.object(sys, "path", [*path, *sys.path]), mock.patch.dict(sys.modules):
        return [importlib.import_module(name) for name in names.split()]
