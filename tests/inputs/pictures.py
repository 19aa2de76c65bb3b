"""Pictures, and processors to make tiles of them."""

import json

import numpy as np
from PIL import Image

from minifocus.inputs.image_processor import ImageProcessor

ONE = [[2, 2]]
FIVE = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
SIX = [[3, 3], *FIVE]  # the largest first: small pictures must not take it
HUB = [[336 * rows, 336 * cols] for rows, cols in FIVE]


def pinpoints_of(tile, grids=FIVE):
    return [[tile * rows, tile * cols] for rows, cols in grids]


def picture(height, width, seed=0):
    """Noise on a gradient: every pixel differs, as bit-for-bit comparison needs, and edges are not all alike."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    ramp = np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


def processor(tmp_path, fields, model_type, tile, grids=FIVE):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    return ImageProcessor.from_folder(
        tmp_path, model_type=model_type, image_size=tile, grid_pinpoints=pinpoints_of(tile, grids)
    )
