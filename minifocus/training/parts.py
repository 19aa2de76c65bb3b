"""The parts of a model that can be trained: how to begin one anew, and the learning rate of each."""

from __future__ import annotations

import torch

from ..load import Llava
from ..model import LlavaNetwork
from ..samplers.vision_guided import (
    LinearSelector,
    VisionGuidedOptions,
    VisionGuidedSampler,
    check_thumbnail,
    pools_for,
)

PARTS = ("vision", "projector", "llm", "selector")


def new_selector(model: Llava, options: VisionGuidedOptions, bias: float = 1.0) -> None:
    """Give the model a vision-guided sampler with an untrained selector. Raises InputError.

    The selector leans to the finest scale by `bias`. So it begins by reading everything, and learns what it can leave out.
    """
    check_thumbnail(options.thumbnail, model.config.anyres)
    branches = len(pools_for(options.window, options.branches))
    selector = LinearSelector(model.config.vision.grid**2, branches, options.score_pool)
    with torch.no_grad():
        selector.bias[-1] = bias
    model.before_llm = VisionGuidedSampler(selector, options).to(model.device)


def new_projector(model: LlavaNetwork, seed: int) -> None:
    """Give the projector, and LLaVA-NeXT's newline, new random values."""
    torch.manual_seed(seed)
    for layer in (model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2):
        layer.reset_parameters()
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
