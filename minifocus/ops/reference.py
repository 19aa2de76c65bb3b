"""The samplers' operators in plain PyTorch, written to be read: the meaning that the C++ and CUDA versions are held to.

Ragged batches are packed along the first axis with `cu_seqlens`-style offsets, as FlashAttention's varlen calls are:
item b holds rows offsets[b] to offsets[b + 1]. Ties go to the lower index everywhere; NaN propagates through a
maximum and ranks as the largest score. A wrong argument raises RuntimeError (see `checks.py`).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from . import checks

Pool = tuple[int, int]
DROP: Pool = (0, 0)  # the branch that leaves no token at all (window 1 of Table 4: keep or drop)


def num_regions(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """How many window×window regions, partial ones included, cover a map of grid = (H, W)."""
    return -(-grid[0] // window), -(-grid[1] // window)


def split_regions(x: torch.Tensor, window: int, beyond: float = float("-inf")) -> tuple[torch.Tensor, torch.Tensor]:
    """A map [H, W, C] → its regions [R, w, w, C] in raster order and which of their cells exist, bool [R, w, w].

    Cells beyond the map hold `beyond`: -inf, so that they never win a maximum.
    """
    height, width, channels = x.shape
    down, across = num_regions((height, width), window)
    padding = (0, 0, 0, across * window - width, 0, down * window - height)
    padded = F.pad(x, padding, value=beyond)
    exists = F.pad(torch.ones(height, width, dtype=torch.bool, device=x.device), padding[2:])
    regions = padded.view(down, window, across, window, channels).transpose(1, 2)
    exists = exists.view(down, window, across, window).transpose(1, 2)
    # A copy in any case: whether one is needed depends on the sizes, which export does not know.
    regions, exists = (one.clone(memory_format=torch.contiguous_format).flatten(0, 1) for one in (regions, exists))
    return regions, exists


def _pool(
    x: torch.Tensor, grid_hw: torch.Tensor, choice: torch.Tensor, window: int, pools: list[Pool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ pooled [n, C]; the row of x that each value is from [n, C]; source [n]; the region of each token [n]."""
    pooled, rows, sources, owners = [x[:0]], [x[:0].long()], [choice[:0]], [choice[:0]]
    cell = region = 0
    for height, width in grid_hw.tolist():
        if height * width == 0:  # without a region, but a side may be too long for any padding
            continue
        cells = torch.arange(height * width, device=x.device).view(height, width, 1)
        values, exists = split_regions(x[cell : cell + height * width].view(height, width, x.shape[1]), window)
        cells = split_regions(cells, window, beyond=-1)[0]
        chosen = choice[region : region + len(values)]
        for branch, (ph, pw) in enumerate(pools):
            index = (chosen == branch).nonzero().squeeze(1)
            if (ph, pw) == DROP or not len(index):
                continue

            def windows(regions: torch.Tensor, ph: int = ph, pw: int = pw) -> torch.Tensor:
                """[R, w, w, C] → [R, windows of a region, cells of a window, C]"""
                split = regions.unflatten(2, (window // pw, pw)).unflatten(1, (window // ph, ph))
                return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)

            value, winner = windows(values[index]).max(dim=2)  # the first maximum, and the first NaN
            numbers = windows(cells[index]).squeeze(3)
            alive = windows(exists[index].unsqueeze(3))[:, :, 0, 0]  # a window exists where its first cell does
            pooled.append(value[alive])
            rows.append(cell + numbers.gather(2, winner)[alive])
            sources.append(numbers[:, :, 0][alive])
            owners.append(region + index[:, None].expand_as(alive)[alive])
        cell += height * width
        region += len(values)
    owner = torch.cat(owners)
    order = owner.argsort(stable=True)
    return torch.cat(pooled)[order], torch.cat(rows)[order], torch.cat(sources)[order], owner[order]


def region_pool(
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    choice: torch.Tensor,
    window: int,
    pools: list[Pool],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Max-pool every region by its chosen branch (paper Eq. 1) and weigh it by the branch's probability (Eq. 2).

    x        [cells, C]   the maps of B pictures, each in raster order, one after another
    grid_hw  [B, 2]       int64 on the CPU, (H, W) of each map
    choice   [regions]    int64, the branch of each region, in raster order per picture
    pools    (ph, pw) of each branch; DROP yields no token
    weight   [regions]    float32 (float64 with a float64 x): tokens are multiplied by their region's

    Returns tokens [n, C], region after region and in raster order inside a region; source [n] int64, the cell of its
    picture, in raster order, where each token's window begins; offsets [regions + 1] int64 into tokens. At ragged edges
    a window takes the maximum over the cells that exist; a window without any yields no token.
    """
    checks.region_pool(x, grid_hw, choice, window, pools, weight)
    tokens, _, source, owner = _pool(x, grid_hw, choice, window, pools)
    if weight is not None:
        tokens = tokens * weight.to(x.dtype)[owner, None]
    return tokens, source, F.pad(owner.bincount(minlength=len(choice)).cumsum(0), (1, 0))


def region_pool_backward(
    grad_tokens: torch.Tensor,
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    choice: torch.Tensor,
    window: int,
    pools: list[Pool],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """grad_tokens [n, C] → the gradients of x [cells, C], at the first maximum of each window, and of weight [regions]."""
    checks.region_pool(x, grid_hw, choice, window, pools, weight)
    pooled, rows, _, owner = _pool(x, grid_hw, choice, window, pools)
    checks.tensor("grad_tokens", grad_tokens, [x.dtype], list(pooled.shape), x.device)
    grad = grad_tokens if weight is None else grad_tokens * weight.to(x.dtype)[owner, None]
    grad_x = torch.zeros_like(x).scatter(0, rows, grad)  # windows do not overlap: no cell is written twice
    if weight is None:
        return grad_x, None
    products = (grad_tokens.to(weight.dtype) * pooled.to(weight.dtype)).sum(dim=1)
    return grad_x, torch.zeros_like(weight).index_add(0, owner, products)


def region_route(
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    context: torch.Tensor,
    bias: torch.Tensor,
    window: int,
    pools: list[Pool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose every region's branch by the folded selector (§3.2), z = max over the region · context + bias, and pool it.

    x, grid_hw, window, pools as in `region_pool`; context [B, S, C], the selector's weights times the picture's thumbnail
    over √C, and bias [S], both float32 (float64 with a float64 x). Returns what `region_pool` does, and choice
    [regions] int64, the argmax of z: the lowest index where several are equal, the first NaN where there is one.
    """
    checks.region_route(x, grid_hw, context, bias, window, pools)
    choices, cell = [grid_hw.new_zeros(0, device=x.device)], 0
    for own, (height, width) in zip(context, grid_hw.tolist(), strict=True):
        if height * width == 0:
            continue
        regions, _ = split_regions(x[cell : cell + height * width].view(height, width, x.shape[1]), window)
        pooled = regions.flatten(1, 2).amax(dim=1).to(context.dtype)
        choices.append((pooled @ own.T + bias).argmax(dim=-1))
        cell += height * width
    choice = torch.cat(choices)
    return *region_pool(x, grid_hw, choice, window, pools), choice


def importance(
    q: torch.Tensor, k: torch.Tensor, cu_text: torch.Tensor, cu_visual: torch.Tensor, scale: float
) -> torch.Tensor:
    """How much the text of each item attends to each of its visual tokens (paper Eq. 7 and 8).

    q [text tokens, H, D], k [visual tokens, Hkv, D], offsets [items + 1] int64. For each item: softmax of scale·q·kᵀ over
    its visual tokens, maximum over the query heads, mean over its text tokens, in float32 (float64 if q is). Returns
    [visual tokens] of that type; an item without text scores 0.
    """
    checks.importance(q, k, cu_text, cu_visual)
    groups = q.shape[1] // k.shape[1]
    dtype = checks.wide(q.dtype)
    scores = torch.zeros(len(k), dtype=dtype, device=k.device)
    text, visual = cu_text.tolist(), cu_visual.tolist()
    for (t0, t1), (v0, v1) in zip(itertools.pairwise(text), itertools.pairwise(visual), strict=True):
        if t0 == t1 or v0 == v1:
            continue
        queries = q[t0:t1].transpose(0, 1).to(dtype)  # [H, T, D]
        keys = k[v0:v1].transpose(0, 1).to(dtype).repeat_interleave(groups, dim=0)  # [H, N, D]
        attention = (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1)
        scores[v0:v1] = attention.amax(dim=0).mean(dim=0)
    return scores


def select_top_p(
    scores: torch.Tensor, cu_visual: torch.Tensor, gamma: float = 0.0, keep: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most important tokens of each item (paper Eq. 9).

    Sorts each item's scores in descending order, equal ones by index, and keeps the shortest prefix whose share of the
    total is more than `gamma`: at least one, and all where no prefix is, as for a NaN. A negative score has no share. With
    `keep`, the first min(keep, N) instead. Returns the kept indices into `scores`, ascending within each item (int64), and
    their count per item [items].

    So that every backend cuts at the same token, whatever the order in which it adds, the shares are sums of whole
    numbers: each score over the largest, in steps so fine that the sum of all of them is just below 2^53.
    """
    checks.select_top_p(scores, cu_visual, keep)
    kept, counts = [scores[:0].long()], []
    for begin, end in itertools.pairwise(cu_visual.tolist()):
        item = scores[begin:end].double()
        order = item.argsort(descending=True, stable=True)  # NaN first
        count = len(item)
        if keep is not None:
            count = min(keep, count)
        elif count and gamma <= 0:
            count = 1
        elif count and gamma < 1:
            positive = item.clamp(min=0)
            steps = (positive / positive.max() * 2.0 ** (52 - count.bit_length())).round()
            enough = (
                steps[order].cumsum(0) > gamma * steps.sum()
            )  # False for NaN: a NaN or infinite score, or only zeros
            count = int(enough.to(torch.uint8).argmax()) + 1 if bool(enough.any()) else count
        kept.append(begin + order[:count].sort().values)
        counts.append(count)
    return torch.cat(kept), torch.tensor(counts, dtype=torch.int64, device=scores.device)


def gather_tokens(columns: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
    """The rows `index` [n] (int64) of every column [rows, …], the same of each; -1 gives a row of zeros."""
    checks.gather_tokens(columns, index)
    real = index >= 0
    gathered = []
    for column in columns:
        rows = column.new_zeros(len(index), *column.shape[1:])
        rows[real] = column[index[real]]
        gathered.append(rows)
    return gathered
