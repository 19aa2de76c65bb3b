"""minifocus/testing.py itself: what it draws is awkward enough, and what it checks is seen to fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import python
from hypothesis import Phase, find, given, settings

from minifocus import ops
from minifocus.ops import reference
from minifocus.testing import (
    DTYPES,
    LAYOUTS,
    PATTERNS,
    attentions,
    check_gather,
    check_importance,
    check_region_pool,
    check_region_pool_backward,
    check_region_route,
    check_selection,
    draw_values,
    gathers,
    lay_out,
    regions,
    selections,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RIGHT = SimpleNamespace(**ops.backend.REFERENCE)  # plain PyTorch


def test_the_example_passes() -> None:
    # For OMP_NUM_THREADS see the fixture one_thread.
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/test_your_kernel.py"]
    done = python(*arguments, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


# ----------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_keeps_the_values(layout: str, dtype: torch.dtype) -> None:
    values = draw_values("random", [3, 4, 2], dtype, 0)
    placed = lay_out(values, layout)
    assert torch.equal(placed, values[:1].expand(3, 4, 2) if layout == "expanded" else values)
    assert placed.is_contiguous() == (layout in ("contiguous", "misaligned"))
    if layout == "misaligned":
        assert placed.data_ptr() % 16 != 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (1,), (1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_little_or_nothing(layout: str, shape: tuple[int, ...]) -> None:
    assert torch.equal(lay_out(torch.ones(shape), layout), torch.ones(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_patterns_are_what_they_say(dtype: torch.dtype) -> None:
    drawn = {pattern: draw_values(pattern, [40, 50], dtype, 0) for pattern in PATTERNS}
    assert all(values.dtype == dtype for values in drawn.values())
    assert drawn["nan"].isnan().any()
    assert drawn["infinite"].isposinf().any()
    assert drawn["infinite"].isneginf().any()
    assert drawn["-infinite"].isneginf().float().mean() > 0.7
    assert len(drawn["few"].unique()) <= 17
    assert len(drawn["equal"].unique()) == 1
    assert {str(value) for value in drawn["zeros"].flatten().tolist()} == {"0.0", "-0.0", "1.0", "-1.0"}
    assert 0 < drawn["denormal"].double().abs().max() < torch.finfo(dtype).smallest_normal
    assert drawn["huge"].isfinite().all()
    assert drawn["huge"].double().abs().max() >= min(torch.finfo(dtype).max, 2.0**119)


@pytest.mark.parametrize(
    "strategy, wanted",
    [
        (regions(), lambda d: not d.grids),
        (regions(), lambda d: len(d.grids) == 3 and any(h == 0 < w for h, w in d.grids)),
        (regions(), lambda d: d.regions > 64),
        (regions(), lambda d: d.channels > 1024 and d.cells > 1),
        (regions(), lambda d: d.channels == 0 and d.cells > 1),
        (regions(), lambda d: any(h % d.window and w % d.window and h > d.window for h, w in d.grids)),
        (regions(), lambda d: d.window == 12 and len(d.pools) == 7 and d.cells > 144),
        (attentions(), lambda d: (0, 3) in d.lengths),
        (attentions(), lambda d: (3, 0) in d.lengths),
        (attentions(), lambda d: d.heads == 8 and d.kv_heads == 1 and d.dim > 64 and d.lengths),
        (attentions(), lambda d: any(n > 1000 for _, n in d.lengths)),
        (attentions(), lambda d: any(t > 64 for t, _ in d.lengths)),
        (selections(), lambda d: any(n > 4096 for n in d.lengths)),
        (selections(), lambda d: len(d.lengths) == 3 and 0 in d.lengths),
        (selections(), lambda d: d.keep == 0 and any(d.lengths)),
        (selections(), lambda d: math.isnan(d.gamma)),
        (gathers(), lambda d: d.rows == 0 and d.count > 0),
        (gathers(), lambda d: len(d.columns) == 8),
        (gathers(), lambda d: any(math.prod(shape) > 2000 for _, shape in d.columns) and d.rows > 1),
    ],
)
def test_what_is_drawn_is_awkward(strategy: Any, wanted: Callable[[Any], bool]) -> None:
    find(strategy, wanted, settings=settings(max_examples=5000, phases=[Phase.generate], derandomize=True))


# --------------------------------------------------------------------------------------------------- what is checked


def without_nan(value: torch.Tensor) -> torch.Tensor:
    return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def pool(x, grid_hw, choice, window, pools, weight=None):
    return RIGHT.region_pool(x, grid_hw, choice, window, pools, weight)


def pool_ignoring_nan(x, *rest):
    return pool(without_nan(x), *rest)


def pool_never_below_zero(x, *rest):
    return pool(x.clamp(min=0), *rest)


def pool_without_the_sign_of_zero(x, grid_hw, *rest):
    tokens, source, offsets = pool(x, grid_hw, *rest)
    return tokens + 0.0, source, offsets


def pool_with_weight_not_rounded(x, grid_hw, choice, window, pools, weight=None):
    tokens, source, offsets = pool(x, grid_hw, choice, window, pools)
    if weight is not None:
        count = int(offsets[-1])
        tokens[:count] = (tokens[:count] * weight.repeat_interleave(offsets.diff())[:, None]).to(x.dtype)
    return tokens, source, offsets


def pool_with_source_in_all_pictures(x, grid_hw, choice, *rest):
    tokens, source, offsets = pool(x, grid_hw, choice, *rest)
    return tokens, source.where(source < 0, source + len(grid_hw) - 1), offsets


def pool_with_one_token_too_many(*arguments):
    tokens, source, offsets = pool(*arguments)
    return tokens, source, offsets + (torch.arange(len(offsets)) == len(offsets) - 1)


def backward(*arguments):
    return RIGHT.region_pool_backward(*arguments)


def backward_to_another_maximum(grad_tokens, x, *rest):
    return backward(grad_tokens, x.nan_to_num(), *rest)


def backward_without_weight(*arguments):
    return backward(*arguments[:-1])[0], backward(*arguments)[1]


def backward_without_the_last_channel(grad_tokens, *rest):
    grad_x, _ = backward(grad_tokens, *rest)
    shortened = grad_tokens.clone()
    shortened[:, -1:] = 0
    return grad_x, backward(shortened, *rest)[1]


def route(*arguments):
    return RIGHT.region_route(*arguments)


def route_without_bias(x, grid_hw, context, bias, *rest):
    return route(x, grid_hw, context, torch.zeros_like(bias), *rest)


def route_with_the_last_of_equal_logits(x, grid_hw, context, bias, window, pools):
    choice = len(bias) - 1 - route(x, grid_hw, context.flip(1), bias.flip(0), window, pools)[3]
    return *pool(x, grid_hw, choice, window, pools), choice


def route_ignoring_nan(x, grid_hw, *rest):
    choice = route(without_nan(x), grid_hw, *rest)[3]
    return *pool(x, grid_hw, choice, *rest[2:]), choice


def route_that_pools_by_another_choice(x, grid_hw, context, bias, window, pools):
    *_, choice = route(x, grid_hw, context, bias, window, pools)
    return *pool(x, grid_hw, choice.clamp(max=0), window, pools), choice


def importance(*arguments):
    return RIGHT.importance(*arguments)


def importance_without_scale(q, k, cu_text, cu_visual, scale):
    return importance(q, k, cu_text, cu_visual, 1.0)


def importance_of_one_item(q, k, cu_text, cu_visual, scale):
    return importance(q, k, cu_text[[0, -1]], cu_visual[[0, -1]], scale)


def importance_without_nan(*arguments):
    return importance(*arguments).nan_to_num()


def importance_in_half_precision(q, k, *rest):
    return importance(q.bfloat16(), k.bfloat16(), *rest).to(reference.checks.wide(q.dtype))


def importance_summed(q, k, cu_text, *rest):
    return (
        importance(q, k, cu_text, *rest) * cu_text.diff().amax()
        if len(cu_text) > 1
        else importance(q, k, cu_text, *rest)
    )


def select(*arguments):
    return RIGHT.select_top_p(*arguments)


def select_ignoring_nan(scores, *rest):
    return select(without_nan(scores), *rest)


def select_with_shares_of_negative_scores(scores, *rest):
    return select(scores.abs(), *rest)


def select_at_least_gamma(scores, cu_visual, gamma, keep):
    return select(scores, cu_visual, gamma - 1e-9, keep)


def select_without_keep(scores, cu_visual, gamma, keep):
    return select(scores, cu_visual, gamma)


def select_with_the_last_of_ties(scores, cu_visual, gamma, keep):
    """Of one item: its mirror image's selection, mirrored."""
    if len(cu_visual) != 2:
        return select(scores, cu_visual, gamma, keep)
    index, count = select(scores.flip(0), cu_visual, gamma, keep)
    kept = (len(scores) - 1 - index[: int(count)]).flip(0)
    return torch.cat([kept, index[int(count) :]]), count


def select_in_descending_order(scores, cu_visual, gamma, keep):
    index, count = select(scores, cu_visual, gamma, keep)
    return index.sort(descending=True).values, count


def gather_the_last_row_for_minus_one(columns, index):
    return [column[index] if len(column) else RIGHT.gather_tokens([column], index)[0] for column in columns]


def gather_the_first_column_only(columns, index):
    return RIGHT.gather_tokens(columns, index)[:1]


def gather_without_nan(columns, index):
    return [c.nan_to_num() if c.is_floating_point() else c for c in RIGHT.gather_tokens(columns, index)]


WRONG = [
    *[
        (regions(), "arguments", check_region_pool, wrong)
        for wrong in (
            pool_ignoring_nan,
            pool_never_below_zero,
            pool_without_the_sign_of_zero,
            pool_with_weight_not_rounded,
            pool_with_source_in_all_pictures,
            pool_with_one_token_too_many,
        )
    ],
    *[
        (regions(), "backward_arguments", check_region_pool_backward, wrong)
        for wrong in (backward_to_another_maximum, backward_without_weight, backward_without_the_last_channel)
    ],
    *[
        (regions(), "route_arguments", check_region_route, wrong)
        for wrong in (
            route_without_bias,
            route_with_the_last_of_equal_logits,
            route_ignoring_nan,
            route_that_pools_by_another_choice,
        )
    ],
    *[
        (attentions(), "arguments", check_importance, wrong)
        for wrong in (
            importance_without_scale,
            importance_of_one_item,
            importance_without_nan,
            importance_in_half_precision,
            importance_summed,
        )
    ],
    *[
        (selections(), "arguments", check_selection, wrong)
        for wrong in (
            select_ignoring_nan,
            select_with_shares_of_negative_scores,
            select_at_least_gamma,
            select_without_keep,
            select_with_the_last_of_ties,
            select_in_descending_order,
        )
    ],
    *[
        (gathers(), "arguments", check_gather, wrong)
        for wrong in (gather_the_last_row_for_minus_one, gather_the_first_column_only, gather_without_nan)
    ],
]


@pytest.mark.parametrize("strategy, arguments_of, check, wrong", WRONG, ids=[wrong.__name__ for *_, wrong in WRONG])
def test_a_wrong_implementation_is_found(strategy: Any, arguments_of: str, check: Any, wrong: Any) -> None:
    @settings(phases=[Phase.generate])
    @given(strategy)
    def property_of(drawn: Any) -> None:
        arguments = getattr(drawn, arguments_of)()
        got = wrong(*arguments)
        check(got, *arguments)

    with pytest.raises(AssertionError, match=r"expected"):
        property_of()
