"""What a selector would be given: statistics of pool(X_i)·X_gᵀ / √C (§3.2) on real features and on the miniature's.

A selector's logits are W times these numbers, one for each token of the thumbnail. What they have in common over a picture's
regions moves the logits of all regions together, whatever W learns from one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from PIL import Image

import minifocus
from minifocus.inputs.anyres import stitch
from minifocus.ops.reference import split_regions
from minifocus.samplers.vision_guided import LinearSelector, pool_regions

WINDOW = 4
NORMS = ("none", "cosine", "layer")


def maps_of(model: minifocus.Llava, image: Image.Image, projected: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The map [H, W, C] of a picture and its thumbnail's vectors [G, C], before or after the projector."""
    config = model.config
    tiles, size = model.image_processor(image)
    with torch.inference_mode():
        tower = model.vision_tower
        features = tower.features(tower(tiles.reshape(-1, *tiles.shape[-3:]).to(model.device, model.dtype)))
        features = (model.multi_modal_projector(features) if projected else features).float()
    if config.anyres:
        whole = stitch(features, size, config.grid_pinpoints, config.vision.image_size, config.grid)
        return whole, features[0]
    return features[0].unflatten(0, (config.vision.grid, config.vision.grid)), features[0]


def selector_inputs(whole: torch.Tensor, thumbnail: torch.Tensor, norm: str) -> torch.Tensor:
    """[R, G] for R regions and G thumbnail tokens.

    norm  a selector's score_norm
    """
    pooled = pool_regions(*split_regions(whole, WINDOW), "max")
    return LinearSelector(len(thumbnail), 1, "max", norm).score(pooled, thumbnail)


def statistics(scores: torch.Tensor) -> dict[str, float]:
    """Of a picture's selector inputs [R, G].

    mean, std       of all of them
    common          the part of their variance that all regions share: that over tokens of the mean over regions
    level           the part that a region has in all its tokens: the variance over regions of the mean over tokens
    own             the rest: what tells regions apart beyond their level; the three sum to 1
    common_squares  the part of their mean square, the mean included, that all regions share
    """
    scores = scores.double()
    variance = scores.var(correction=0)
    by_token, by_region = scores.mean(0), scores.mean(1)
    common, level = (one.var(correction=0) / variance for one in (by_token, by_region))
    return {
        "mean": float(scores.mean()),
        "std": float(variance.sqrt()),
        "common": float(common),
        "level": float(level),
        "own": float(1 - common - level),
        "common_squares": float(by_token.square().mean() / scores.square().mean()),
    }


def measure_selector_inputs(model: minifocus.Llava, images: Sequence[Image.Image]) -> dict[str, Any]:
    """{"tower", "projected"}: {width, and for each norm the mean over pictures of `statistics`}."""
    result: dict[str, Any] = {"pictures": len(images)}
    for name, projected in (("tower", False), ("projected", True)):
        maps = [maps_of(model, image, projected) for image in images]
        result[name] = {"width": maps[0][1].shape[-1], "thumbnail_tokens": len(maps[0][1])}
        for norm in NORMS:
            found = [statistics(selector_inputs(*one, norm)) for one in maps]
            result[name][norm] = {key: fmean(one[key] for one in found) for key in found[0]}
    return result
