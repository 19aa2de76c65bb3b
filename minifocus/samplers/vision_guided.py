"""FocusLLaVA's vision-guided sampler (paper §3.2): each region of the feature map at a coarse or a fine scale.

The map X is cut into w×w regions. A selector compares each region, pooled to one vector, with the whole thumbnail map
X_g and picks one of several max-poolings of the region; the pooled tokens, in raster order inside their region, go to
the language model, with one newline token after each row of regions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialise
from torch import nn

from .. import arguments
from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import open_safetensors
from ..ops import region_pool, region_route
from ..ops.checks import wide
from ..ops.reference import DROP, Pool, num_regions, split_regions
from .hooks import BeforeLLM, PictureFeatures, VisualTokens

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
    thumbnail         LLaVA-NeXT's thumbnail tokens: "keep", "compress" (sampled like the map) or "drop"
    straight_through  in training, multiply tokens by p / p.detach() instead of p (Eq. 2), so that their size is the same
                      as at inference
    """

    window: int = 4
    branches: int = 3
    score_pool: Literal["max", "mean"] = "max"
    thumbnail: Literal["keep", "compress", "drop"] = "keep"
    straight_through: bool = False

    def __post_init__(self) -> None:
        window = arguments.whole_of("window", self.window, WINDOWS)
        branches = arguments.whole_of("branches", self.branches, tuple(_POOLS))
        score_pool = arguments.choice("score_pool", self.score_pool, ("max", "mean"))
        thumbnail = arguments.choice("thumbnail", self.thumbnail, ("keep", "compress", "drop"))
        straight_through = arguments.flag("straight_through", self.straight_through)
        arguments.settle(
            self,
            window=window,
            branches=branches,
            score_pool=score_pool,
            thumbnail=thumbnail,
            straight_through=straight_through,
        )


def pool_regions(regions: torch.Tensor, exists: torch.Tensor, how: str) -> torch.Tensor:
    """Regions [R, w, w, C] → one vector each [R, C], over the cells that exist."""
    if how == "max":
        return regions.amax(dim=(1, 2))
    weight = exists[..., None].to(regions.dtype)
    return regions.where(exists[..., None], 0).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


class Selector(Protocol):
    """Scores every branch for every region: (regions [R, w, w, C], exists, thumbnail [G, C]) → logits [R, S]."""

    def __call__(self, regions: torch.Tensor, exists: torch.Tensor, thumbnail: torch.Tensor) -> torch.Tensor: ...


class LinearSelector(nn.Module):
    """The paper's learned selector: z = W·score + b with score = pool(X_i)·X_gᵀ / √C (G numbers, one per thumbnail token).

    At inference the two products are folded, z = pool(X_i)·(X_gᵀWᵀ)/√C + b, which costs R·C·S instead of R·G·C
    (nothing non-linear stands between them), and with score_pool "max" one operator does it all (`ops.region_route`).
    """

    def __init__(self, num_thumbnail_tokens: int, branches: int, score_pool: str = "max"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(branches, num_thumbnail_tokens, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(branches, dtype=torch.float32))
        self.score_pool = score_pool

    def forward(self, regions: torch.Tensor, exists: torch.Tensor, thumbnail: torch.Tensor) -> torch.Tensor:
        pooled = pool_regions(regions, exists, self.score_pool)
        pooled = pooled.to(wide(pooled.dtype))
        with torch.autocast(pooled.device.type, enabled=False):  # which would round the products
            if self.training:
                score = pooled @ thumbnail.to(pooled.dtype).T / math.sqrt(pooled.shape[-1])
                return F.linear(score, self.weight.to(pooled.dtype), self.bias.to(pooled.dtype))
            return torch.addmm(self.bias.to(pooled.dtype), pooled, self.fold(thumbnail).T)

    def fold(self, thumbnail: torch.Tensor) -> torch.Tensor:
        """X_g [G, C] → W·X_g / √C [S, C], in float32 (float64 for float64)."""
        dtype = wide(thumbnail.dtype)
        with torch.autocast(thumbnail.device.type, enabled=False):
            return self.weight.to(dtype) @ thumbnail.to(dtype) / math.sqrt(thumbnail.shape[-1])


class VarianceSelector(nn.Module):
    """A training-free stand-in, not the paper's: the more a region's cells differ, the finer its scale.

    Regions are ranked by the variance of their cells, averaged over channels, and each of the S scales gets an equal
    share of them: the even use of scales that the balance loss (Eq. 3) pulls towards.
    """

    def __init__(self, branches: int):
        super().__init__()
        self.branches = branches

    def forward(self, regions: torch.Tensor, exists: torch.Tensor, thumbnail: torch.Tensor) -> torch.Tensor:
        mean = pool_regions(regions, exists, "mean").float()[:, None, None]
        spread = ((regions.float() - mean) ** 2).where(exists[..., None], 0).sum(dim=(1, 2)).mean(dim=-1)
        spread = spread / exists.sum(dim=(1, 2))
        rank = spread.argsort(stable=True).argsort(stable=True)
        choice = rank * self.branches // max(len(rank), 1)
        return F.one_hot(choice, self.branches).float()


def load_selector(
    file: Path, num_thumbnail_tokens: int, options: dict[str, object]
) -> tuple[LinearSelector, VisionGuidedOptions]:
    """A trained selector and the options that it was trained with; `options` may repeat but not contradict those."""
    with open_safetensors(file) as stored:
        metadata = stored.metadata() or {}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
    if metadata.get("format") != "minifocus-selector":
        raise CheckpointError(
            f"{file}: metadata: expected format=minifocus-selector, got {shown(metadata.get('format'))}"
        )
    try:
        trained: dict[str, object] = {
            "window": int(metadata["window"]),
            "branches": int(metadata["branches"]),
            "score_pool": metadata["score_pool"],
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: metadata: expected window, branches and score_pool, got {shown(metadata)}"
        ) from error
    try:
        VisionGuidedOptions(**trained)  # type: ignore[arg-type]
    except InputError as error:
        raise CheckpointError(f"{file}: metadata: {error}") from error
    given = VisionGuidedOptions(**options)  # type: ignore[arg-type]
    for key, value in trained.items():
        if key in options and getattr(given, key) != value:
            raise InputError(f"{key}: the selector in {file} was trained with {value!r}, got {getattr(given, key)!r}")
    full = dataclasses.replace(given, **trained)  # type: ignore[arg-type]
    selector = LinearSelector(num_thumbnail_tokens, len(pools_for(full.window, full.branches)), full.score_pool)
    expected = {name: tuple(value.shape) for name, value in selector.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise CheckpointError(f"{file}: expected tensors {expected}, found {shown(found)}")
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise CheckpointError(f"{file}: {name}: expected finite floating-point values, got {value.dtype}")
    selector.load_state_dict(tensors)
    return selector, full


def save_selector(file: Path, selector: LinearSelector, options: VisionGuidedOptions) -> None:
    """Write the file that `load_selector` reads: `weight` [S, G] and `bias` [S], coarse to fine, in float32.

    Equal selectors give equal bytes. Raises InputError for one that `load_selector` would refuse, and OSError.
    """
    metadata = {
        "format": "minifocus-selector",
        "window": str(options.window),
        "branches": str(options.branches),
        "score_pool": options.score_pool,
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in selector.state_dict().items()}
    branches = len(pools_for(options.window, options.branches))
    if tensors["weight"].shape[0] != branches or tensors["bias"].shape != (branches,):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise InputError(f"selector: expected one of {branches} branches, as its options have, got {shapes}")
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"selector.{name}: expected finite values, as float32, got others")
    file.write_bytes(_in_order(serialise(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: the library writes metadata in a random one."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:begin]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as the library aligns the values
    return len(header).to_bytes(8, "little") + header + content[begin:]


def balance_loss(logits: torch.Tensor, alpha: float = 0.1, weights: torch.Tensor | None = None) -> torch.Tensor:
    """α Σ_s w_s f_s P_s (Eq. 3 to 5; with weights, which sum to S, Eq. 10) over the logits [R, S] of a micro-batch.

    f_s is the share of regions whose largest logit is s, P_s the mean probability of s.
    """
    branches = logits.shape[-1]
    share = F.one_hot(logits.argmax(dim=-1), branches).float().mean(dim=0)
    probability = logits.softmax(dim=-1).mean(dim=0)
    weights = torch.ones_like(probability) if weights is None else weights
    return alpha * (weights * share * probability).sum()


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
        if isinstance(selector, LinearSelector) and selector.score_pool == "max" and not self.training:
            context, bias = selector.fold(thumbnail)[None], selector.bias.to(wide(x.dtype))
            tokens, source, offsets, choice = region_route(cells, grid, context, bias, window, pools)
        else:
            logits = selector(*split_regions(x, window), thumbnail)
            choice = logits.argmax(dim=-1)
            weight = self._weight(logits, choice, x.dtype) if self.training else None
            tokens, source, offsets = region_pool(cells, grid, choice, window, pools, weight)
        extent = torch.tensor(pools, device=choice.device)[choice.repeat_interleave(offsets.diff())]
        (height, width), across = x.shape[:2], max(x.shape[1], 1)
        left = torch.stack(
            [height - source // across, width - source % across], dim=-1
        )  # from there to the map's edges
        extent = extent.minimum(left)
        return _SampledMap(tokens, source, extent, offsets, choice, logits)

    def _weight(self, logits: torch.Tensor, choice: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What a region's tokens are multiplied by in training (Eq. 2): its branch's probability."""
        chosen = logits.softmax(dim=-1).gather(1, choice[:, None]).squeeze(1)
        factor = chosen / chosen.detach() if self.options.straight_through else chosen
        return factor.to(wide(dtype))

    def forward(self, picture: PictureFeatures, text: torch.Tensor) -> VisualTokens:
        """Compress the map (and, if so asked, the thumbnail); `text` is not looked at."""
        layout = picture.layout
        down, across = num_regions((layout.height, layout.width), self.options.window)
        sampled = self.sample_map(picture.map, picture.thumbnail)
        source, logits = layout.of_cells(sampled.cells), sampled.logits

        leading = 0 if self.options.thumbnail == "drop" else layout.leading
        places = torch.arange(leading, device=source.device)
        pieces = [(picture.leading[:leading], places, places.new_ones(leading, 2))]
        if self.options.thumbnail == "compress":
            small = self.sample_map(picture.thumbnail, picture.thumbnail)
            pieces = [(small.tokens, small.cells, small.extent)]
            if logits is not None and small.logits is not None:
                logits = torch.cat([logits, small.logits])

        lengths = [len(tokens) for tokens, _, _ in pieces]
        newlines = []  # their places in the compressed sequence
        row_bounds = sampled.offsets[:: max(across, 1)].tolist() if across else [0] * (down + 1)
        for row in range(down):
            own = slice(row_bounds[row], row_bounds[row + 1])
            pieces.append((sampled.tokens[own], source[own], sampled.extent[own]))
            lengths.append(len(source[own]))
            if picture.newline is not None:
                place = layout.of_newline(min((row + 1) * self.options.window, layout.height) - 1)
                newlines.append(sum(lengths))
                pieces.append(
                    (picture.newline[None].to(sampled.tokens.dtype), source.new_tensor([place]), source.new_ones(1, 2))
                )
                lengths.append(1)
        tokens, sources, extents = (torch.cat(columns) for columns in zip(*pieces, strict=True))
        newline = torch.zeros(len(sources), dtype=torch.bool, device=sources.device)
        newline[newlines] = True
        return VisualTokens(tokens, sources, newline, extents, layout, sampled.choice.view(down, across), logits)


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
