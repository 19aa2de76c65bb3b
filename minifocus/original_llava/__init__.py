"""Folders as the original LLaVA repositories write them, turned into folders that `minifocus.load` takes."""

from .convert import convert
from .template import NAMES as TEMPLATES

__all__ = ["TEMPLATES", "convert"]
