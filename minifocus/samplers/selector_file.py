"""The file of FocusLLaVA's learned selector, selector.safetensors: its weights, and the options of its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..arguments import shown
from ..errors import CheckpointError, InputError
from .learned_file import Learned, check_tensors, learned, read_learned, write_learned
from .vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler, pools_for


def load_selector(
    file: Path, num_thumbnail_tokens: int, options: dict[str, object]
) -> tuple[LinearSelector, VisionGuidedOptions]:
    """A trained selector and the options that it was trained with; `options` may repeat but not contradict those."""
    metadata, tensors = read_learned(file, "selector")
    try:
        trained: dict[str, object] = {
            "window": int(metadata["window"]),
            "branches": int(metadata["branches"]),
            "score_pool": metadata["score_pool"],
            "score_norm": metadata["score_norm"],
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: metadata: expected window, branches, score_pool and score_norm, got {shown(metadata)}"
        ) from error
    try:
        VisionGuidedOptions(**trained)  # type: ignore[arg-type]
    except InputError as error:
        raise CheckpointError(f"{file}: metadata: {error}") from error
    given = VisionGuidedOptions(**options)  # type: ignore[arg-type]
    for key, value in trained.items():
        if key in options and getattr(given, key) != value:
            raise InputError(f"{key}: the selector in {file} was trained with {value!r}, got {getattr(given, key)!r}")
    full = dataclasses.replace(given, **trained)  # type: ignore[arg-type]
    branches = len(pools_for(full.window, full.branches))
    selector = LinearSelector(num_thumbnail_tokens, branches, full.score_pool, full.score_norm)
    check_tensors(file, tensors, selector.state_dict())
    selector.load_state_dict(tensors)
    return selector, full


def new_selector(num_thumbnail_tokens: int, options: VisionGuidedOptions, bias: float = 1.0) -> LinearSelector:
    """An untrained selector, which leans to the finest scale by `bias`.

    So a model begins by reading everything, and learns what it can leave out.
    """
    branches = len(pools_for(options.window, options.branches))
    selector = LinearSelector(num_thumbnail_tokens, branches, options.score_pool, options.score_norm)
    selector.bias.data[-1] = bias
    return selector


def save_selector(file: Path, selector: LinearSelector, options: VisionGuidedOptions) -> None:
    """Write the file that `load_selector` reads: `weight` [S, G] and `bias` [S], coarse to fine, in float32.

    Equal selectors give equal bytes. Raises InputError for one that `load_selector` would refuse, and OSError.
    """
    write_learned(file, _of_selector(selector, options))


@learned.register
def _of_sampler(sampler: VisionGuidedSampler) -> Learned | None:
    if isinstance(sampler.selector, LinearSelector):
        return _of_selector(sampler.selector, sampler.options)
    if next(sampler.parameters(), None) is None:
        return None
    raise InputError(
        f"before_llm: expected a LinearSelector, or nothing that has parameters, got {type(sampler.selector).__name__}, "
        "for which there is no file: set_sampler('none') saves the model without it"
    )


def _of_selector(selector: LinearSelector, options: VisionGuidedOptions) -> Learned:
    branches = len(pools_for(options.window, options.branches))
    tensors = {name: value.float() for name, value in selector.state_dict().items()}
    if tensors["weight"].shape[0] != branches or tensors["bias"].shape != (branches,):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise InputError(f"selector: expected one of {branches} branches, as its options have, got {shapes}")
    names = ("window", "branches", "score_pool", "score_norm")
    return Learned("selector", {name: str(getattr(options, name)) for name in names}, tensors)
