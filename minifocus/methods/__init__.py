"""The registry of methods: FocusLLaVA's samplers, AVG-LLaVA's, and the field's methods that need no training, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict

from .. import arguments
from ..arguments import shown
from ..avg_llava.router_file import load_router
from ..avg_llava.sampler import AVGLLaVA, RouterOptions, new_router
from ..errors import CheckpointError, InputError
from ..files.reading import FILE, kind, present
from ..loading.config import Config
from ..samplers.hooks import Samplers
from ..samplers.selector_file import load_selector, new_selector
from ..samplers.text_guided import TextGuidedOptions, TextGuidedSampler
from ..samplers.vision_guided import VisionGuidedOptions, VisionGuidedSampler, check_thumbnail, pools_for
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
from .variance_selector import VarianceSelector

_log = logging.getLogger("minifocus")


class SamplerOptions(TypedDict, total=False):
    """The options of all methods, for editors to complete; `options_of` says which of them a method takes."""

    attention: Literal["tokens", "views"]
    axis: Literal["column", "row"]
    begin: int | None
    block: int | None
    blocks: int | None
    branches: int
    crop: Literal["whole", "released"]
    end: int | None
    filtered_text: int
    flip: bool
    gamma: float
    granularities: Sequence[int] | None
    granularity: int | Literal["coarsest", "finest"] | None
    keep: int | None
    layer: int | None
    layers: Sequence[int] | None
    neighbours: int
    per: Literal["picture", "map", "tile"]
    ratio: float | None
    rope: bool
    rounds: int
    router: str | PathLike[str] | None
    score_norm: Literal["none", "layer", "cosine"]
    score_pool: Literal["max", "mean"]
    second: float
    seed: int
    selector: str | PathLike[str] | None
    straight_through: bool
    strategy: Literal["rank", "rows"]
    stride: int
    temperature: float
    text: Literal["instruction", "all", "last", "question", "prompt", "nothing"]
    thumbnail: Literal["keep", "compress", "drop"] | float
    window: int


Given = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method.

    options  the names of its options
    make     its samplers, of given options, a config and a folder
    part     what it learns, the stem of a file's name; the option of that name is another file's path
    begin    its samplers with new weights, of given options, a config and a selector's bias
    learns   whether it does so with given options
    """

    options: frozenset[str]
    make: Callable[[Given, Config, Path], Samplers]
    part: str | None = None
    begin: Callable[[Given, Config, float], Samplers] | None = None
    learns: Callable[[Given], bool] = lambda given: True


def _names(*options: type) -> frozenset[str]:
    return frozenset(field.name for one in options for field in fields(one))


def _training_free(options: type, make: Callable[[Any, Config], Samplers]) -> Method:
    return Method(_names(options), lambda given, config, folder: make(options(**given), config))


def _vision_guided(given: Given, config: Config, folder: Path) -> VisionGuidedSampler:
    options = {key: value for key, value in given.items() if key in _names(VisionGuidedOptions)}
    checked, selector = VisionGuidedOptions(**options), given.get("selector")
    check_thumbnail(checked.thumbnail, config.anyres)
    if isinstance(selector, str) and selector == "variance":
        _log.warning("selector='variance' is a training-free stand-in for FocusLLaVA's learned selector")
        return VisionGuidedSampler(VarianceSelector(len(pools_for(checked.window, checked.branches))), checked)
    hint = "selector='variance' for a training-free stand-in, selector=FILE for a trained one, or use sampler='text' or"
    file = learned_file(
        "selector", selector, folder, "'variance' or a selector's file", f"{hint} 'none', which need none"
    )
    return VisionGuidedSampler(*load_selector(file, config.grid.cells, options))


def _new_vision_guided(given: Given, config: Config, bias: float) -> VisionGuidedSampler:
    if given.get("selector") is not None:
        raise InputError(f"selector: expected none, as a new one begins, got {shown(given['selector'])}")
    options = VisionGuidedOptions(**{key: value for key, value in given.items() if key in _names(VisionGuidedOptions)})
    check_thumbnail(options.thumbnail, config.anyres)
    return VisionGuidedSampler(new_selector(config.grid.cells, options, bias), options)


def _granularity(given: Given, config: Config) -> tuple[RouterOptions, int | None]:
    """The options of AVG-LLaVA's router that were given, and the number of the forced granularity."""
    options = RouterOptions(**{key: value for key, value in given.items() if key in _names(RouterOptions)})
    forced = given.get("granularity")
    if forced is None:
        return options, None
    known = options.of_grid(config)
    if isinstance(forced, str):
        named = arguments.choice("granularity", forced, ("coarsest", "finest"))
        return options, 0 if named == "coarsest" else len(known) - 1
    return options, known.index(arguments.whole_of("granularity", forced, known))


def _avg_llava(given: Given, config: Config, folder: Path) -> AVGLLaVA:
    options, forced = _granularity(given, config)
    if forced is not None:
        if given.get("router") is not None:
            raise InputError(f"router: expected none where the granularity is forced, got {shown(given['router'])}")
        return AVGLLaVA(options, config, None, forced)
    options.of_grid(config)
    hint = "router=FILE for a trained one, granularity=TOKENS to force one, or another sampler"
    file = learned_file("router", given.get("router"), folder, "a router's file", hint)
    router, trained = load_router(file, config, {key: given[key] for key in given if key in _names(RouterOptions)})
    return AVGLLaVA(trained, config, router)


def _new_avg_llava(given: Given, config: Config, bias: float) -> AVGLLaVA:
    if given.get("router") is not None:
        raise InputError(f"router: expected none, as a new one begins, got {shown(given['router'])}")
    options, _ = _granularity(given, config)
    return AVGLLaVA(options, config, new_router(options, config))


def learned_file(part: str, given: object, folder: Path, expected: str, hint: str) -> Path:
    """The file of a learned part: `given`, or the folder's own. Raises InputError and CheckpointError."""
    if given is not None and not (isinstance(given, str | PathLike) and kind(given) == FILE):
        raise InputError(f"{part}: expected {expected}, got {shown(given)}")
    file = Path(given) if given is not None else folder / f"{part}.safetensors"
    if not present(file):
        raise CheckpointError(f"{file}: this folder has no trained {part}. Pass {hint}")
    return file


def _text_guided(given: Given, config: Config) -> TextGuidedSampler:
    options = {key: value for key, value in given.items() if key in _names(TextGuidedOptions)}
    return TextGuidedSampler(TextGuidedOptions(**options), config.text)


_VISION, _TEXT = _names(VisionGuidedOptions) | {"selector"}, _names(TextGuidedOptions)

METHODS: dict[str, Method] = {
    # FocusLLaVA: both samplers, either of them, neither
    "focus": Method(
        _VISION | _TEXT,
        lambda given, config, folder: Samplers(_vision_guided(given, config, folder), _text_guided(given, config)),
        "selector",
        lambda given, config, bias: Samplers(_new_vision_guided(given, config, bias), _text_guided(given, config)),
    ),
    "vision": Method(
        _VISION,
        lambda given, config, folder: Samplers(_vision_guided(given, config, folder)),
        "selector",
        lambda given, config, bias: Samplers(_new_vision_guided(given, config, bias)),
    ),
    "text": Method(_TEXT, lambda given, config, folder: Samplers(None, _text_guided(given, config))),
    "none": Method(frozenset(), lambda given, config, folder: Samplers()),
    # AVG-LLaVA
    "avg-llava": Method(
        _names(RouterOptions) | {"router", "granularity"},
        lambda given, config, folder: Samplers(_avg_llava(given, config, folder)),
        "router",
        lambda given, config, bias: Samplers(_new_avg_llava(given, config, bias)),
        lambda given: given.get("granularity") is None,
    ),
    # The field's, without training
    "avgpool": _training_free(PoolingOptions, lambda options, config: Samplers(Pooling(options, config, "mean"))),
    "maxpool": _training_free(PoolingOptions, lambda options, config: Samplers(Pooling(options, config, "max"))),
    "random": _training_free(RandomOptions, lambda options, config: Samplers(Random(options))),
    "uniform": _training_free(Budget, lambda options, config: Samplers(Uniform(options))),
    "similarity": _training_free(SimilarityOptions, lambda options, config: Samplers(Similarity(options))),
    "fastervlm": _training_free(FasterVLMOptions, lambda options, config: Samplers(FasterVLM(options, config))),
    "vtc-cls": _training_free(VTCCLSOptions, lambda options, config: Samplers(VTCCLS(options, config))),
    "hired": _training_free(HiREDOptions, lambda options, config: Samplers(HiRED(options, config))),
    "globalcom2": _training_free(GlobalCom2Options, lambda options, config: Samplers(GlobalCom2(options, config))),
    "fopru": _training_free(FoPruOptions, lambda options, config: Samplers(FoPru(options, config))),
    "prumerge": _training_free(PruMergeOptions, lambda options, config: Samplers(PruMerge(options, config))),
    "prumerge+": _training_free(
        PruMergeOptions, lambda options, config: Samplers(PruMerge(options, config, plus=True))
    ),
    "fastv": _training_free(FastVOptions, lambda options, config: Samplers(None, FastV(options, config.text))),
    "pyramiddrop": _training_free(
        PyramidDropOptions, lambda options, config: Samplers(None, PyramidDrop(options, config.text))
    ),
    "feather": _training_free(FeatherOptions, lambda options, config: Samplers(None, Feather(options, config.text))),
    "aim": _training_free(
        AIMOptions, lambda options, config: Samplers(Merging(options, config), Dropping(options, config.text))
    ),
}


def names() -> list[str]:
    """The methods that `build` (and so `minifocus.load`) knows."""
    return list(METHODS)


def training_free() -> list[str]:
    """Those of other authors that learn nothing."""
    return [name for name, method in METHODS.items() if method.part is None and name not in ("none", "text")]


def options_of(name: str) -> set[str]:
    """The options that method `name` takes; InputError for an unknown one."""
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"sampler: expected one of {', '.join(names())}, got {shown(name)}")
    return set(METHODS[name].options)


def build(name: str, config: Config, folder: Path, options: Mapping[str, object]) -> Samplers:
    """The samplers of method `name` for a model, with `options` by keyword.

    `selector` is "variance", a file's path, or None for `folder`/selector.safetensors. Raises InputError for an unknown
    name or option or a value out of range, and CheckpointError where a trained selector is wanted and not there.
    """
    return _checked(name, options).make(options, config, folder)


def begin(name: str, config: Config, options: Mapping[str, object], bias: float = 1.0) -> Samplers:
    """The samplers of a method that learns, with new weights. Raises InputError."""
    method = _checked(name, options)
    if method.begin is None or not method.learns(options):
        raise InputError(f"sampler: expected one that learns, got {name!r}")
    return method.begin(options, config, bias)


def learned_part(name: str, options: Mapping[str, object]) -> str | None:
    """What method `name` learns: "selector", "router", the stem of a file's name; None where that is nothing."""
    method = _checked(name, options)
    return method.part if method.learns(options) else None


def new_part(name: str, folder: Path, options: Mapping[str, object], fresh: Collection[str]) -> str | None:
    """What method `name` learns, where it begins anew: the folder has no file of it, or it is one of the `fresh` parts."""
    part = learned_part(name, options)
    return part if part is None or part in fresh or kind(folder / f"{part}.safetensors") != FILE else None


def _checked(name: str, options: Mapping[str, object]) -> Method:
    known = options_of(name)
    for key in options:
        if key not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise InputError(f"{key[:100]}: not an option of sampler {name!r}; its options: {listed}")
    return METHODS[name]
