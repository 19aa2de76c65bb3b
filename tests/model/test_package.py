"""The package as others import it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires, version

import minifocus

HEAVY = [
    "transformers",
    "tokenizers",
    "sentencepiece",
    "matplotlib",
    "scipy",
    "pandas",
    "torchvision",
    "torch._dynamo",
    "sympy",
]


def test_import_is_light() -> None:
    """What torch itself imports is torch's; beyond it, nothing heavy comes with `import minifocus`."""
    code = (
        f"import sys, torch; before = set(sys.modules); import minifocus; heavy = {HEAVY!r}; "
        "print([m for m in heavy if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_transformers_is_no_run_time_dependency() -> None:
    needed = [r for r in requires("minifocus") or [] if "extra ==" not in r]
    assert needed and not any(r.startswith("transformers") for r in needed)


def test_version() -> None:
    assert minifocus.__version__ == version("minifocus")


def test_public_names_exist() -> None:
    for name in minifocus.__all__:
        assert hasattr(minifocus, name)
