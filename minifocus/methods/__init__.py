"""Methods that shorten what the language model reads of a picture, by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import FILE, kind, present
from ..loading.config import Config
from ..loading.model_folder import SELECTOR
from ..samplers.hooks import BeforeLLM, InsideLLM, PictureFeatures, Samplers, Selection, VisualTokens, uncompressed
from ..samplers.text_guided import TextGuidedOptions, TextGuidedSampler
from ..samplers.vision_guided import (
    LinearSelector,
    VarianceSelector,
    VisionGuidedOptions,
    VisionGuidedSampler,
    load_selector,
    pools_for,
    save_selector,
)
from .aim import AIMOptions, Dropping, Merging
from .cls_attention import VTCCLS, FasterVLM, FasterVLMOptions, VTCCLSOptions
from .fastv import FastV, FastVOptions
from .feather import Feather, FeatherOptions
from .fopru import FoPru, FoPruOptions
from .globalcom2 import GlobalCom2, GlobalCom2Options
from .hired import HiRED, HiREDOptions
from .pooling import Pooling, PoolingOptions
from .prumerge import PruMerge, PruMergeOptions
from .pruning import Budget
from .pyramiddrop import PyramidDrop, PyramidDropOptions
from .random_uniform import Random, RandomOptions, Uniform
from .similarity import Similarity, SimilarityOptions

__all__ = [
    "BeforeLLM",
    "InsideLLM",
    "PictureFeatures",
    "Samplers",
    "Selection",
    "VisualTokens",
    "build",
    "names",
    "options_of",
    "save",
    "uncompressed",
]

SELECTOR_FILE = SELECTOR
_VISION = {field.name for field in dataclasses.fields(VisionGuidedOptions)} | {"selector"}
_TEXT = {field.name for field in dataclasses.fields(TextGuidedOptions)}
_FOCUS = {"focus": _VISION | _TEXT, "vision": _VISION, "text": _TEXT, "none": set()}

# Training-free methods of the field: options, and the samplers that they make for a model.
_METHODS: dict[str, tuple[type, Callable[[Any, Config], Samplers]]] = {
    "avgpool": (PoolingOptions, lambda options, config: Samplers(Pooling(options, config, "mean"))),
    "maxpool": (PoolingOptions, lambda options, config: Samplers(Pooling(options, config, "max"))),
    "random": (RandomOptions, lambda options, config: Samplers(Random(options))),
    "uniform": (Budget, lambda options, config: Samplers(Uniform(options))),
    "similarity": (SimilarityOptions, lambda options, config: Samplers(Similarity(options))),
    "fastervlm": (FasterVLMOptions, lambda options, config: Samplers(FasterVLM(options, config))),
    "vtc-cls": (VTCCLSOptions, lambda options, config: Samplers(VTCCLS(options, config))),
    "hired": (HiREDOptions, lambda options, config: Samplers(HiRED(options, config))),
    "globalcom2": (GlobalCom2Options, lambda options, config: Samplers(GlobalCom2(options, config))),
    "fopru": (FoPruOptions, lambda options, config: Samplers(FoPru(options, config))),
    "prumerge": (PruMergeOptions, lambda options, config: Samplers(PruMerge(options, config))),
    "prumerge+": (PruMergeOptions, lambda options, config: Samplers(PruMerge(options, config, plus=True))),
    "fastv": (FastVOptions, lambda options, config: Samplers(None, FastV(options, config.text))),
    "pyramiddrop": (PyramidDropOptions, lambda options, config: Samplers(None, PyramidDrop(options, config.text))),
    "feather": (FeatherOptions, lambda options, config: Samplers(None, Feather(options, config.text))),
    "aim": (AIMOptions, lambda options, config: Samplers(Merging(options, config), Dropping(options, config.text))),
}

_log = logging.getLogger("minifocus")


def names() -> list[str]:
    """The methods that `build` (and so `minifocus.load`) knows."""
    return [*_FOCUS, *_METHODS]


def options_of(name: str) -> set[str]:
    """The options that method `name` takes; InputError for an unknown one."""
    if not isinstance(name, str) or name not in names():
        raise InputError(f"sampler: expected one of {', '.join(names())}, got {shown(name)}")
    return _FOCUS[name] if name in _FOCUS else {field.name for field in dataclasses.fields(_METHODS[name][0])}


def build(name: str, config: Config, folder: Path, options: Mapping[str, object]) -> Samplers:
    """The samplers of method `name` for a model, with `options` by keyword.

    `selector` is "variance", a file's path, or None for `folder`/selector.safetensors. Raises InputError for an unknown
    name or option or a value out of range, and CheckpointError where a trained selector is wanted and not there.
    """
    known = options_of(name)
    for key in options:
        if key not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise InputError(f"{key[:100]}: not an option of sampler {name!r}; its options: {listed}")
    if name in _METHODS:
        of_method, make = _METHODS[name]
        return make(of_method(**options), config)
    before = _vision_guided(config, folder, options) if name in ("focus", "vision") else None
    text = {key: value for key, value in options.items() if key in _TEXT}
    inside = TextGuidedSampler(TextGuidedOptions(**text), config.text) if name in ("focus", "text") else None  # type: ignore[arg-type]
    return Samplers(before, inside)


def save(sampler: BeforeLLM | None, folder: Path) -> bool:
    """Write what is learned of a before-LLM sampler into a folder that has no selector; False where nothing is.

    Raises InputError for what `build` could not read again, and OSError.
    """
    if sampler is None or next(sampler.parameters(), None) is None:
        return False
    if not (isinstance(sampler, VisionGuidedSampler) and isinstance(sampler.selector, LinearSelector)):
        learned = sampler.selector if isinstance(sampler, VisionGuidedSampler) else sampler
        raise InputError(
            f"before_llm: expected a LinearSelector, or nothing that has parameters, got {type(learned).__name__}, for "
            "which there is no file: set_sampler('none') saves the model without it"
        )
    save_selector(folder / SELECTOR_FILE, sampler.selector, sampler.options)
    return True


def _vision_guided(config: Config, folder: Path, given: Mapping[str, object]) -> VisionGuidedSampler:
    options = {key: value for key, value in given.items() if key in _VISION and key != "selector"}
    checked = VisionGuidedOptions(**options)  # type: ignore[arg-type]
    selector = given.get("selector")
    if not config.anyres and checked.thumbnail != "keep":
        raise InputError(f"thumbnail: LLaVA-1.5 has no thumbnail to {checked.thumbnail}")
    if isinstance(selector, str) and selector == "variance":
        _log.warning("selector='variance' is a training-free stand-in for FocusLLaVA's learned selector")
        return VisionGuidedSampler(VarianceSelector(len(pools_for(checked.window, checked.branches))), checked)
    if selector is not None and not (isinstance(selector, str | PathLike) and kind(selector) == FILE):
        raise InputError(f"selector: expected 'variance' or a selector's file, got {shown(selector)}")
    file = Path(selector) if selector is not None else folder / SELECTOR_FILE
    if not present(file):
        raise CheckpointError(
            f"{file}: this folder has no trained selector. Pass selector='variance' for a training-free stand-in, "
            "selector=FILE for a trained one, or use sampler='text' or 'none', which need none"
        )
    return VisionGuidedSampler(*load_selector(file, config.vision.grid**2, options))
