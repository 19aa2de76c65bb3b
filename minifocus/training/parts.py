"""The parts of a model that can be trained: a model loaded with some of them new, and the learning rate of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files.reading import FILE, kind
from ..load import Llava, load
from ..loading.model_folder import SELECTOR
from ..model import LlavaNetwork
from ..samplers.vision_guided import (
    LinearSelector,
    VisionGuidedOptions,
    VisionGuidedSampler,
    check_thumbnail,
    pools_for,
)
from .new_projector import NewProjector, replace_projector

PARTS = ("vision", "projector", "llm", "selector")
LEARNED = ("focus", "vision")  # samplers that decide by a selector


def begins_selector(folder: str | PathLike[str], sampler: str, fresh: Collection[str] = ()) -> bool:
    """Whether a model of this folder is trained with a new selector: the folder has none, or it is one of the `fresh` parts."""
    return sampler in LEARNED and ("selector" in fresh or kind(Path(folder) / SELECTOR) != FILE)


def load_to_train(
    folder: str | PathLike[str],
    sampler: str,
    device: torch.device,
    options: Mapping[str, Any],
    fresh: Collection[str] = (),
    selector_bias: float = 1.0,
    seed: int = 0,
    projector: NewProjector | None = None,
) -> Llava:
    """Load a model in float32, with the sampler that it is to be trained behind and that sampler's `options`.

    fresh          parts that begin anew: "projector", whose values follow from `seed`, and "selector"
    selector_bias  how far a new selector leans to the finest scale (see `new_selector`)
    projector      one that takes the place of the model's own; a new selector is then for its grid

    Raises CheckpointError for a bad folder and InputError for a bad option.
    """
    if begins_selector(folder, sampler, fresh):
        known = {field.name for field in fields(VisionGuidedOptions)}
        of_text = {name: value for name, value in options.items() if name not in known}
        # Loading refuses an option that neither sampler has.
        model = _load(folder, "text" if sampler == "focus" else "none", device, of_text, projector, seed)
        of_vision = {name: value for name, value in options.items() if name in known}
        new_selector(model, VisionGuidedOptions(**of_vision), selector_bias)
    else:
        model = _load(folder, sampler, device, options, projector, seed)
    if "projector" in fresh:
        new_projector(model, seed)
    return model


def _load(
    folder: str | PathLike[str],
    sampler: str,
    device: torch.device,
    options: Mapping[str, Any],
    projector: NewProjector | None,
    seed: int,
) -> Llava:
    if projector is None:
        return load(folder, sampler, device, "float32", **options)
    model = load(folder, "none", device, "float32")
    before = model.config.grid.cells
    replace_projector(model, projector, seed)
    after = model.config.grid.cells
    if sampler in LEARNED and after != before and "selector" not in options:
        raise InputError(
            f"projector: the selector compares with {before} tokens of a thumbnail, and there are {after} now: expected a new "
            "selector, such as --fresh selector makes"
        )
    model.set_sampler(sampler, **options)
    return model


def new_selector(model: Llava, options: VisionGuidedOptions, bias: float = 1.0) -> None:
    """Give the model a vision-guided sampler with an untrained selector. Raises InputError.

    The selector leans to the finest scale by `bias`. So it begins by reading everything, and learns what it can leave out.
    """
    check_thumbnail(options.thumbnail, model.config.anyres)
    branches = len(pools_for(options.window, options.branches))
    selector = LinearSelector(model.config.grid.cells, branches, options.score_pool, options.score_norm)
    with torch.no_grad():
        selector.bias[-1] = bias
    model.before_llm = VisionGuidedSampler(selector, options).to(model.device)


def new_projector(model: LlavaNetwork, seed: int) -> None:
    """Give the projector, and LLaVA-NeXT's newline, new random values."""
    torch.manual_seed(seed)
    model.multi_modal_projector.reset_parameters()
    if model.config.anyres:
        torch.nn.init.normal_(model.image_newline, std=model.config.text.hidden_size**-0.5)


def learning_rate(name: str, rates: dict[str, float], model: LlavaNetwork) -> float:
    """The learning rate of the parameter `name`. It is 0 where no loss reaches: behind the layers whose features are read."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        block = name.removeprefix("vision_tower.encoder.layers.").split(".")[0]
        unused = "post_layernorm" in name or (block.isdigit() and int(block) >= max(model.config.feature_layers))
        return 0.0 if unused else rates["vision"]
    if name.startswith("before_llm."):
        return rates["selector_bias" if name.endswith(".bias") else "selector"]
    return rates["llm" if name.startswith("language_model.") else "projector"]
