"""The operators in plain PyTorch against loops over scalars that say what the paper and the operators' specification say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minifocus.ops import reference
from minifocus.samplers.vision_guided import pools_for
from minifocus.testing import Attention, Gather, Regions, Selection, attentions, gathers, regions, selections

pytestmark = pytest.mark.usefixtures("one_thread")
FINITE = ["random", "few", "equal", "uniform", "zeros", "denormal"]


def is_larger(value: float, than: float) -> bool:
    """The rule of every maximum: the first of equal ones stays, the first NaN wins."""
    return value > than or (math.isnan(value) and not math.isnan(than))


def rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64).to(dtype).item()


def bits(value: float) -> str:
    """Tells -0 from 0, and not one NaN from another."""
    return "nan" if math.isnan(value) else value.hex()


def windows_of(drawn: Regions, choice: list[int]):
    """Each token's window as (region, cell of its picture where it begins, its existing cells among all cells)."""
    first_cell = region = 0
    for height, width in drawn.grids:
        for top in range(0, height, drawn.window):
            for left in range(0, width, drawn.window):
                ph, pw = drawn.pools[choice[region]]
                for r in range(top, top + drawn.window, ph) if ph else []:
                    for c in range(left, left + drawn.window, pw):
                        inside = [
                            (i, j) for i in range(r, r + ph) for j in range(c, c + pw) if i < height and j < width
                        ]
                        if inside:
                            yield region, r * width + c, [first_cell + i * width + j for i, j in inside]
                region += 1
        first_cell += height * width


def winner_of(cells: list[int], channel: int, x: list[list[float]]) -> int:
    best = cells[0]
    for cell in cells[1:]:
        if is_larger(x[cell][channel], x[best][channel]):
            best = cell
    return best


@given(regions(most=200))
def test_region_pool_is_the_maximum_over_existing_cells(drawn: Regions) -> None:
    x, grid_hw, choice, window, _, weight = drawn.arguments()
    tokens, source, offsets = reference.region_pool(x, grid_hw, choice, window, list(drawn.pools), weight)

    numbers, expected, begins, counts = x.tolist(), [], [], [0] * drawn.regions
    for region, begin, cells in windows_of(drawn, choice.tolist()):
        factor = 1.0 if weight is None else rounded(weight[region].item(), x.dtype)
        for channel in range(drawn.channels):
            largest = numbers[winner_of(cells, channel, numbers)][channel]
            expected.append(bits(rounded(largest * factor, x.dtype)))
        begins.append(begin)
        counts[region] += 1
    assert source.tolist() == begins
    assert offsets.tolist() == [sum(counts[:region]) for region in range(drawn.regions + 1)]
    assert tokens.dtype == x.dtype
    assert [bits(value) for value in tokens.flatten().tolist()] == expected


@given(regions(most=200))
def test_the_gradient_goes_to_the_first_maximum_of_each_window(drawn: Regions) -> None:
    grad_tokens, x, grid_hw, choice, offsets, window, _, weight = drawn.backward_arguments()
    grad_tokens = grad_tokens[: int(offsets[-1])]
    grad_x, grad_weight = reference.region_pool_backward(
        grad_tokens, x, grid_hw, choice, window, list(drawn.pools), weight
    )

    numbers, grads = x.tolist(), grad_tokens.tolist()
    expected = [[0.0] * drawn.channels for _ in range(drawn.cells)]
    expected_weight = [0.0] * drawn.regions
    for token, (region, _, cells) in enumerate(windows_of(drawn, choice.tolist())):
        factor = 1.0 if weight is None else rounded(weight[region].item(), x.dtype)
        for channel in range(drawn.channels):
            cell = winner_of(cells, channel, numbers)
            expected[cell][channel] = rounded(grads[token][channel] * factor, x.dtype)
            expected_weight[region] += grads[token][channel] * numbers[cell][channel]
    assert [[bits(v) for v in row] for row in grad_x.tolist()] == [[bits(v) for v in row] for row in expected]
    if weight is None:
        assert grad_weight is None
    elif drawn.pattern != "huge":  # whose sums may cancel or overflow
        exact = torch.tensor(expected_weight, dtype=torch.float64)
        torch.testing.assert_close(grad_weight.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def brute_force_choice(drawn: Regions) -> list[int]:
    x, _, context, bias, *_ = drawn.route_arguments()
    numbers, contexts, biases, choices = x.tolist(), context.tolist(), bias.tolist(), []
    whole = replace(drawn, pools=((drawn.window, drawn.window),))
    pictures = [i for i, (h, w) in enumerate(drawn.grids) for _ in range(-(-h // drawn.window) * -(-w // drawn.window))]
    for region, _, cells in windows_of(whole, [0] * drawn.regions):
        pooled = [numbers[winner_of(cells, channel, numbers)][channel] for channel in range(drawn.channels)]
        best, best_logit = 0, math.nan
        for branch, own_bias in enumerate(biases):
            own = contexts[pictures[region]][branch]
            logit = sum((p * c for p, c in zip(pooled, own, strict=True)), start=0.0) + own_bias
            if branch == 0 or is_larger(logit, best_logit):
                best, best_logit = branch, logit
        choices.append(best)
    return choices


# "equal": whether equal logits are equal to the bit depends on the order of the additions.
@given(regions(dtypes=[torch.float64], most=200).filter(lambda drawn: drawn.pattern != "equal"))
def test_region_route_chooses_the_largest_logit(drawn: Regions) -> None:
    x, grid_hw, context, bias, window, _ = drawn.route_arguments()
    *pooled, choice = reference.region_route(x, grid_hw, context, bias, window, list(drawn.pools))
    assert choice.tolist() == brute_force_choice(drawn)
    expected = reference.region_pool(x, grid_hw, choice, window, list(drawn.pools))
    for got, own in zip(pooled, expected, strict=True):
        assert torch.equal(got.nan_to_num(), own.nan_to_num())


@given(regions(most=200), st.sampled_from(["few", "zeros"]))
def test_region_route_takes_the_first_of_equal_logits(drawn: Regions, pattern: str) -> None:
    """Sums of such numbers are exact in every dtype."""
    drawn = replace(drawn, pattern=pattern)
    x, grid_hw, context, bias, window, _ = drawn.route_arguments()
    assert reference.region_route(x, grid_hw, context, bias, window, list(drawn.pools))[
        3
    ].tolist() == brute_force_choice(drawn)


@pytest.mark.parametrize(
    "window, branches, most", [(4, 3, 16), (4, 7, 16), (8, 3, 64), (12, 7, 144), (2, 3, 4), (1, 3, 1)]
)
def test_tokens_of_a_full_region(window: int, branches: int, most: int) -> None:
    """1, 4, 16 tokens of a 4×4 region with three branches; 1, 2, 2, 4, 8, 8, 16 with seven (spec's table)."""
    pools = pools_for(window, branches)
    counts = []
    for branch in range(len(pools)):
        choice = torch.tensor([branch])
        tokens, _, _ = reference.region_pool(
            torch.randn(window**2, 2), torch.tensor([[window, window]]), choice, window, pools
        )
        counts.append(len(tokens))
    assert counts[-1] == most
    if window == 4:
        assert counts == ([1, 4, 16] if branches == 3 else [1, 2, 2, 4, 8, 8, 16])
    if window == 1:
        assert counts == [0, 1]


@given(attentions(most=3000))
def test_importance_is_eq_7_and_8(drawn: Attention) -> None:
    assume(drawn.pattern in FINITE)
    q, k, cu_text, cu_visual, scale = drawn.arguments()
    queries, keys, per_key, expected = q.tolist(), k.tolist(), drawn.heads // drawn.kv_heads, []
    t0 = v0 = 0
    for texts, visuals in drawn.lengths:
        total = [0.0] * visuals
        for t in range(t0, t0 + texts):
            largest = [0.0] * visuals
            for head in range(drawn.heads):
                own = [keys[v][head // per_key] for v in range(v0, v0 + visuals)]
                logits = [scale * sum(a * b for a, b in zip(queries[t][head], key, strict=True)) for key in own]
                powers = [math.exp(logit - max(logits)) for logit in logits]
                largest = [max(m, power / sum(powers)) for m, power in zip(largest, powers, strict=True)]
            total = [a + b for a, b in zip(total, largest, strict=True)]
        expected += [score / texts if texts else 0.0 for score in total]
        t0, v0 = t0 + texts, v0 + visuals
    got = reference.importance(q, k, cu_text, cu_visual, scale)
    assert got.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if q.dtype == torch.float64 else 1e-5
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=10 * tolerance, atol=tolerance)


def test_a_nan_makes_its_whole_item_nan_and_no_other() -> None:
    q, k = torch.randn(2, 2, 4), torch.randn(5, 1, 4)
    k[3, 0, 1] = math.nan
    scores = reference.importance(q, k, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 5]), 1.0)
    assert scores.isnan().tolist() == [False, False, True, True, True]


def brute_force_select(scores: list[float], gamma: float, keep: int | None) -> list[int]:
    """Eq. 9 for one item, on whole numbers: scores over the largest in steps of 2^(bit length of N − 52)."""
    order = sorted(range(len(scores)), key=lambda i: (0, 0, i) if math.isnan(scores[i]) else (1, -scores[i], i))
    if keep is not None:
        return sorted(order[:keep])
    if gamma <= 0:
        return order[:1]
    shares = [score if math.isnan(score) else max(score, 0.0) for score in scores]  # a negative score has none
    if not all(map(math.isfinite, shares)) or not any(shares) or not gamma < 1:
        return list(range(len(scores)))
    whole = [round(share / max(shares) * 2.0 ** (52 - len(scores).bit_length())) for share in shares]
    enough, prefix = gamma * float(sum(whole)), 0
    for count, i in enumerate(order, start=1):
        prefix += whole[i]
        if prefix > enough:
            return sorted(order[:count])
    return list(range(len(scores)))


@given(selections(most=80))
def test_select_top_p_is_the_shortest_prefix_above_gamma(drawn: Selection) -> None:
    scores, cu_visual, gamma, keep = drawn.arguments()
    index, count = reference.select_top_p(scores, cu_visual, gamma, keep)
    expected, counts, begin = [], [], 0
    for length in drawn.lengths:
        kept = brute_force_select(scores[begin : begin + length].tolist(), gamma, keep)
        expected += [begin + i for i in kept]
        counts.append(len(kept))
        begin += length
    assert index.tolist() == expected
    assert count.tolist() == counts


@pytest.mark.parametrize(
    "scores, gamma, expected",
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 1, 2]),  # exactly γ is not enough: strictly more
        ([1.0, 1.0, 1.0, 1.0], 0.4, [0, 1]),  # ties: the lower index first
        ([0.0, 0.0], 0.5, [0, 1]),  # no prefix exceeds: all
        ([1.0, 2.0], 1.0, [0, 1]),
        ([1.0, 2.0], 1.5, [0, 1]),
        ([1.0, 2.0], math.nan, [0, 1]),
        ([1.0, 2.0], 0.0, [1]),
        ([1.0, 2.0], -1.0, [1]),
        ([], 0.5, []),
        ([], 0.0, []),
        ([1.0, math.nan, 2.0], 0.1, [0, 1, 2]),  # a NaN total keeps everything
        ([1.0, math.inf, 2.0], 0.1, [0, 1, 2]),  # and so does an infinite one
        ([1.0, math.nan, 2.0], 0.0, [1]),  # NaN ranks as the largest
        ([-0.0, 0.0, -0.0], 0.0, [0]),  # -0 and 0 are equal
        ([-3.0, -1.0, -2.0], 0.5, [0, 1, 2]),  # no share is more than half of nothing
        ([-3.0, 2.0, 2.0, -math.inf], 0.5, [1, 2]),  # and negative scores take none from the others
    ],
)
def test_select_top_p_at_the_edges(scores: list[float], gamma: float, expected: list[int]) -> None:
    index, counts = reference.select_top_p(torch.tensor(scores), torch.tensor([0, len(scores)]), gamma)
    assert index.tolist() == expected
    assert counts.tolist() == [len(expected)]


def test_nan_ranks_as_the_largest_score() -> None:
    scores = torch.tensor([9.0, math.nan, math.inf, math.nan])
    index, _ = reference.select_top_p(scores, torch.tensor([0, 4]), keep=2)
    assert index.tolist() == [1, 3]


def bytes_of(row: torch.Tensor) -> list[int]:
    return row.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist()


@given(gathers(most=300))
def test_gather_tokens_copies_rows(drawn: Gather) -> None:
    columns, index = drawn.arguments()
    for column, got in zip(columns, reference.gather_tokens(columns, index), strict=True):
        assert got.dtype == column.dtype
        assert got.shape == (drawn.count, *column.shape[1:])
        for place, row in enumerate(index.tolist()):
            assert bytes_of(got[place]) == bytes_of(torch.zeros_like(got[place]) if row < 0 else column[row])
