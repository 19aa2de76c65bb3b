"""PyramidDrop ("pyramiddrop"; Xing et al. 2024): at the end of each stage of layers, a share of the tokens left stays.

Tokens are ranked by the attention of the prompt's last token in the layer that follows, softmax over all keys, mean over
heads. Three drops by half at a quarter, half and three quarters of the depth leave an eighth. The public code gives the
rest new positions, which a cache of the layers before knows nothing of; here they keep theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import arguments
from ..llama import DecoderLayer
from ..loading.config import TextConfig
from ..rows import Rows
from ..samplers.hooks import Context, Selection
from .decoder_attention import keep_where, largest, last_query, layers_of, num_entered, visual_tokens_of


@dataclass(frozen=True)
class PyramidDropOptions:
    """
    ratio   share of a picture's tokens besides newlines that the first stage leaves; its powers are the later stages' shares
            of all that entered. Rounded down; at least one token
    layers  before which layers; None: a quarter, half and three quarters of the depth (8, 16 and 24 of 32), from 1 on
    """

    ratio: float = 0.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        arguments.settle(self, ratio=arguments.share("ratio", self.ratio))


class PyramidDrop:
    def __init__(self, options: PyramidDropOptions, config: TextConfig):
        self.options, self.config = options, config
        depth = config.num_hidden_layers
        stages = tuple(sorted({max(quarters * depth // 4, 1) for quarters in (1, 2, 3)}))
        self.layers = layers_of("layers", options.layers, stages, depth)

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        if index not in self.layers:
            return None
        scores = last_query(layer, rows, self.config)
        share = self.options.ratio ** (self.layers.index(index) + 1)

        def choose(row: int, tokens: torch.Tensor) -> torch.Tensor:
            count = math.floor(share * num_entered(visual_tokens_of(context, rows, row, int(tokens[0]))) + 1e-9)
            return largest(scores[row, tokens], max(count, 1))

        return keep_where(rows, choose, scores)
