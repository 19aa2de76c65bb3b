"""Lets pip build the operators of csrc/; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from csrc import build as operators  # noqa: E402


class BuildOperators(build_ext):
    """csrc/build.py in the place of setuptools' own compiling."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib)
        (package / operators.PACKAGE).mkdir(parents=True, exist_ok=True)
        operators.build(package / operators.PACKAGE)


# For setuptools an extension only marks the wheel as compiled and lists what a source distribution needs.
csrc = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "csrc").rglob("*"))
    if path.is_file() and path.suffix != ".pyc"
]

setup(
    cmdclass={"build_ext": BuildOperators},
    ext_modules=[
        Extension(f"minifocus.ops._{half}", csrc, py_limited_api=True, optional=True) for half in operators.HALVES
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    # pip installs this into the isolated environment that it builds in, and only if no torch with headers is at hand.
    setup_requires=["torch==2.13.0"] if operators.needs_torch() else [],
)
