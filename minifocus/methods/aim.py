"""AIM ("aim"; Zhong et al. 2024): merge similar tokens before the language model, drop more and more of them inside it.

Before: tokens in alternation form two sets; each of the first is matched with the most similar of the second (cosine),
and the best-matched are averaged into their partners. One pass can halve; passes follow until the share is reached.

Inside, after layer `begin` and every one that follows: tokens are ranked by PageRank over the layer's attention, whose
logits are sharpened tenfold (in each head every token passes what it has to those that it attends to, for some rounds;
the score is the root mean square over heads), and so many stay that layer `end` sees none, falling in equal steps.

The public code forgets in a second pass of merging how many tokens one is made of, and puts those that were not merged
first; inside, its dropped tokens still pass on what they begin with. Here a token weighs as much as it is made of, the
order stays, and dropped tokens are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .. import arguments
from ..errors import InputError
from ..llama import DecoderLayer
from ..loading.config import Config, TextConfig
from ..ops.checks import wide
from ..rows import Rows
from ..samplers.hooks import BeforeLLM, Context, PictureFeatures, Selection, VisualTokens, Words, uncompressed
from .decoder_attention import keep_where, largest, num_entered, queries_and_keys, visual_tokens_of
from .pruning import Budget

QUERY_BLOCK = 128  # tokens whose attention is in memory at a time
TEMPERATURE = 0.1  # of the walk's attention


@dataclass(frozen=True)
class AIMOptions:
    """
    ratio   share of a picture's tokens, newlines among them, that merging leaves; the paper's ½ or ¼
    begin   the last layer that sees them all; None: half the depth (14 of 28)
    end     the first that sees none, nor the pictures' newlines; None: 22/28 of the depth, or the layer after a `begin` that
            is later; `end` = depth: none is emptied
    rounds  of PageRank
    """

    ratio: float = 0.5
    begin: int | None = None
    end: int | None = None
    rounds: int = 5

    def __post_init__(self) -> None:
        rounds = arguments.whole("rounds", self.rounds, 1, 100)
        arguments.settle(self, ratio=arguments.share("ratio", self.ratio), rounds=rounds)


class Merging(BeforeLLM):
    """AIM's first part. A merged token stands where its last partner stood."""

    def __init__(self, options: AIMOptions, config: Config):
        super().__init__()
        self.ratio = options.ratio

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        whole = uncompressed(picture)
        competing = ~whole.layout.unscored(whole.source)
        count = int(competing.sum())
        if not count:
            return whole
        total = Budget(self.ratio).of(count, len(competing) - count)
        merged, places = merge(whole.tokens[competing], total)
        kept = ~competing
        kept[competing.nonzero().squeeze(1)[places]] = True
        tokens = whole.tokens.clone()
        tokens[kept & competing] = merged.to(tokens.dtype)
        return VisualTokens(tokens[kept], whole.source[kept], whole.extent[kept], whole.layout)


def merge(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite merging of tokens [n, C] to `count` of them, float32: (merged [count, C], places [count] among the n).

    A token weighs as much as the tokens it is made of.
    """
    values = tokens.to(wide(tokens.dtype))
    size, places = values.new_ones(len(values), 1), torch.arange(len(values), device=values.device)
    while len(values) > count:
        first, second = values[::2], values[1::2]
        leaving = min(len(values) - count, len(first) if len(second) else 0)
        if not leaving:
            break
        likeness, partner = (F.normalize(first, dim=1) @ F.normalize(second, dim=1).T).max(dim=1)
        going = likeness.argsort(descending=True, stable=True)[:leaving]
        weighted = (values * size)[1::2].index_add(0, partner[going], (values * size)[::2][going])
        second_size = size[1::2].index_add(0, partner[going], size[::2][going])
        stays = torch.ones(len(values), dtype=torch.bool, device=values.device)
        stays[going * 2] = False
        values, size = values.clone(), size.clone()
        values[1::2], size[1::2] = weighted / second_size, second_size
        values, size, places = values[stays], size[stays], places[stays]
    return values, places


class Dropping:
    """AIM's second part."""

    def __init__(self, options: AIMOptions, config: TextConfig):
        self.depth, depth = config.num_hidden_layers, config.num_hidden_layers
        begin = depth // 2 if options.begin is None else options.begin
        self.begin = arguments.whole("begin", begin, 0, depth - 1)
        end = max(-(-22 * depth // 28), self.begin + 1) if options.end is None else options.end
        self.end = arguments.whole("end", end, 1, depth)
        if self.end <= self.begin:
            raise InputError(f"end: expected a layer after begin, {self.begin}, got {self.end}")
        self.rounds, self.config = options.rounds, config

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> Selection | None:
        if not self.begin < index <= min(self.end, self.depth - 1) or context.previous is None:
            return None
        scores = page_rank(*context.previous, self.config, self.rounds)
        left = self.end - index  # of end - begin equal steps

        def choose(row: int, tokens: torch.Tensor) -> torch.Tensor:
            count = num_entered(visual_tokens_of(context, rows, row, int(tokens[0]))) * left // (self.end - self.begin)
            return largest(scores[row, tokens], count)

        chosen = keep_where(rows, choose, scores)
        # Where no token of a picture is left, its newlines separate nothing.
        return replace(chosen, kept=chosen.kept & (rows.picture < 0)) if left == 0 else chosen


def page_rank(layer: DecoderLayer, rows: Rows, config: TextConfig, rounds: int) -> torch.Tensor:
    """[B, S]: what tokens have after `rounds` rounds along a layer's sharpened causal attention; they begin with 1/S each."""
    q, k = queries_and_keys(layer, rows, config, 0)
    q, size = q / TEMPERATURE, rows.valid.shape[1]
    columns = torch.arange(size, device=k.device)
    weight = (rows.valid.to(q.dtype) / rows.valid.sum(dim=1, keepdim=True))[:, None].expand(-1, q.shape[1], -1)
    for _ in range(rounds):
        received = torch.zeros_like(weight)
        for begin in range(0, size, QUERY_BLOCK):
            own = slice(begin, begin + QUERY_BLOCK)
            hidden = (columns[None, :] > columns[own, None]) | ~rows.valid[:, None, None]
            hidden = hidden & (columns[None, :] != columns[own, None])  # padding sees itself, or softmax would give NaN
            attention = (q[:, :, own] @ k.transpose(2, 3)).masked_fill(hidden, -torch.inf).softmax(dim=-1)
            received += (weight[:, :, None, own] @ attention)[:, :, 0]
        weight = received
    return weight.square().mean(dim=1).sqrt()
