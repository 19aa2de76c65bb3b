"""A model's projector is replaced: by another of the registry, which reads other hidden states of the tower if so asked.

A new projector's tokens are small beside those of a trained one: in the miniature their deviation is 0.09 where the decoder
is used to 3.6. Nothing makes up for that but the start as pooling, or training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .. import arguments
from ..errors import InputError
from ..loading.json_fields import LARGEST_SIZE
from ..model import LlavaNetwork
from ..projectors import MLPOptions, options_of


@dataclass(frozen=True)
class NewProjector:
    """
    described  {"name": …, option: value …}, as config.json's `projector` has it
    layers     the hidden states that it reads, as config.json's `vision_feature_layer` has them; None: those of before
    start      "random", or "pooling": its tokens are at first the means of those that the old one makes of a window's patches
               (`Projector.begin_as_pooling`)
    """

    described: Mapping[str, Any]
    layers: tuple[int, ...] | None = None
    start: Literal["random", "pooling"] = "random"


def replace_projector(model: LlavaNetwork, new: NewProjector, seed: int) -> None:
    """Give the model the projector `new`, whose random values follow from `seed`. LLaVA-NeXT's newline stays.

    `model.config` says so from then on, and with it the layout. A sampler that was made for the old grid or the old states
    has to be made anew. Raises InputError, and then the model is as it was.
    """
    options = options_of(new.described)
    layers = model.config.feature_layers if new.layers is None else _checked(new.layers, model)
    config = replace(model.config, projector=options, feature_layers=layers)
    options.grid(config.ends)
    if config.keep_cls and not isinstance(options, MLPOptions):
        raise InputError("projector: expected a model without a CLS token, for which this one has no place")
    torch.manual_seed(seed)
    projector = options.build(config.ends).to(model.device, model.dtype)
    if new.start == "pooling":
        before = model.config.feature_layers
        if not set(before) <= set(layers):
            wanted = ", ".join(map(str, before))
            raise InputError(
                f"vision_layers: expected {wanted} among them, which the old projector reads, got {layers}"
            )
        projector.begin_as_pooling(model.multi_modal_projector, [layers.index(layer) for layer in before])
    model.config, model.multi_modal_projector = config, projector
    model.vision_tower.feature_layers = layers


def _checked(layers: tuple[int, ...], model: LlavaNetwork) -> tuple[int, ...]:
    vision = model.config.vision
    states = vision.num_hidden_layers + 1
    given = arguments.whole_numbers("vision_layers", layers, -states, states - 1)
    if not given or len(given) * vision.hidden_size > LARGEST_SIZE:
        raise InputError(f"vision_layers: expected 1 to {LARGEST_SIZE // vision.hidden_size}, got {len(given)}")
    return tuple(layer % states for layer in given)
