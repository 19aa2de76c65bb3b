"""The package as others import it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import minifocus

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["transformers", "matplotlib", "scipy", "pandas", "torchvision", "torch._dynamo", "sympy"]
PROGRAM = f"""
import sys, torch
before = set(sys.modules)
import minifocus
print([name for name in {[*HEAVY, "tokenizers", "sentencepiece"]} if name in sys.modules and name not in before])
minifocus.load("weights/tiny", "focus").generate("examples/cards.png", "What number is on the red card?")
print([name for name in {HEAVY} if name in sys.modules and name not in before])
"""


def test_imports_are_light() -> None:
    """What torch itself imports is torch's; beyond it, nothing heavy comes with `import minifocus`, or with an answer."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n") == ["[]", "[]", ""], done.stdout


def test_transformers_is_no_run_time_dependency() -> None:
    needed = [r for r in requires("minifocus") or [] if "extra ==" not in r]
    assert needed and not any(r.startswith("transformers") for r in needed)


def test_version() -> None:
    assert minifocus.__version__ == version("minifocus")


def test_public_names_exist() -> None:
    for name in minifocus.__all__:
        assert hasattr(minifocus, name)
