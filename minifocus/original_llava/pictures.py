"""preprocessor_config.json: their code prepares pictures as CLIP's file says, after padding or cutting them into tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.reading import named, present
from ..inputs.image_processor import ImageProcessor
from ..loading.config import VisionConfig
from .config import OriginalConfig


def picture_settings(config: OriginalConfig, vision: VisionConfig, tower: Path | None) -> dict[str, Any]:
    """The file's members. CLIP's are read from the tower's folder; its published values are taken where there is none."""
    side = vision.image_size
    clip = ImageProcessor(anyres=False, image_size=side, size=side)
    if tower is not None and present(tower / "preprocessor_config.json"):
        clip = ImageProcessor.from_folder(tower, model_type="llava", image_size=side)
        if config.anyres and clip.size not in (side, (side, side)):
            raise CheckpointError(
                f"{named(tower / 'preprocessor_config.json')}: size: expected {side}, the side of a tile, got {clip.size}"
            )
    kind = "LlavaNextImageProcessor" if config.anyres else "LlavaImageProcessor" if config.pad else "CLIPImageProcessor"
    size = clip.size
    members: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]} if isinstance(size, tuple) else {"shortest_edge": size},
        "resample": clip.resample,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": clip.rescale_factor,
        "do_normalize": True,
        "image_mean": list(clip.mean),
        "image_std": list(clip.std),
    }
    if config.anyres:
        members["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.pinpoints]
    if config.anyres or config.pad:
        members["do_pad"] = True  # of a batch with empty tiles, or of a picture to a square
    return members
