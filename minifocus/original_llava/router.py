"""AVG-LLaVA's router: its tensors in their checkpoints, and the file that it is kept in beside a converted model.

router.safetensors has the tensors by the names that follow `model.router.`, and in its metadata what is not in their shapes:

format         minifocus-router
granularities  numbers of tokens of a view, coarse to fine, as 36,72,144,288,576
filtered_text  text tokens that the router reads
attention      views: attention runs over a picture's views, as in the public code; the paper's over tokens
crop           released: a coarse map is unpadded as in the public code, as if its cells were square
"""

from __future__ import annotations

from .config import OriginalConfig

IN_CHECKPOINT = "model.router."
HEADS = 8


def router_shapes(granularities: tuple[int, ...], filtered_text: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes by name; `width` is the decoder's number of channels D."""
    scores, slots = len(granularities), sum(granularities) + filtered_text
    square, vector = (width, width), (width,)
    shapes: dict[str, tuple[int, ...]] = {
        "merger.self_attn.in_proj_weight": (3 * width, width),
        "merger.self_attn.in_proj_bias": (3 * width,),
        "router.2.weight": (scores, width),
        "router.2.bias": (scores,),
        "voter": (slots, 1),
        "norm.weight": (scores,),
        "norm.bias": (scores,),
    }
    for name in ("merger.self_attn.out_proj", "merger.linear1", "merger.linear2", "router.0"):
        shapes |= {f"{name}.weight": square, f"{name}.bias": vector}
    for name in ("merger.norm1", "merger.norm2"):
        shapes |= {f"{name}.weight": vector, f"{name}.bias": vector}
    return shapes


def router_metadata(config: OriginalConfig) -> dict[str, str]:
    return {
        "format": "minifocus-router",
        "granularities": ",".join(map(str, config.granularities)),
        "filtered_text": str(config.filtered_text),
        "attention": "views",
        "crop": "released",
    }
