"""The samplers' operators in plain PyTorch, written to be read: the meaning that faster versions are held to.

Ragged batches are packed along the first axis with `cu_seqlens`-style offsets, as FlashAttention's varlen calls are:
item b holds rows offsets[b] to offsets[b + 1]. Ties go to the lower index everywhere; NaN propagates through a
maximum and ranks as the largest score.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

Pool = tuple[int, int]
DROP: Pool = (0, 0)  # the branch that leaves no token at all (window 1 of Table 4: keep or drop)


def num_regions(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """How many window×window regions, partial ones included, cover a map of grid = (H, W)."""
    return -(-grid[0] // window), -(-grid[1] // window)


def split_regions(x: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A map [H, W, C] → its regions [R, w, w, C] in raster order and which of their cells exist, bool [R, w, w].

    Cells beyond the map hold -inf, so that they never win a maximum.
    """
    height, width, channels = x.shape
    down, across = num_regions((height, width), window)
    padding = (0, 0, 0, across * window - width, 0, down * window - height)
    padded = F.pad(x, padding, value=float("-inf"))
    exists = F.pad(torch.ones(height, width, dtype=torch.bool, device=x.device), padding[2:])
    regions = padded.view(down, window, across, window, channels).transpose(1, 2).reshape(-1, window, window, channels)
    return regions, exists.view(down, window, across, window).transpose(1, 2).reshape(-1, window, window)


def region_pool(
    x: torch.Tensor, grid_hw: torch.Tensor, choice: torch.Tensor, window: int, pools: list[Pool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Max-pool every region by its chosen branch (paper Eq. 1).

    x        [cells, C]   the maps of B pictures, each in raster order, one after another
    grid_hw  [B, 2]       int64, (H, W) of each map
    choice   [regions]    int64, the branch of each region, in raster order per picture
    pools    (ph, pw) of each branch; DROP yields no token

    Returns tokens [n, C], region after region and in raster order inside a region; source [n] int64, the cell of its
    picture, in raster order, where each token's window begins; offsets [regions + 1] int64 into tokens. At ragged edges
    a window takes the maximum over the cells that exist; a window without any yields no token.
    """
    tokens, sources, counts = [], [], []
    cell = region = 0
    for height, width in grid_hw.tolist():
        down, across = num_regions((height, width), window)
        picture = x[cell : cell + height * width].view(height, width, x.shape[1])
        regions, exists = split_regions(picture, window)
        numbers = torch.arange(height * width, device=x.device).view(height, width, 1)
        cells = split_regions(numbers.double(), window)[0].squeeze(-1)
        chosen = choice[region : region + down * across]
        pieces, piece_regions, piece_sources = [], [], []
        for branch, (ph, pw) in enumerate(pools):
            index = (chosen == branch).nonzero().squeeze(1)
            if (ph, pw) == DROP or not len(index):
                continue
            windows = regions[index].unflatten(2, (window // pw, pw)).unflatten(1, (window // ph, ph))
            pooled = windows.amax(dim=(2, 4)).flatten(1, 2)  # [regions, windows, C]
            alive = exists[index][:, ::ph, ::pw].flatten(1)  # a window exists where its first cell does
            pieces.append(pooled[alive])
            piece_sources.append(cells[index][:, ::ph, ::pw].flatten(1)[alive].long())
            piece_regions.append(index[:, None].expand_as(alive)[alive])
        if pieces:
            owner = torch.cat(piece_regions)
            order = owner.argsort(stable=True)
            tokens.append(torch.cat(pieces)[order])
            sources.append(torch.cat(piece_sources)[order])
            counts.append(owner.bincount(minlength=down * across))
        else:
            counts.append(torch.zeros(down * across, dtype=torch.int64, device=x.device))
        cell += height * width
        region += down * across
    offsets = F.pad(torch.cat(counts).cumsum(0) if counts else x.new_zeros(0, dtype=torch.int64), (1, 0))
    if not tokens:
        return x[:0], offsets.new_zeros(0), offsets
    return torch.cat(tokens), torch.cat(sources), offsets


def importance(
    q: torch.Tensor, k: torch.Tensor, cu_text: torch.Tensor, cu_visual: torch.Tensor, scale: float
) -> torch.Tensor:
    """How much the text of each item attends to each of its visual tokens (paper Eq. 7 and 8).

    q [text tokens, H, D], k [visual tokens, Hkv, D], offsets [items + 1] int64. For each item: softmax of scale·q·kᵀ over
    its visual tokens, maximum over the query heads, mean over its text tokens, in float32. Returns float32
    [visual tokens]; an item without text scores 0.
    """
    groups = q.shape[1] // k.shape[1]
    scores = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    text, visual = cu_text.tolist(), cu_visual.tolist()
    for (t0, t1), (v0, v1) in zip(itertools.pairwise(text), itertools.pairwise(visual), strict=True):
        if t0 == t1 or v0 == v1:
            continue
        queries = q[t0:t1].transpose(0, 1).float()  # [H, T, D]
        keys = k[v0:v1].transpose(0, 1).float().repeat_interleave(groups, dim=0)  # [H, N, D]
        attention = (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1)
        scores[v0:v1] = attention.amax(dim=0).mean(dim=0)
    return scores


def select_top_p(
    scores: torch.Tensor, cu_visual: torch.Tensor, gamma: float = 0.0, keep: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most important tokens of each item (paper Eq. 9).

    Sorts each item's scores in descending order, equal ones by index, and keeps the shortest prefix whose share of the
    total is more than `gamma`: at least one, and all where no prefix is. With `keep`, the first min(keep, N) instead.
    Returns the kept indices into `scores`, ascending within each item (int64), and their count per item [items].
    """
    kept, counts = [], []
    bounds = cu_visual.tolist()
    for begin, end in itertools.pairwise(bounds):
        item = scores[begin:end].double()
        order = item.argsort(descending=True, stable=True)  # NaN first
        if keep is not None:
            count = min(keep, len(item))
        elif gamma >= 1:
            count = len(item)
        else:
            share = item[order].cumsum(0) / item.sum()
            enough = share > max(gamma, 0.0)
            count = int(enough.to(torch.uint8).argmax()) + 1 if bool(enough.any()) else len(item)
            if gamma <= 0:
                count = min(1, len(item))
        kept.append(begin + order[:count].sort().values)
        counts.append(count)
    index = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64, device=scores.device)
    return index, torch.tensor(counts, dtype=torch.int64, device=scores.device)
