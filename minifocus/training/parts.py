"""The parts of a model that can be trained: a model loaded with some of them new, and the learning rate of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

import torch

from ..errors import CheckpointError, InputError
from ..load import Llava, load
from ..model import LlavaNetwork
from .new_projector import NewProjector, replace_projector

PARTS = ("vision", "projector", "llm", "selector", "router")  # the last two are what samplers learn
FRESH = ("projector", "selector", "router")  # those that can begin anew


def load_to_train(
    folder: str | PathLike[str],
    sampler: str,
    device: torch.device,
    options: Mapping[str, Any],
    fresh: Collection[str] = (),
    new_sampler: bool = False,
    selector_bias: float = 1.0,
    seed: int = 0,
    projector: NewProjector | None = None,
    dtype: torch.dtype = torch.float32,
) -> Llava:
    """Load a model with the sampler that it is to be trained behind and that sampler's `options`.

    fresh          parts of the model itself that begin anew: "projector". Random values follow from `seed`
    new_sampler    whether what the sampler learns begins anew
    selector_bias  how far a new selector leans to the finest scale (see `selector_file.new_selector`)
    projector      one that takes the place of the model's own; a new sampler is then for its grid
    dtype          of the weights; what a sampler has learned is float32

    Raises CheckpointError for a bad folder and InputError for a bad option.
    """
    if projector is None and not new_sampler:
        model = load(folder, sampler, device, dtype, **options)
    else:
        model = load(folder, "none", device, dtype)
        if projector is not None:
            replace_projector(model, projector, seed)
        if new_sampler:
            torch.manual_seed(seed)
            model.begin_sampler(sampler, selector_bias, **options)
        else:
            try:
                model.set_sampler(sampler, **options)
            except CheckpointError as error:
                raise InputError(
                    f"projector: what sampler {sampler!r} has learned is of another grid: expected it to begin anew, such as "
                    f"--fresh makes it: {error}"
                ) from error
    if model.before_llm is not None:
        model.before_llm.float()  # what it has learned may be stored in another dtype
    if "projector" in fresh:
        new_projector(model, seed)
    return model


def new_projector(model: LlavaNetwork, seed: int) -> None:
    """Give the projector, and LLaVA-NeXT's newline, new random values."""
    torch.manual_seed(seed)
    model.multi_modal_projector.reset_parameters()
    if model.config.anyres:
        torch.nn.init.normal_(model.image_newline, std=model.config.text.hidden_size**-0.5)


def learning_rate(name: str, rates: dict[str, float], model: LlavaNetwork) -> float:
    """The learning rate of the parameter `name`. It is 0 where no loss reaches: behind the layers whose features are read.

    `rates` has one for each of PARTS, and may have one for LoRA's products, "lora", and for LLaVA-NeXT's newline, "newline".
    """
    name = name.removeprefix("model.")
    if ".lora_" in name:
        return rates["lora"]
    if name == "image_newline" and "newline" in rates:
        return rates["newline"]
    if name.startswith("vision_tower."):
        block = name.removeprefix("vision_tower.encoder.layers.").split(".")[0]
        unused = "post_layernorm" in name or (block.isdigit() and int(block) >= max(model.config.feature_layers))
        return 0.0 if unused else rates["vision"]
    if name.startswith("before_llm."):
        part = name.split(".")[1]
        return rates[f"{part}_bias" if name.endswith(".bias") and f"{part}_bias" in rates else part]
    return rates["llm" if name.startswith("language_model.") else "projector"]
