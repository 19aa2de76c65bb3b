"""Property tests for any implementation of the operators: yours too. Needs hypothesis.

An implementation is an object with the six functions of `Operators`, as torch.ops.minifocus has them. For each there is

    a strategy     regions(), attentions(), selections(), gathers(): draws a description of inputs, such as
                   Selection(lengths=(3, 0), dtype=torch.float16, pattern="few", layout="sliced", gamma=0.5, keep=None, seed=7),
                   which hypothesis shrinks, prints when a test fails, and takes back as an @example
    its arguments  description.arguments(device): the tensors, in an awkward memory layout where that was drawn
    a check        check_selection(got, *arguments) and so on: raises AssertionError, naming the output and the place

so that a test of a kernel is

    @given(selections())
    def test_my_selection(drawn: Selection) -> None:
        arguments = drawn.arguments()
        check_selection(my_selection(*arguments), *arguments)

(examples/test_your_kernel.py is one). Whole numbers and copied or compared values have to be right to the bit. Sums
have to be as exact as their number type lets them be: each check says what it allows and why.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from .ops import checks, reference
from .ops.reference import DROP, Pool
from .samplers.vision_guided import WINDOWS, pools_for

EXAMPLES = 300


class Operators(Protocol):
    """What is tested: see ops.py for the meaning of these, pools being [height, width, height, width, …]."""

    def region_pool(
        self, x: Tensor, grid_hw: Tensor, choice: Tensor, window: int, pools: list[int], weight: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def region_pool_backward(
        self,
        grad_tokens: Tensor,
        x: Tensor,
        grid_hw: Tensor,
        choice: Tensor,
        offsets: Tensor,
        window: int,
        pools: list[int],
        weight: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def region_route(
        self, x: Tensor, grid_hw: Tensor, context: Tensor, bias: Tensor, window: int, pools: list[int], /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def importance(self, q: Tensor, k: Tensor, cu_text: Tensor, cu_visual: Tensor, scale: float, /) -> Tensor: ...

    def select_top_p(
        self, scores: Tensor, cu_visual: Tensor, gamma: float = 0.0, keep: int | None = None, /
    ) -> tuple[Tensor, Tensor]: ...

    def gather_tokens(self, columns: list[Tensor], index: Tensor, /) -> list[Tensor]: ...


def register_profiles() -> None:
    """Hypothesis' profiles "ci" (always the same 300 examples a test), "long" (ten times as many, always new ones) and
    "quick" (a tenth, for slow builds).

    MINIFOCUS_HYPOTHESIS names the one to use, "ci" if unset; so does pytest's --hypothesis-profile.
    """
    suppress = [HealthCheck.too_slow]
    settings.register_profile(
        "ci", max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=suppress, print_blob=True
    )
    settings.register_profile("long", settings.get_profile("ci"), max_examples=10 * EXAMPLES, derandomize=False)
    settings.register_profile("quick", settings.get_profile("ci"), max_examples=EXAMPLES // 10)
    settings.load_profile(os.environ.get("MINIFOCUS_HYPOTHESIS", "ci"))


# ------------------------------------------------------------------------------------------- numbers and their layout

FLOATING = (torch.float32, torch.bfloat16, torch.float16)  # of every backend; the CPU has float64 as well
DTYPES = (*FLOATING, torch.float64)
PATTERNS = ("random", "few", "equal", "uniform", "zeros", "infinite", "-infinite", "nan", "denormal", "huge")
LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "expanded")


def draw_values(pattern: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Floating-point numbers on the CPU.

    random     normally distributed             few        -2 to 2 in quarters: many ties, and sums without rounding
    equal      one number everywhere            uniform    from 0 to 1, as probabilities are
    zeros      -0 and +0, a few ones            infinite   one in five is +inf or -inf
    -infinite  four in five are -inf            nan        one in five is NaN
    denormal   the smallest numbers there are   huge       of either sign, over the exponents of the dtype
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
    sign = torch.where(normal < 0, -1.0, 1.0).double()
    info = torch.finfo(dtype)
    if pattern == "few":
        values = (normal * 4).round().clamp(-8, 8) / 4
    elif pattern == "equal":
        values = torch.randn(1, generator=generator, dtype=torch.float64).expand(*shape).clone()
    elif pattern == "uniform":
        values = uniform
    elif pattern == "zeros":
        values = sign * (uniform < 0.1)
    elif pattern == "infinite":
        values = normal.where(uniform > 0.2, sign * math.inf)
    elif pattern == "-infinite":
        values = normal.where(uniform > 0.8, -math.inf)
    elif pattern == "nan":
        values = normal.where(uniform > 0.2, math.nan)
    elif pattern == "denormal":
        values = sign * (uniform * 20).floor() * info.smallest_normal * info.eps
    elif pattern == "huge":
        # All of float16's and most of float32's exponents; not all of float64's, which checks compute in.
        most = min(math.log2(info.max), 120)
        values = (sign * torch.exp2((2 * uniform - 1) * most)).where(uniform < 0.99, sign * min(info.max, 2.0**120))
    else:
        assert pattern == "random", pattern
        values = normal
    return values.to(dtype)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another place and order of memory. What lies around them is NaN or a number far off.

    transposed  the axes in reverse order             sliced    every second number of every second row of a larger buffer
    misaligned  contiguous, one number off alignment  expanded  the first row for all rows, stride 0 (changes the values)
    """
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "expanded":
        return values[:1].contiguous().expand_as(values)
    if layout == "transposed":
        axes = list(reversed(range(values.ndim)))
        return values.permute(axes).contiguous().permute(axes)
    around = math.nan if values.is_floating_point() else True if values.dtype == torch.bool else 77
    if layout == "misaligned":
        place = values.new_full((values.numel() + 2,), around)[1:-1].view(values.shape)
    else:
        assert layout == "sliced", layout
        place = values.new_full([2 * size + 3 for size in values.shape], around)
        for axis, size in enumerate(values.shape):
            place = place.narrow(axis, 1, 2 * size)
            place = place.unflatten(axis, (size, 2)).select(axis + 1, 0)
    return place.copy_(values)


def _offsets(lengths: Sequence[int], layout: str, device: torch.device | str) -> Tensor:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return lay_out(offsets, "sliced" if layout == "expanded" else layout)  # expanded: all would be 0


# Strategies that depend on little are made once each: hypothesis looks at every new one before it draws from it.


@functools.cache
def _common(dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """The fields that most descriptions have."""
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(dtypes),
            "pattern": st.sampled_from(PATTERNS),
            "layout": st.sampled_from(LAYOUTS),
            "seed": st.integers(0, 2**31),
        }
    )


# ------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Regions:
    """Inputs of region_pool, of its backward and of region_route: the maps of some pictures."""

    grids: tuple[tuple[int, int], ...]
    channels: int
    window: int
    pools: tuple[Pool, ...]
    dtype: torch.dtype
    pattern: str
    layout: str
    weighted: bool
    seed: int

    @property
    def cells(self) -> int:
        return sum(height * width for height, width in self.grids)

    @property
    def regions(self) -> int:
        return sum(math.prod(reference.num_regions(grid, self.window)) for grid in self.grids)

    def _tensor(self, shape: Sequence[int], dtype: torch.dtype, salt: int, device: torch.device | str) -> Tensor:
        return lay_out(draw_values(self.pattern, shape, dtype, self.seed + salt).to(device), self.layout)

    def _maps(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        grid_hw = lay_out(torch.tensor(self.grids, dtype=torch.int64).view(-1, 2), self._index_layout)
        return self._tensor([self.cells, self.channels], self.dtype, 0, device), grid_hw

    @property
    def _index_layout(self) -> str:
        return "sliced" if self.layout == "expanded" else self.layout

    @property
    def _flat(self) -> list[int]:
        return [side for pool in self.pools for side in pool]

    def arguments(
        self, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, int, list[int], Tensor | None]:
        """Of region_pool."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        choice = torch.randint(len(self.pools), [self.regions], generator=generator).to(device)
        weight = self._tensor([self.regions], checks.wide(self.dtype), 2, device) if self.weighted else None
        return *self._maps(device), lay_out(choice, self.layout), self.window, self._flat, weight

    def backward_arguments(
        self, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, list[int], Tensor | None]:
        """Of region_pool_backward; rows of grad_tokens beyond the last token are NaN."""
        x, grid_hw, choice, window, pools, weight = self.arguments(device)
        offsets = reference.region_pool(x, grid_hw, choice, window, list(self.pools))[2]
        grad_tokens = draw_values(self.pattern, [self.cells, self.channels], self.dtype, self.seed + 3)
        grad_tokens[int(offsets[-1]) :] = math.nan
        # Expanded it would be the first row's gradient for every token: a sum's gradient is such.
        layout = "contiguous" if self.layout == "expanded" and offsets[-1] < self.cells else self.layout
        grad_tokens = lay_out(grad_tokens.to(device), layout)
        return grad_tokens, x, grid_hw, choice, lay_out(offsets, self._index_layout), window, pools, weight

    def route_arguments(
        self, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, list[int]]:
        """Of region_route."""
        wide = checks.wide(self.dtype)
        context = self._tensor([len(self.grids), len(self.pools), self.channels], wide, 4, device)
        bias = self._tensor([len(self.pools)], wide, 5, device)
        return *self._maps(device), context, bias, self.window, self._flat


@functools.cache
def _branch_sets(window: int) -> st.SearchStrategy[tuple[Pool, ...]]:
    sides = [side for side in range(1, window + 1) if window % side == 0]
    pool = st.one_of(st.tuples(st.sampled_from(sides), st.sampled_from(sides)), st.just(DROP))
    own = st.lists(pool, min_size=1, max_size=checks.MAX_BRANCHES).map(tuple)
    paper = [tuple(pools_for(window, branches)) for branches in (3, 7)] if window in WINDOWS else []
    return st.one_of(st.sampled_from(paper), own) if paper else own


@functools.cache
def _grids(window: int, most_regions: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    side = st.integers(0, max(2 * window + 3, 9))
    several = st.lists(st.tuples(side, side), max_size=3)
    many = st.integers(1, most_regions).map(lambda n: [(n, 1)] if n % 2 else [(1, n)])
    return st.one_of(several, several, several, many)


@st.composite
def regions(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, most: int = 20_000, most_regions: int = 140
) -> Regions:
    """Up to three maps, empty and ragged ones included, of about `most` numbers in all; or one cell wide and up to
    `most_regions` long. The windows and branches of the paper, and any others that are allowed.
    """
    window = draw(st.sampled_from([1, 2, 4, 8, 12, 3, 5, 6]))
    grids = draw(_grids(window, most_regions))
    room = most // max(1, sum(height * width for height, width in grids))
    usual = [1, 2, 3, 4, 5, 8, 0, 7, 16, 17, 31, 32, 33, 64, 65, 128, 130, 256, 257, 520, 1030, 2056]
    channels = draw(st.sampled_from([c for c in usual if c <= max(1, room)]))
    return Regions(
        tuple(grids),
        channels,
        window,
        draw(_branch_sets(window)),
        weighted=draw(st.booleans()),
        **draw(_common(tuple(dtypes))),
    )


@dataclass(frozen=True)
class Attention:
    """Inputs of importance: the lengths of each item's text and visual tokens."""

    lengths: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    dim: int
    scale: float
    dtype: torch.dtype
    pattern: str
    layout: str
    seed: int

    def arguments(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        text, visual = [t for t, _ in self.lengths], [n for _, n in self.lengths]
        q = draw_values(self.pattern, [sum(text), self.heads, self.dim], self.dtype, self.seed)
        k = draw_values(self.pattern, [sum(visual), self.kv_heads, self.dim], self.dtype, self.seed + 1)
        q, k = (lay_out(values.to(device), self.layout) for values in (q, k))
        return q, k, _offsets(text, self.layout, device), _offsets(visual, self.layout, device), self.scale


_TEXTS = st.one_of(st.integers(0, 6), st.sampled_from([16, 17, 33, 65, 130]))
_VISUALS = st.one_of(st.integers(0, 12), st.sampled_from([31, 32, 33, 64, 65, 130, 257, 1030]))


@st.composite
def attentions(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, most: int = 60_000) -> Attention:
    """Up to three items, some without text or without visual tokens; at most about `most` multiplications."""
    kv_heads, per_kv_head = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (1, 8), (4, 2), (3, 1)]))
    dim = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 17, 32, 33, 64, 80, 128, 130]))
    room, lengths = most // (kv_heads * per_kv_head * dim), []
    for _ in range(draw(st.integers(0, 3))):
        text, visual = draw(_TEXTS), draw(_VISUALS)
        while text * visual > room:
            text, visual = (text // 2, visual) if text > visual else (text, visual // 2)
        lengths.append((text, visual))
        room -= text * visual
    scale = draw(st.sampled_from([1 / math.sqrt(dim), 1.0, 0.1, -1.0, 0.0]))
    return Attention(tuple(lengths), kv_heads * per_kv_head, kv_heads, dim, scale, **draw(_common(tuple(dtypes))))


@dataclass(frozen=True)
class Selection:
    """Inputs of select_top_p: the length of each item."""

    lengths: tuple[int, ...]
    gamma: float
    keep: int | None
    dtype: torch.dtype
    pattern: str
    layout: str
    seed: int

    def arguments(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, float, int | None]:
        scores = draw_values(self.pattern, [sum(self.lengths)], self.dtype, self.seed).to(device)
        return lay_out(scores, self.layout), _offsets(self.lengths, self.layout, device), self.gamma, self.keep


_EXACT = st.sampled_from([0.5, 0.25, 0.75, 0.85, 0.0, -1.0, 1.0, 1.5, 5e-324, 1 - 2**-53, math.inf, math.nan])
_GAMMAS = st.one_of(_EXACT, st.floats(0, 1))
_KEEPS = st.one_of(st.none(), st.none(), st.integers(0, 40), st.sampled_from([1024, 2**31, 2**62]))
_SHORT = st.lists(st.integers(0, 24), max_size=3)


@st.composite
def selections(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, most: int = 5000) -> Selection:
    """Up to four items of at most `most` scores each; every kind of gamma and of keep."""
    # One long item at most: blocks of 128, 256, 512 or 1024 threads, and more than fits into their fast memory.
    long = [n for n in (31, 32, 33, 64, 65, 127, 128, 129, 257, 513, 1025, 2305, 4097) if n <= most]
    lengths = list(draw(_SHORT))
    if long and draw(st.sampled_from([False, False, True])):
        lengths.insert(draw(st.integers(0, len(lengths))), draw(st.sampled_from(long)))
    return Selection(tuple(lengths), draw(_GAMMAS), draw(_KEEPS), **draw(_common(tuple(dtypes))))


@dataclass(frozen=True)
class Gather:
    """Inputs of gather_tokens: the dtype and the shape of a row of each column."""

    rows: int
    columns: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    count: int
    layout: str
    seed: int

    def arguments(self, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        columns = []
        for dtype, shape in self.columns:
            values = torch.randint(256, [self.rows * math.prod(shape) * dtype.itemsize], generator=generator).byte()
            values = values > 127 if dtype == torch.bool else values.view(dtype)
            columns.append(lay_out(values.view(self.rows, *shape).to(device), self.layout))
        index = torch.randint(-1, self.rows or 1, [self.count], generator=generator).clamp(max=self.rows - 1)
        return columns, lay_out(index.to(device), self.layout)


_ALL_DTYPES = st.sampled_from([*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
_SHAPES: st.SearchStrategy[tuple[int, ...]] = st.sampled_from(
    [(), (1,), (3,), (4,), (7,), (8,), (2, 3), (0,), (16,), (33,), (4, 16), (1030,), (2, 1024)]
)
_ROWS_AND_COUNTS = st.tuples(st.integers(0, 20), st.integers(0, 40))


@st.composite
def gathers(draw: st.DrawFn, most: int = 30_000) -> Gather:
    """Up to eight columns of any dtype and of rows of up to some kilobytes, at most about `most` numbers in all."""
    rows, count = draw(_ROWS_AND_COUNTS)
    if draw(st.sampled_from([False, False, False, True])):
        rows, count = draw(st.tuples(st.integers(1, 700), st.integers(0, 1100)))
    columns: list[tuple[torch.dtype, tuple[int, ...]]] = []
    room = most // max(1, rows, count)
    for _ in range(draw(st.integers(1, checks.MAX_COLUMNS))):
        shape = draw(_SHAPES)
        if math.prod(shape) <= room or not columns:
            columns.append((draw(_ALL_DTYPES), shape))
            room -= math.prod(shape)
    return Gather(rows, tuple(columns), count, draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**31)))


# ------------------------------------------------------------------------------------------------------------- checks


def check_same(name: str, got: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and values, -0 not being +0, but one NaN as good as another; `got` contiguous."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), (
        f"{name}: expected {expected.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}"
    )
    assert got.is_contiguous(), f"{name}: expected a contiguous tensor, got strides {got.stride()}"
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    if got.is_floating_point():
        differs |= (got.signbit() != expected.signbit()) & (got == expected)
    _fail_where(differs, name, got, expected)


def _fail_where(differs: Tensor, name: str, got: Tensor, expected: object) -> None:
    """`expected`: a tensor, or in words."""
    if not differs.any():
        return
    place = differs.nonzero()[0].tolist()
    at = tuple(place)
    wanted = expected[at].item() if isinstance(expected, Tensor) else expected
    raise AssertionError(
        f"{name}{place}: expected {wanted}, got {got[at].item()}; {int(differs.sum())} of {differs.numel()} are wrong"
    )


def _pairs(pools: Sequence[int]) -> list[Pool]:
    return list(zip(pools[::2], pools[1::2], strict=True))


def check_region_pool(
    got: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    grid_hw: Tensor,
    choice: Tensor,
    window: int,
    pools: Sequence[int],
    weight: Tensor | None = None,
) -> None:
    """Everything to the bit: a maximum rounds nothing, and the product with weight only once.

    There may be more rows than tokens, up to one for each cell; those of tokens may hold anything, source is -1 there.
    """
    tokens, source, offsets = got
    x, choice, weight = x.cpu(), choice.cpu(), None if weight is None else weight.cpu()
    expected = reference.region_pool(x, grid_hw, choice, window, _pairs(pools), weight)
    assert tokens.device == source.device == offsets.device
    count, rows = len(expected[0]), len(source)
    assert count <= rows <= max(count, len(x)), f"source: expected {count} to {len(x)} rows, got {rows}"
    assert tokens.shape == (rows, x.shape[1]), f"tokens: expected {[rows, x.shape[1]]}, got {list(tokens.shape)}"
    check_same("offsets", offsets.cpu(), expected[2])
    check_same("source", source.cpu(), torch.cat([expected[1], expected[1].new_full((rows - count,), -1)]))
    check_same("tokens", tokens.cpu()[:count], expected[0])


def check_region_route(
    got: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    grid_hw: Tensor,
    context: Tensor,
    bias: Tensor,
    window: int,
    pools: Sequence[int],
) -> None:
    """In two stages. choice: a branch whose logit can be the largest, the logits being anything that adding in float32
    (float64 for float64) in some order can give, see `_sums`; where no rounding is possible, exactly the first of the
    largest, or the first NaN. Then everything else to the bit, being what region_pool gives for the operator's own choice.
    """
    *pooled, choice = got
    assert choice.dtype == torch.int64, f"choice: expected torch.int64, got {choice.dtype}"
    x, context, bias, choice = x.cpu(), context.cpu().double(), bias.cpu().double(), choice.cpu()
    low, high, unsure = _sums(_logit_terms(x, grid_hw, context, bias, window), checks.wide(x.dtype))
    assert choice.shape == low.shape[:1], f"choice: expected {len(low)} regions, got {list(choice.shape)}"
    _fail_where((choice < 0) | (choice >= len(bias)), "choice", choice, f"from 0 to {len(bias) - 1}")
    own, branch = choice[:, None], torch.arange(len(bias))
    # Without a NaN, ours wins if it can be more than the lowest that each earlier branch can be, and as much as later ones'.
    mine = high.gather(1, own)
    beats = torch.where(branch < own, mine > low, mine >= low) | (branch == own)
    first_nan = torch.where(low.isnan(), branch, len(bias)).amin(dim=1)
    may_be_nan = unsure.gather(1, own)[:, 0]
    possible = torch.where(
        first_nan < len(bias),
        (choice == first_nan) | (choice < first_nan) & may_be_nan,
        may_be_nan | beats.all(dim=1),
    )
    _fail_where(~possible, "choice", choice, f"an argmax; logits up to {high[~possible][:1].tolist()}")
    check_region_pool((pooled[0], pooled[1], pooled[2]), x, grid_hw, choice, window, pools)


def _logit_terms(x: Tensor, grid_hw: Tensor, context: Tensor, bias: Tensor, window: int) -> Tensor:
    """What region_route adds up, in float64: [regions, S, C + 1]."""
    terms, cell = [context.new_zeros(0, len(bias), x.shape[1] + 1)], 0
    for own, (height, width) in zip(context, grid_hw.tolist(), strict=True):
        maps = x[cell : cell + height * width].view(height, width, x.shape[1])
        pooled = reference.split_regions(maps, window)[0].flatten(1, 2).amax(dim=1).double()
        biases = bias.expand(len(pooled), len(bias))[..., None]
        terms.append(torch.cat([pooled[:, None] * own, biases], dim=2))
        cell += height * width
    return torch.cat(terms)


def _sums(terms: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Between what the sum of the last axis of `terms`, float64, may lie if computed in `dtype` in whatever order.

    n numbers, products that were rounded themselves, add up with an error of at most n + 1 roundings of Σ|term|. If all
    are multiples of 1/256 and few enough for every sum to be a number of `dtype`, nothing is rounded. Returns low, high,
    both NaN where the sum is NaN in every order, and where some order may overflow, so that anything may come out.
    """
    info, n = torch.finfo(dtype), terms.shape[-1]
    total = terms.sum(dim=-1)
    finite = terms.nan_to_num(nan=0, posinf=0, neginf=0)
    size = finite.abs().sum(dim=-1)
    exact = ((finite * 256).frac() == 0).all(dim=-1) & (size * 256 * info.eps < 1)
    error = ((n + 1) * (size * info.eps + info.smallest_normal * info.eps)).where(~exact & total.isfinite(), 0)
    unsure = (size > info.max / 2) & ~total.isnan()
    return (total - error).where(~unsure, -math.inf), (total + error).where(~unsure, math.inf), unsure


def check_region_pool_backward(
    got: tuple[Tensor, Tensor],
    grad_tokens: Tensor,
    x: Tensor,
    grid_hw: Tensor,
    choice: Tensor,
    offsets: Tensor,
    window: int,
    pools: Sequence[int],
    weight: Tensor | None = None,
) -> None:
    """grad_x to the bit: a window's gradient goes to its first maximum (to its first NaN), times weight, rounded once.
    grad_weight, a sum: within the rounding of the wider type it is added in, see `_sums`; without `weight`, empty.
    """
    grad_x, grad_weight = (gradient.cpu() for gradient in got)
    x, choice, grad_tokens = x.cpu(), choice.cpu(), grad_tokens.cpu()[: int(offsets[-1])]
    wide = checks.wide(x.dtype)
    weight = None if weight is None else weight.cpu()
    expected, _ = reference.region_pool_backward(grad_tokens, x, grid_hw, choice, window, _pairs(pools), weight)
    check_same("grad_x", grad_x, expected)
    if weight is None:
        check_same("grad_weight", grad_weight, torch.zeros(0, dtype=wide))
        return
    pooled, _, _ = reference.region_pool(x, grid_hw, choice, window, _pairs(pools))
    counts = offsets.cpu().diff()
    owner = torch.arange(len(choice)).repeat_interleave(counts)
    place = torch.arange(len(pooled)) - offsets.cpu()[:-1].repeat_interleave(counts)
    terms = torch.zeros(len(choice), int(counts.max()) if len(counts) else 0, x.shape[1], dtype=torch.float64)
    terms[owner, place] = grad_tokens.double() * pooled.double()
    check_sums("grad_weight", grad_weight, terms.flatten(1), wide)


def check_sums(name: str, got: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    """`got` is the sum over the last axis of `terms` (float64), added in `dtype` in some order, see `_sums`."""
    low, high, unsure = _sums(terms, dtype)
    assert (got.dtype, got.shape) == (dtype, low.shape), f"{name}: expected {dtype} {list(low.shape)}, got {got}"
    exact = got.double()
    fits = torch.where(low.isnan(), exact.isnan(), (low <= exact) & (exact <= high)) | unsure
    _fail_where(~fits, name, got, (low + high) / 2)


def check_importance(got: Tensor, q: Tensor, k: Tensor, cu_text: Tensor, cu_visual: Tensor, scale: float) -> None:
    """For each item, the largest error against float64 is at most twice that of plain PyTorch in the same precision.

    Where PyTorch happens to be exact, rounding that no implementation avoids is allowed. Of n independent roundings
    about √n add up: √D in a logit, whose size is Z = max |scale|·Σ|q·k|; √N in the softmax's sum and √T in the sum over
    the text, relative to the largest score; and a few in the exponential. Both sides may differ by that:
    2·eps·(√D·Z + √N + √T + 4)·max score. An item is NaN as a whole or not at all, as in float64; one whose logits may
    overflow may give anything. An item without text is 0.
    """
    q, k, text, visual, got = q.cpu(), k.cpu(), cu_text.tolist(), cu_visual.tolist(), got.cpu()
    wide = checks.wide(q.dtype)
    info = torch.finfo(wide)
    assert (got.dtype, got.shape) == (wide, k.shape[:1]), f"scores: expected {wide} [{len(k)}], got {got}"
    items = zip(itertools.pairwise(text), itertools.pairwise(visual), strict=True)
    for item, ((t0, t1), (v0, v1)) in enumerate(items):
        own_q, own_k, own = q[t0:t1], k[v0:v1], got[v0:v1].double()
        if v0 == v1:
            continue
        if t0 == t1:
            check_same(f"scores of item {item}, which has no text,", got[v0:v1], torch.zeros(v1 - v0, dtype=wide))
            continue
        ends = torch.tensor([0, t1 - t0]), torch.tensor([0, v1 - v0])
        exact = reference.importance(own_q.double(), own_k.double(), *ends, scale)
        plain = reference.importance(own_q, own_k, *ends, scale).double()
        size_q, size_k = (t.double().abs().nan_to_num(nan=0, posinf=0).transpose(0, 1) for t in (own_q, own_k))
        size_k = size_k.repeat_interleave(len(size_q) // len(size_k), dim=0)
        largest = float((size_q @ size_k.transpose(1, 2)).max())
        if largest * max(1.0, abs(scale)) > info.max / 2:
            continue
        _fail_where(own.isnan() != exact.isnan(), f"scores of item {item} ", own, exact)
        if exact.isnan().any():
            continue
        roundings = math.sqrt(q.shape[2]) * abs(scale) * largest + math.sqrt(v1 - v0) + math.sqrt(t1 - t0) + 4
        unavoidable = 2 * info.eps * roundings * float(exact.max())
        allowed = 2 * float((plain - exact).abs().max()) + unavoidable
        _fail_where(
            (own - exact).abs() > allowed,
            f"scores of item {item}, with an error of {allowed:.3g} at most, ",
            own,
            exact,
        )


def check_selection(
    got: tuple[Tensor, Tensor], scores: Tensor, cu_visual: Tensor, gamma: float = 0.0, keep: int | None = None
) -> None:
    """index and count exactly, for these very scores: give the operator's own, so that their rounding is not in question.

    The sums that gamma is compared with are whole numbers, which no order of additions rounds (see `reference.select_top_p`).
    """
    index, count = got
    kept, counts = reference.select_top_p(scores.cpu(), cu_visual.cpu(), gamma, keep)
    pieces = [
        torch.cat([own, own.new_full((length - len(own),), -1)])
        for own, length in zip(kept.split(counts.tolist()), cu_visual.cpu().diff().tolist(), strict=True)
    ]
    check_same("count", count.cpu(), counts)
    check_same("index", index.cpu(), torch.cat([kept[:0], *pieces]))


def check_gather(got: Sequence[Tensor], columns: Sequence[Tensor], index: Tensor) -> None:
    """Every byte, NaN's too."""
    assert len(got) == len(columns), f"columns: expected {len(columns)}, got {len(got)}"
    for number, (rows, column) in enumerate(zip(got, columns, strict=True)):
        expected = reference.gather_tokens([column.cpu()], index.cpu())[0]
        assert (rows.dtype, rows.shape) == (column.dtype, expected.shape), (
            f"column {number}: got {rows.dtype} {rows.shape}"
        )
        check_same(f"column {number}, byte ", _bytes(rows), _bytes(expected))


def _bytes(rows: Tensor) -> Tensor:
    assert rows.is_contiguous(), f"expected a contiguous tensor, got strides {rows.stride()}"
    return rows.cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
