"""FastV ("fastv"; Chen et al. 2024): after layer K - 1, keep the tokens that its last query attends to most.

The attention is that of layer K - 1, softmax over all keys, mean over heads. Its last query is the prompt's last token
(the public code; the paper averages over all queries). Kept tokens keep their order and positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import arguments
from ..llama import DecoderLayer
from ..loading.config import TextConfig
from ..rows import Rows
from ..samplers.hooks import Context, Selection
from .decoder_attention import keep_where, largest, last_query, newlines_of
from .pruning import Budget


@dataclass(frozen=True)
class FastVOptions(Budget):
    """
    layer  K, at least 1; 2 in the paper. Ratio and keep are of what it and later layers see
    """

    ratio: float = 0.5
    layer: int = 2


class FastV:
    def __init__(self, options: FastVOptions, config: TextConfig):
        self.options, self.config = options, config
        self.layer = arguments.whole("layer", options.layer, 1, config.num_hidden_layers - 1)

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        if index != self.layer or context.previous is None:
            return None
        scores = last_query(*context.previous, self.config)

        def choose(row: int, tokens: torch.Tensor) -> torch.Tensor:
            count = self.options.of(len(tokens), newlines_of(rows, row, int(tokens[0])))
            return largest(scores[row, tokens], count)

        return keep_where(rows, choose, scores)
