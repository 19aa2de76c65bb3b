"""FocusLLaVA's vision-guided sampler (paper §3.2): each region of the feature map at a coarse or a fine scale.

The map X is cut into w×w regions. A selector compares each region, pooled to one vector, with the whole thumbnail map
X_g and picks one of several max-poolings of the region; the pooled tokens, in raster order inside their region, go to
the language model, with one newline token after each row of regions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import arguments
from ..errors import InputError
from ..ops import region_pool, region_route
from ..ops.checks import wide
from ..ops.reference import DROP, Pool, num_regions, split_regions
from .hooks import BeforeLLM, PictureFeatures, VisualTokens, Words, leading_tokens, with_newlines

WINDOWS = (1, 2, 4, 8, 12)
_POOLS = {
    3: [(4, 4), (2, 2), (1, 1)],
    7: [(4, 4), (4, 2), (2, 4), (2, 2), (2, 1), (1, 2), (1, 1)],
}


def pools_for(window: int, branches: int) -> list[Pool]:
    """The branches' pool sizes, coarse to fine (Tables 3 and 4): window 1 keeps or drops, window 2 has 2×2 and finer."""
    if window == 1:
        return [DROP, (1, 1)]
    return [(ph, pw) for ph, pw in _POOLS[branches] if ph <= window and pw <= window]


@dataclass(frozen=True)
class VisionGuidedOptions:
    """
    window            side of a region, in cells: 1, 2, 4 (paper's default), 8 or 12
    branches          3 (4×4, 2×2, 1×1) or 7 (4×2, 2×4, 2×1 and 1×2 as well, Table 3)
    score_pool        how a region becomes the one vector that the selector compares: "max" or "mean"
    score_norm        what is done to a region's inner products with the thumbnail before the linear layer: "none" (§3.2), "layer"
                      (mean 0, deviation 1 over the thumbnail's tokens) or "cosine" (of both vectors instead)
    thumbnail         LLaVA-NeXT's thumbnail tokens: "keep", "compress" (sampled like the map) or "drop"
    straight_through  in training, multiply tokens by p / p.detach() (default), so that their size is the same as at
                      inference; False: by p, which is Eq. 2 as printed
    """

    window: int = 4
    branches: int = 3
    score_pool: Literal["max", "mean"] = "max"
    score_norm: Literal["none", "layer", "cosine"] = "none"
    thumbnail: Literal["keep", "compress", "drop"] = "keep"
    straight_through: bool = True

    def __post_init__(self) -> None:
        arguments.settle(
            self,
            window=arguments.whole_of("window", self.window, WINDOWS),
            branches=arguments.whole_of("branches", self.branches, tuple(_POOLS)),
            score_pool=arguments.choice("score_pool", self.score_pool, ("max", "mean")),
            score_norm=arguments.choice("score_norm", self.score_norm, ("none", "layer", "cosine")),
            thumbnail=arguments.choice("thumbnail", self.thumbnail, ("keep", "compress", "drop")),
            straight_through=arguments.flag("straight_through", self.straight_through),
        )


def check_thumbnail(thumbnail: str, anyres: bool) -> None:
    """Raise InputError where the option `thumbnail` is to change a thumbnail that the model does not have."""
    if not anyres and thumbnail != "keep":
        raise InputError(f"thumbnail: LLaVA-1.5 has no thumbnail to {thumbnail}")


def pool_regions(regions: torch.Tensor, exists: torch.Tensor, how: str) -> torch.Tensor:
    """Regions [R, w, w, C] → one vector each [R, C], over the cells that exist."""
    if how == "max":
        return regions.amax(dim=(1, 2))
    weight = exists[..., None].to(regions.dtype)
    return regions.where(exists[..., None], 0).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


class LinearSelector(nn.Module):
    """The paper's learned selector, regions [R, w, w, C], which cells exist, and thumbnail [G, C] → logits z [R, S].

    z = W·score + b with score = pool(X_i)·X_gᵀ / √C (G numbers, one per thumbnail token).
    At inference the two products are folded, z = pool(X_i)·(X_gᵀWᵀ)/√C + b, which costs R·C·S instead of R·G·C
    (nothing non-linear is between them but `score_norm`), and with score_pool "max" one operator does it (`ops.region_route`).
    """

    def __init__(self, num_thumbnail_tokens: int, branches: int, score_pool: str = "max", score_norm: str = "none"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(branches, num_thumbnail_tokens, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(branches, dtype=torch.float32))
        self.score_pool, self.score_norm = score_pool, score_norm
        self.one_operator = (score_pool, score_norm) == ("max", "none")

    def forward(self, regions: torch.Tensor, exists: torch.Tensor, thumbnail: torch.Tensor) -> torch.Tensor:
        pooled = pool_regions(regions, exists, self.score_pool).to(wide(regions.dtype))
        with torch.autocast(pooled.device.type, enabled=False):  # which would round the products
            if self.training or self.score_norm != "none":
                score = self.score(pooled, thumbnail.to(pooled.dtype))
                return F.linear(score, self.weight.to(pooled.dtype), self.bias.to(pooled.dtype))
            return torch.addmm(self.bias.to(pooled.dtype), pooled, self.fold(thumbnail).T)

    def score(self, pooled: torch.Tensor, thumbnail: torch.Tensor) -> torch.Tensor:
        """Region vectors [R, C] and X_g [G, C] → how alike they are [R, G]."""
        if self.score_norm == "cosine":
            return F.normalize(pooled, dim=-1) @ F.normalize(thumbnail, dim=-1).T
        score = pooled @ thumbnail.T / math.sqrt(pooled.shape[-1])
        return F.layer_norm(score, score.shape[-1:], eps=1e-20) if self.score_norm == "layer" else score

    def fold(self, thumbnail: torch.Tensor) -> torch.Tensor:
        """X_g [G, C] → W·X_g / √C [S, C], in float32 (float64 for float64)."""
        dtype = wide(thumbnail.dtype)
        with torch.autocast(thumbnail.device.type, enabled=False):
            return self.weight.to(dtype) @ thumbnail.to(dtype) / math.sqrt(thumbnail.shape[-1])


class VisionGuidedSampler(BeforeLLM):
    """Chooses a scale per region and pools (see the module's docstring)."""

    def __init__(self, selector: nn.Module, options: VisionGuidedOptions):
        super().__init__()
        self.selector, self.options = selector, options
        self.pools = pools_for(options.window, options.branches)

    def sample_map(self, x: torch.Tensor, thumbnail: torch.Tensor) -> _SampledMap:
        """A map [H, W, C] → its pooled tokens, region after region."""
        window, pools, selector = self.options.window, self.pools, self.selector
        cells, grid = x.flatten(0, 1), torch.tensor([x.shape[:2]], device="cpu")
        thumbnail = thumbnail.flatten(0, 1)
        logits = None
        if isinstance(selector, LinearSelector) and selector.one_operator and not self.training:
            context, bias = selector.fold(thumbnail)[None], selector.bias.to(wide(x.dtype))
            tokens, source, offsets, choice = region_route(cells, grid, context, bias, window, pools)
        else:
            logits = selector(*split_regions(x, window), thumbnail)
            choice = logits.argmax(dim=-1)
            weight = self._weight(logits, choice, x.dtype) if self.training else None
            tokens, source, offsets = region_pool(cells, grid, choice, window, pools, weight)
        extent = torch.tensor(pools, device=choice.device)[choice.repeat_interleave(offsets.diff())]
        (height, width), across = x.shape[:2], max(x.shape[1], 1)
        to_the_edge = torch.stack([height - source // across, width - source % across], dim=-1)
        extent = extent.minimum(to_the_edge)
        return _SampledMap(tokens, source, extent, offsets, choice, logits)

    def _weight(self, logits: torch.Tensor, choice: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The factor of a region's tokens in training (Eq. 2): the probability of its branch, or its gradient alone."""
        chosen = logits.softmax(dim=-1).gather(1, choice[:, None]).squeeze(1)
        factor = chosen / chosen.detach() if self.options.straight_through else chosen
        return factor.to(wide(dtype))

    def forward(self, picture: PictureFeatures, text: Words) -> VisualTokens:
        """Compress the map (and, if so asked, the thumbnail); `text` is not looked at."""
        layout, window = picture.layout, self.options.window
        down, across = num_regions((layout.height, layout.width), window)
        sampled = self.sample_map(picture.map, picture.thumbnail)
        logits = sampled.logits
        if self.options.thumbnail == "compress":
            small = self.sample_map(picture.thumbnail, picture.thumbnail)
            leading = (small.tokens, small.cells, small.extent)
            if logits is not None and small.logits is not None:
                logits = torch.cat([logits, small.logits])
        else:
            leading = leading_tokens(picture, 0 if self.options.thumbnail == "drop" else None)
        row = torch.arange(down * across, device=sampled.offsets.device) // max(across, 1)
        row = row.repeat_interleave(sampled.offsets.diff(), output_size=len(sampled.tokens))
        body = (sampled.tokens, layout.of_cells(sampled.cells), sampled.extent)
        tokens = with_newlines(picture, leading, body, row, window)
        return VisualTokens(*tokens, layout, sampled.choice.view(down, across), logits)


@dataclass(frozen=True)
class _SampledMap:
    """tokens [n, C], the raster cell where each begins [n], cells covered [n, 2], offsets [regions + 1], choice [regions],
    logits [regions, S] where they were made."""

    tokens: torch.Tensor
    cells: torch.Tensor
    extent: torch.Tensor
    offsets: torch.Tensor
    choice: torch.Tensor
    logits: torch.Tensor | None
