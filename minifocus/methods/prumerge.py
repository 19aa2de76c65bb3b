"""LLaVA-PruMerge ("prumerge", "prumerge+"; Shang et al. 2024): keep what the class token looks at, merge the rest into it.

The attention is the class token's to every patch's key in the tower's last block, over all heads at once. In each tile
the tokens stay whose attention is an outlier, above the third quartile by 1.5 interquartile ranges; with a `ratio` or
`keep` so many instead. To each are then added those tokens of its tile, kept ones too, whose keys are most like its own,
weighted by their attention. PruMerge+ adds tokens on a uniform grid, three for each outlier (of a budget, three quarters
are the grid's).

So it is in the public code. The paper speaks of a weighted average, which without training costs far more: where attention
is even, it makes a kept token one thirty-third of what it was. The public code merges before the projector, here it is
done after it, and ends in one token more, the weighted sum of all that were dropped, which no budget has room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .. import arguments
from ..loading.config import Config
from ..ops.checks import wide
from ..samplers.hooks import PictureFeatures
from ..vision import VisionTower
from .pruning import PruningOptions, RankingPruner, coordinates, cues, top
from .random_uniform import stride_grid
from .tower_attention import block_and_input, check_block, reachable_block


@dataclass(frozen=True)
class PruMergeOptions(PruningOptions):
    """
    ratio       of tokens to keep; None: the outliers
    neighbours  how many tokens each kept one takes in
    """

    ratio: float | None = None  # type: ignore[assignment]
    per: Literal["picture", "map", "tile"] = "tile"
    neighbours: int = 32

    def __post_init__(self) -> None:
        if self.ratio is not None:
            arguments.settle(self, ratio=arguments.share("ratio", self.ratio))
        others = PruningOptions(1.0, self.keep, self.per)
        neighbours = arguments.whole("neighbours", self.neighbours, 0, 2**31)
        arguments.settle(self, keep=others.keep, per=others.per, neighbours=neighbours)


class PruMerge(RankingPruner):
    """With `plus`, PruMerge+."""

    def __init__(self, options: PruMergeOptions, config: Config, plus: bool = False):
        super().__init__(options)
        self.neighbours, self.plus = options.neighbours, plus
        self.adaptive = options.ratio is None and options.keep is None
        self.block = check_block(config, None, reachable_block(config))
        self.tower_blocks = (self.block,)

    def look(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """Attention [N, g², 1], then keys [N, g², C]."""
        block, x = block_and_input(tower, states, self.block)
        normed = block.layer_norm1(x)
        q, k = block.self_attn.q_proj(normed[:, :1]), block.self_attn.k_proj(normed)
        attention = (q.float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return [attention[:, 0, 1:, None], k[:, 1:].float()]

    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        return cues(picture)[:, 0]

    def budget(self, competing: int, fixed: int) -> int:
        return competing if self.adaptive else super().budget(competing, fixed)

    def choose(self, picture: PictureFeatures, total: int) -> torch.Tensor:
        groups, scores = self.groups(picture), self.scores(picture)
        room = groups.bincount().tolist()
        if self.adaptive:
            counts = [outliers(scores[groups == group]) if n else 0 for group, n in enumerate(room)]
            wanted = [min(4 * count, n) if self.plus else count for count, n in zip(counts, room, strict=True)]
        else:
            wanted = self.allocate(picture, groups, total)
            counts = [-(-count // 4) if self.plus else count for count in wanted]
        kept = top(scores, groups, counts)
        if self.plus:
            grid = torch.zeros_like(scores)
            for group, (count, first) in enumerate(zip(wanted, counts, strict=True)):
                # A grid of as many places as are missing, then the best of what it shares with the outliers.
                grid[groups == group] = self._grid(picture, groups, group, count - first).to(grid)
            order = grid * 2 + scores / scores.abs().max().clamp(min=1e-30)
            order[kept] = torch.inf
            kept = top(order, groups, wanted)
        return kept

    def _grid(self, picture: PictureFeatures, groups: torch.Tensor, group: int, count: int) -> torch.Tensor:
        """bool [tokens of the group], True on a uniform grid of `count` of them."""
        size = int((groups == group).sum())
        places = _coordinates(picture)[groups == group]
        if not size or not count:
            return torch.zeros(size, dtype=torch.bool)
        corner = places.amin(dim=0)
        height, width = (places.amax(dim=0) - corner + 1).tolist()
        if height * width != size:  # several views compete: no rectangle
            return stride_grid(1, size, count)[0]
        grid = stride_grid(height, width, count)
        return grid[tuple((places - corner).cpu().T)]

    def merge(self, picture: PictureFeatures, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        cue, groups = cues(picture), self.groups(picture)
        attention, keys = cue[:, 0], F.normalize(cue[:, 1:], dim=-1)
        weighted = attention[:, None] * tokens.to(wide(tokens.dtype))
        merged = tokens.to(wide(tokens.dtype), copy=True)
        for group in groups.unique().tolist():
            own = (groups == group).nonzero()[:, 0]
            stay = own[kept[own]]
            alike = keys[stay] @ keys[own].T
            alike[own == stay[:, None]] = -torch.inf  # not itself
            closest = alike.topk(min(self.neighbours, len(own) - 1), dim=1).indices
            merged[stay] += weighted[own[closest]].sum(dim=1)
        return merged[kept].to(tokens.dtype)


def outliers(scores: torch.Tensor) -> int:
    """The number of scores above the third quartile by 1.5 interquartile ranges; at least 1."""
    low, high = scores.float().quantile(scores.new_tensor([0.25, 0.75], dtype=torch.float32)).tolist()
    return max(int((scores > high + 1.5 * (high - low)).sum()), 1)


def _coordinates(picture: PictureFeatures) -> torch.Tensor:
    """[n, 2], (row, column) of every competing token on its map or on the thumbnail."""
    places = torch.arange(picture.layout.num_tokens, device=picture.map.device)
    return coordinates(picture.layout, places[~picture.layout.unscored(places)])
