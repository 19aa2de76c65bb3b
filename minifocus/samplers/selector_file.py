"""The file of a learned selector, selector.safetensors: its weights, and the options of its training. It is read strictly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save as serialise

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import open_safetensors
from ..loading.model_folder import SELECTOR
from .hooks import BeforeLLM
from .vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler, pools_for


def load_selector(
    file: Path, num_thumbnail_tokens: int, options: dict[str, object]
) -> tuple[LinearSelector, VisionGuidedOptions]:
    """A trained selector and the options that it was trained with; `options` may repeat but not contradict those."""
    with open_safetensors(file) as stored:
        metadata = stored.metadata() or {}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
    if metadata.get("format") != "minifocus-selector":
        raise CheckpointError(
            f"{file}: metadata: expected format=minifocus-selector, got {shown(metadata.get('format'))}"
        )
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
    expected = {name: tuple(value.shape) for name, value in selector.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise CheckpointError(f"{file}: expected tensors {expected}, found {shown(found)}")
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise CheckpointError(f"{file}: {name}: expected finite floating-point values, got {value.dtype}")
    selector.load_state_dict(tensors)
    return selector, full


def save_selector(file: Path, selector: LinearSelector, options: VisionGuidedOptions) -> None:
    """Write the file that `load_selector` reads: `weight` [S, G] and `bias` [S], coarse to fine, in float32.

    Equal selectors give equal bytes. Raises InputError for one that `load_selector` would refuse, and OSError.
    """
    metadata = {
        "format": "minifocus-selector",
        "window": str(options.window),
        "branches": str(options.branches),
        "score_pool": options.score_pool,
        "score_norm": options.score_norm,
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in selector.state_dict().items()}
    branches = len(pools_for(options.window, options.branches))
    if tensors["weight"].shape[0] != branches or tensors["bias"].shape != (branches,):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise InputError(f"selector: expected one of {branches} branches, as its options have, got {shapes}")
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"selector.{name}: expected finite values, as float32, got others")
    file.write_bytes(_in_order(serialise(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: the library writes metadata in a random one."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:begin]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as the library aligns the values
    return len(header).to_bytes(8, "little") + header + content[begin:]


def save_learned(sampler: BeforeLLM | None, folder: Path) -> bool:
    """Write the learned part of a before-LLM sampler into a folder without a selector; False where nothing is learned.

    Raises InputError for what could not be read again, and OSError.
    """
    if sampler is None or next(sampler.parameters(), None) is None:
        return False
    if not (isinstance(sampler, VisionGuidedSampler) and isinstance(sampler.selector, LinearSelector)):
        learned = sampler.selector if isinstance(sampler, VisionGuidedSampler) else sampler
        raise InputError(
            f"before_llm: expected a LinearSelector, or nothing that has parameters, got {type(learned).__name__}, for "
            "which there is no file: set_sampler('none') saves the model without it"
        )
    save_selector(folder / SELECTOR, sampler.selector, sampler.options)
    return True
