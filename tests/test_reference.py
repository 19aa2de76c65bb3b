"""The operators in plain PyTorch against loops over scalars that say what the paper says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minifocus.reference import importance, num_regions, region_pool, select_top_p
from minifocus.samplers.vision_guided import pools_for

WINDOWS_AND_BRANCHES = [(1, 3), (2, 3), (2, 7), (4, 3), (4, 7), (8, 3), (8, 7), (12, 3), (12, 7)]


def brute_force_pool(x, grid, choice, window, pools):
    """x [H, W, C] as nested loops: region by region, window by window, over the cells that exist."""
    height, width = grid
    tokens, source, counts = [], [], []
    regions = [(r, c) for r in range(0, height, window) for c in range(0, width, window)]
    for (top, left), branch in zip(regions, choice, strict=True):
        ph, pw = pools[branch]
        before = len(tokens)
        for r in range(top, top + window, ph) if ph else []:
            for c in range(left, left + window, pw):
                cells = [(i, j) for i in range(r, r + ph) for j in range(c, c + pw) if i < height and j < width]
                if cells:
                    tokens.append([max_or_nan(x[i][j][k] for i, j in cells) for k in range(len(x[0][0]))])
                    source.append(cells[0][0] * width + cells[0][1])
        counts.append(len(tokens) - before)
    return tokens, source, counts


def max_or_nan(values):
    values = list(values)
    return math.nan if any(math.isnan(v) for v in values) else max(values)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=0, max_size=3),
    st.integers(1, 3),
    st.sampled_from(WINDOWS_AND_BRANCHES),
    st.integers(0, 2**31),
    st.sampled_from(["random", "few values", "infinite", "nan"]),
)
def test_region_pool_is_the_maximum_over_existing_cells(grids, channels, setting, seed, pattern):
    window, branches = setting
    pools = pools_for(window, branches)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(h * w for h, w in grids), channels, generator=generator)
    if pattern == "few values":
        x = x.round()
    if pattern == "infinite":
        x[torch.rand(x.shape, generator=generator) < 0.3] = -math.inf
    if pattern == "nan":
        x[torch.rand(x.shape, generator=generator) < 0.2] = math.nan
    regions = [math.prod(num_regions(grid, window)) for grid in grids]
    choice = torch.randint(len(pools), (sum(regions),), generator=generator)

    tokens, source, offsets = region_pool(x, torch.tensor(grids).view(-1, 2), choice, window, pools)

    expected_tokens, expected_source, expected_counts, cell, region = [], [], [], 0, 0
    for (height, width), count in zip(grids, regions, strict=True):
        nested = x[cell : cell + height * width].view(height, width, channels).tolist()
        t, s, c = brute_force_pool(nested, (height, width), choice[region : region + count].tolist(), window, pools)
        expected_tokens, expected_source, expected_counts = (
            expected_tokens + t,
            expected_source + s,
            expected_counts + c,
        )
        cell, region = cell + height * width, region + count
    assert source.tolist() == expected_source
    assert offsets.diff().tolist() == expected_counts
    assert torch.equal(tokens.nan_to_num(nan=1e9), torch.tensor(expected_tokens).view(-1, channels).nan_to_num(nan=1e9))


@pytest.mark.parametrize(
    "window, branches, most", [(4, 3, 16), (4, 7, 16), (8, 3, 64), (12, 7, 144), (2, 3, 4), (1, 3, 1)]
)
def test_tokens_of_a_full_region(window, branches, most):
    """1, 4, 16 tokens of a 4×4 region with three branches; 1, 2, 2, 4, 8, 8, 16 with seven (spec's table)."""
    pools = pools_for(window, branches)
    counts = []
    for branch in range(len(pools)):
        choice = torch.tensor([branch])
        tokens, _, _ = region_pool(torch.randn(window**2, 2), torch.tensor([[window, window]]), choice, window, pools)
        counts.append(len(tokens))
    assert counts[-1] == most
    if window == 4:
        assert counts == ([1, 4, 16] if branches == 3 else [1, 2, 2, 4, 8, 8, 16])
    if window == 1:
        assert counts == [0, 1]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)]),
    st.integers(0, 2**31),
)
def test_importance_is_eq_7_and_8(items, heads, seed):
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(t for t, _ in items), num_heads, 3, generator=generator)
    k = torch.randn(sum(n for _, n in items), num_kv_heads, 3, generator=generator)
    cu_text = torch.tensor([0, *(t for t, _ in items)]).cumsum(0)
    cu_visual = torch.tensor([0, *(n for _, n in items)]).cumsum(0)
    scale = 0.7

    expected = []
    for item, (texts, visuals) in enumerate(items):
        own_q, own_k = q[cu_text[item] :][:texts].tolist(), k[cu_visual[item] :][:visuals].tolist()
        for n in range(visuals):
            total = 0.0
            for t in range(texts):
                best = 0.0
                for h in range(num_heads):

                    def dot(m, t=t, h=h, own_q=own_q, own_k=own_k):
                        keys = own_k[m][h // (num_heads // num_kv_heads)]
                        return scale * sum(a * b for a, b in zip(own_q[t][h], keys, strict=True))

                    best = max(best, math.exp(dot(n)) / sum(math.exp(dot(m)) for m in range(visuals)))
                total += best
            expected.append(total / texts if texts else 0.0)
    got = importance(q, k, cu_text, cu_visual, scale)
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-5)


def brute_force_select(scores, gamma, keep):
    """Eq. 9 for one item of plain numbers without NaN."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if keep is not None:
        return sorted(order[:keep])
    for count in range(1, len(scores) + 1):
        if sum(scores[i] for i in order[:count]) > gamma * sum(scores):
            return sorted(order[:count])
    return list(range(len(scores)))


@settings(deadline=None, max_examples=200)
@given(
    # Eighths add up exactly, so that the share is the same number however it is summed.
    st.lists(st.lists(st.integers(0, 16).map(lambda n: n / 8), max_size=12), min_size=1, max_size=3),
    st.sampled_from([0.25, 0.5, 0.75, 0.875]),
    st.one_of(st.none(), st.integers(1, 14)),
)
def test_select_top_p_is_the_shortest_prefix_above_gamma(items, gamma, keep):
    cu = torch.tensor([0, *map(len, items)]).cumsum(0)
    index, counts = select_top_p(torch.tensor([s for item in items for s in item]), cu, gamma, keep)
    expected = [brute_force_select(item, gamma, keep) for item in items]
    assert counts.tolist() == [len(e) for e in expected]
    assert index.tolist() == [int(begin) + i for begin, e in zip(cu, expected, strict=False) for i in e]


@pytest.mark.parametrize(
    "scores, gamma, expected",
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 1, 2]),  # exactly γ is not enough: strictly more
        ([1.0, 1.0, 1.0, 1.0], 0.4, [0, 1]),  # ties: the lower index first
        ([0.0, 0.0], 0.5, [0, 1]),  # no prefix exceeds: all
        ([1.0, 2.0], 1.0, [0, 1]),
        ([1.0, 2.0], 1.5, [0, 1]),
        ([1.0, 2.0], 0.0, [1]),
        ([1.0, 2.0], -1.0, [1]),
        ([], 0.5, []),
        ([], 0.0, []),
        ([1.0, math.nan, 2.0], 0.1, [0, 1, 2]),  # a NaN total keeps everything
    ],
)
def test_select_top_p_at_the_edges(scores, gamma, expected):
    index, counts = select_top_p(torch.tensor(scores), torch.tensor([0, len(scores)]), gamma)
    assert index.tolist() == expected
    assert counts.tolist() == [len(expected)]


def test_nan_ranks_as_the_largest_score():
    index, _ = select_top_p(torch.tensor([9.0, math.nan, math.inf, math.nan]), torch.tensor([0, 4]), keep=2)
    assert index.tolist() == [1, 3]
