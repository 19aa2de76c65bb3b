"""AVG-LLaVA's router in its public checkpoints → router.safetensors, by the names that follow `model.router.`."""

from __future__ import annotations

from ..avg_llava.router import HEADS, Router
from ..loading.weights import shapes_of, without_values
from .config import OriginalConfig

IN_CHECKPOINT = "model.router."

__all__ = ["HEADS", "IN_CHECKPOINT", "router_options", "router_shapes"]


def router_shapes(granularities: tuple[int, ...], filtered_text: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes by name; `width` is the decoder's number of channels D."""
    slots = sum(granularities) + filtered_text
    return shapes_of(without_values(lambda: Router(width, slots, len(granularities))))


def router_options(config: OriginalConfig) -> dict[str, str]:
    """What the public code does where it differs from the paper: see `avg_llava.sampler.RouterOptions`."""
    return {
        "granularities": ",".join(map(str, config.granularities)),
        "filtered_text": str(config.filtered_text),
        "attention": "views",
        "text": "prompt",
        "crop": "released",
    }
