"""How a model wants its pictures, as lines of an exported package's manifest: csrc/runtime/pictures/settings.cpp reads them."""

from __future__ import annotations

from collections.abc import Sequence

from ..inputs.image_processor import ImageProcessor
from ..loading.config import Config


def picture_settings(processor: ImageProcessor, config: Config) -> dict[str, list[object]]:
    """Key → values of the manifest's `picture.` lines: whole numbers and words.

    A float is a word, too: its repr, of which the very same number is read.
    """
    size = processor.size if isinstance(processor.size, tuple) else (processor.size,)
    return {
        "picture.anyres": [_flag(processor.anyres)],
        "picture.image_size": [processor.image_size],
        "picture.size": list(size),
        "picture.mean": _floats(processor.mean),
        "picture.std": _floats(processor.std),
        "picture.rescale_factor": _floats([processor.rescale_factor]),
        "picture.resample": [int(processor.resample)],
        "picture.pad": [_flag(processor.pad)],
        "picture.pinpoints": [edge for pinpoint in processor.grid_pinpoints for edge in pinpoint],
        "picture.grid": list(config.grid),
    }


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _floats(values: Sequence[float]) -> list[object]:
    return [repr(float(value)) for value in values]
