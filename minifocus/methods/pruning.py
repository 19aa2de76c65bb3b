"""What pruning methods share: how many of a picture's tokens stay, and which tokens compete with each other.

Thumbnail tokens and map cells compete; newlines (and LLaVA-1.5's class token, where it is kept) always stay, and count.
Tokens keep their order, and newlines their places, so that what is left reads like a picture with holes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .. import arguments
from ..errors import InputError
from ..inputs.token_layout import Layout
from ..samplers.hooks import BeforeLLM, PictureFeatures, VisualTokens, Words, uncompressed
from ..vision import VisionTower


@dataclass(frozen=True)
class Budget:
    """
    ratio  share of a picture's visual tokens that stay, newlines among them, above 0 and at most 1
    keep   keep this many tokens besides newlines instead; None: by `ratio`
    """

    ratio: float = 0.39
    keep: int | None = None

    def __post_init__(self) -> None:
        keep = None if self.keep is None else arguments.whole("keep", self.keep, 1)
        arguments.settle(self, ratio=arguments.share("ratio", self.ratio), keep=keep)

    def of(self, competing: int, fixed: int) -> int:
        """The number of `competing` tokens that stay, beside `fixed` ones that always do: at least 1 where there are any."""
        wanted = self.keep if self.keep is not None else math.floor(self.ratio * (competing + fixed) + 0.5) - fixed
        return min(max(wanted, 1), competing)


@dataclass(frozen=True)
class PruningOptions(Budget):
    """
    per    where tokens compete for it: "picture" (all with all), "map" (the thumbnail and the map keep equal shares) or
           "tile" (so does every tile of the map)
    """

    per: Literal["picture", "map", "tile"] = "map"

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.settle(self, per=arguments.choice("per", self.per, ("picture", "map", "tile")))


def spread(total: int, room: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Share `total` out in proportion to `weights`. No one gets more than its `room`; the rest goes to the others.

    Whole numbers by largest remainder, the first among equals. The result sums to `total` or to all the room there is.
    """
    shares, left = [0.0] * len(room), float(min(total, sum(room)))
    active = [i for i, r in enumerate(room) if r > 0]
    while active:
        whole = sum(weights[i] for i in active)
        quota = {i: left * (weights[i] / whole if whole > 0 else 1 / len(active)) for i in active}
        full = [i for i in active if quota[i] >= room[i]]
        for i in full or active:
            shares[i] = float(room[i]) if full else quota[i]
        left -= sum(room[i] for i in full)
        active = [i for i in active if i not in full] if full else []
    counts = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(room)), key=lambda i: (counts[i] - shares[i], i))
    missing = min(total, sum(room)) - sum(counts)
    for i in [i for i in by_remainder if counts[i] < room[i]][:missing]:
        counts[i] += 1
    return counts


def top(scores: torch.Tensor, groups: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """bool [n], the counts[g] largest scores of each group g (`groups` [n] int64); of equal ones the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for group, count in enumerate(counts):
        own = (groups == group).nonzero().squeeze(1)
        kept[own[scores[own].argsort(descending=True, stable=True)[:count]]] = True
    return kept


def views(picture: PictureFeatures) -> torch.Tensor:
    """The view of each competing token, [n] int64: 0 is the thumbnail (LLaVA-1.5: the only view), tiles follow."""
    whole, small = (cue[..., 0] for cue in looked_at(picture))
    tile = (whole - small[0, 0]).long().flatten()
    return torch.cat([tile.new_zeros(small.numel()), tile]) if picture.layout.newlines else tile


def looked_at(picture: PictureFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """`picture.cues`. Raises InputError where the picture was encoded without the sampler."""
    if picture.cues is None:
        raise InputError(
            "before_llm: expected pictures that were encoded with this sampler, got one encoded without it"
        )
    return picture.cues


def cues(picture: PictureFeatures) -> torch.Tensor:
    """What was taken from the tower for each competing token, [n, K]."""
    whole, small = (cue[..., 1:].flatten(0, 1) for cue in looked_at(picture))
    return torch.cat([small, whole]) if picture.layout.newlines else whole


def coordinates(layout: Layout, places: torch.Tensor) -> torch.Tensor:
    """Places → [n, 2], (row, column) on the map, or on the thumbnail among the leading tokens; -1 for the others."""
    cells, width = layout.cells(places), max(layout.width, 1)
    across = layout.thumbnail_width
    on_map = torch.stack([cells // width, cells % width], dim=-1).where(cells[:, None] >= 0, -1)
    if not across:
        return on_map
    on_thumbnail = torch.stack([places // across, places % across], dim=-1)
    return on_thumbnail.where((places < layout.leading)[:, None], on_map)


class Pruner(BeforeLLM):
    """Keeps as many of a picture's tokens as the budget says. A method chooses which."""

    def __init__(self, options: Budget):
        super().__init__()
        self.options = options

    def look(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """What to take from the vision tower, each [N, g², any number]; see `BeforeLLM.cues`."""
        return []

    def cues(self, tower: VisionTower, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The number of the tile, in float32, and then what `look` takes."""
        tiles, patches = states[0].shape[0], states[0].shape[1] - 1
        number = torch.arange(tiles, dtype=torch.float32, device=states[0].device)
        return torch.cat([number[:, None, None].expand(-1, patches, 1), *self.look(tower, states)], dim=-1)

    def budget(self, competing: int, fixed: int) -> int:
        """The number of `competing` tokens that stay, beside `fixed` ones that always do."""
        return self.options.of(competing, fixed)

    def groups(self, picture: PictureFeatures) -> torch.Tensor:
        """The group in which each token competes, [n] int64."""
        view = views(picture)
        per = self.options.per if isinstance(self.options, PruningOptions) else "tile"
        if per == "picture":
            return torch.zeros_like(view)
        return view.clamp(max=1) if per == "map" else view

    def allocate(self, picture: PictureFeatures, groups: torch.Tensor, total: int) -> list[int]:
        """The number of tokens that stay in each group, in proportion to its size."""
        room = groups.bincount().tolist()
        return spread(total, room, room)

    @abstractmethod
    def choose(self, picture: PictureFeatures, total: int) -> torch.Tensor:
        """bool [n], which `total` of the competing tokens stay: the thumbnail's, then the map's in raster order."""

    def merge(self, picture: PictureFeatures, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The kept ones of the competing tokens [n, C], as the language model reads them: unchanged."""
        return tokens[kept]

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        whole, layout = uncompressed(picture), picture.layout
        competing = ~layout.unscored(whole.source)
        count = int(competing.sum())
        if not count:
            return whole
        total = self.budget(count, len(competing) - count)
        stays = self.choose(picture, total)
        kept = ~competing
        kept[competing] = stays
        tokens = whole.tokens.clone()
        tokens[competing & kept] = self.merge(picture, whole.tokens[competing], stays).to(tokens.dtype)
        return VisualTokens(tokens[kept], whole.source[kept], whole.extent[kept], layout)


class RankingPruner(Pruner):
    """Keeps the tokens with the largest scores."""

    @abstractmethod
    def scores(self, picture: PictureFeatures) -> torch.Tensor:
        """[n] float, one for each competing token."""

    def choose(self, picture: PictureFeatures, total: int) -> torch.Tensor:
        groups = self.groups(picture)
        return top(self.scores(picture), groups, self.allocate(picture, groups, total))
