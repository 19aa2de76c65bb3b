"""The names of tensors in the original repositories' checkpoints, and which model they are of."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError
from ..loading.weights import StoredTensor

TOWER = "model.vision_tower.vision_tower.vision_model."
FUSION = "model.mm_projector_crosslayer."  # LLaVA-STF's fusion of several states of the tower
FIRST_LAYER = "model.mm_projector.0.weight"

# This package's prefixes → theirs. The first match wins.
_RENAMES = [
    ("vision_tower.", TOWER),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("multi_modal_projector.mbtf.", FUSION),
    ("multi_modal_projector.stf.", "model.mm_projector."),
    ("image_newline", "model.image_newline"),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
]


def original_name(name: str) -> str:
    """A tensor's name in this package → its name in their checkpoints."""
    for prefix, theirs in _RENAMES:
        if name.startswith(prefix):
            return theirs + name[len(prefix) :]
    raise ValueError(name)


def fused_layers(select_layer: int, blocks: int) -> list[int]:
    """The states of the tower that LLaVA-STF joins, in its order: that of `mm_vision_select_layer`, then every third below it.

    0 is what enters the first block, as in `vision_feature_layer`. Of 24 blocks they are 23, 21, 18, 15, 12, 9, 6 and 3.
    """
    first = select_layer % (blocks + 1)
    return [first, *(layer for layer in range(blocks, 0, -1) if layer % 3 == 0 and layer < first)]


def fusion_options(found: Mapping[str, StoredTensor], width: int, side: int, layers: list[int]) -> dict[str, object]:
    """config.json's `projector` for LLaVA-STF; `width` is the tower's, `side` its patches along a side of a view.

    The window is what the projector's first layer takes: all channels of k×k patches. Raises CheckpointError where the first
    layer of either part fits no such model.
    """
    fusion = found.get(f"{FUSION}0.weight")
    if fusion is not None and fusion.shape[1:] != (len(layers) * width,):
        raise CheckpointError(
            f"{fusion.file}: {fusion.key}: expected {(4 * width, len(layers) * width)}, for the states "
            f"{', '.join(map(str, layers))} of the tower, found {fusion.shape}"
        )
    first, window = found.get(FIRST_LAYER), 2
    if first is not None:
        fits = [k for k in range(1, side + 1) if side % k == 0 and first.shape[1:] == (k * k * width,)]
        if not fits:
            raise CheckpointError(
                f"{first.file}: {first.key}: expected {(16 * width, 4 * width)}, for windows of 2×2 patches, or all "
                f"channels of k×k patches, k being a divisor of {side}, found {first.shape}"
            )
        window = fits[0]
    named = {"name": "stf", "window": window, "tokens": 1, "mbtf": True}
    return {**named, "fusion": "concatenation", "last_gelu": False}
