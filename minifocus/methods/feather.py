"""FEATHER ("feather"; Endo et al. 2024): attention without positions, and a grid so that no part of the picture is lost.

Tokens are ranked by the attention of the prompt's last token in a layer, computed without rotary positions, which favour
the end of the picture: softmax over the picture's keys, mean over heads. After that layer the best share stays and with
it every token on a grid of stride 3; after a second layer the best share of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import arguments
from ..errors import InputError
from ..llama import DecoderLayer
from ..loading.config import TextConfig
from ..rows import Rows
from ..samplers.hooks import Context, Selection
from .decoder_attention import keep_where, largest, layers_of, queries_and_keys, visual_tokens_of
from .pruning import coordinates


@dataclass(frozen=True)
class FeatherOptions:
    """
    ratio   share of a picture's tokens, besides newlines and grid, that stays at the first layer; rounded down, at least one
    stride  of the grid, in rows and columns of the map (and of the thumbnail)
    second  share of the tokens left that stays at the second layer; likewise
    layers  the two layers that are the first to see what stays, from 1 on; None: a quarter and half of the depth (8 and 16
            of 32)
    """

    ratio: float = 0.3
    stride: int = 3
    second: float = 0.09
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shares = {name: arguments.share(name, getattr(self, name)) for name in ("ratio", "second")}
        arguments.settle(self, **shares, stride=arguments.whole("stride", self.stride, 1, 2**31))


class Feather:
    def __init__(self, options: FeatherOptions, config: TextConfig):
        self.options, self.config = options, config
        depth = config.num_hidden_layers
        default = tuple(sorted({max(depth // 4, 1), max(depth // 2, 1)}))
        self.layers = layers_of("layers", options.layers, default, depth, least=1)
        if len(self.layers) > 2:
            raise InputError(f"layers: expected at most two, got {arguments.shown(options.layers)}")

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        if index not in self.layers or context.previous is None:
            return None
        q, k = queries_and_keys(*context.previous, self.config, rows.valid.shape[1] - 1, rope=False)
        logits = (q @ k.transpose(2, 3))[:, :, 0]
        scores = logits.new_zeros(rows.valid.shape)
        for row, tokens in rows.pictures():
            scores[row, tokens] = logits[row][:, tokens].softmax(dim=-1).mean(dim=0)
        first = index == self.layers[0]
        share = self.options.ratio if first else self.options.second

        def choose(row: int, tokens: torch.Tensor) -> torch.Tensor:
            best = largest(scores[row, tokens], max(int(share * len(tokens)), 1))
            if not first:
                return best
            visual = visual_tokens_of(context, rows, row, int(tokens[0]))
            cells = coordinates(visual.layout, rows.source[row, tokens] - visual.begin)
            return best | (cells % self.options.stride == 0).all(dim=-1)

        return keep_where(rows, choose, scores)
