"""Everything is in pyproject.toml; the C++ and CUDA operators of csrc/ will be built from here."""

from setuptools import setup

setup()
