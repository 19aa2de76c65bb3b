"""The operators' properties, in every implementation: C++ on the CPU, the CUDA kernels under emulation and on a GPU.

What is drawn and what has to hold is minifocus/testing.py's. MINIFOCUS_BACKEND=reference puts plain PyTorch in the place of
the C++; otherwise the compiled operators must be there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minifocus import ops
from minifocus.ops import reference
from minifocus.testing import (
    Attention,
    Gather,
    Operators,
    Regions,
    Selection,
    attentions,
    check_gather,
    check_importance,
    check_region_pool,
    check_region_pool_backward,
    check_region_route,
    check_same,
    check_selection,
    gathers,
    regions,
    selections,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WANTS_REFERENCE = os.environ.get("MINIFOCUS_BACKEND") == "reference"


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @contextlib.contextmanager
    def taking_turns(self, turns: dict[str, Any]) -> Iterator[Operators]:
        """The operators. `turns` is the order in which the emulator runs its threads."""
        if self.name != "emulated":
            assert WANTS_REFERENCE or ops.BACKENDS[self.device] == "native", "the compiled operators are missing"
            yield torch.ops.minifocus
            return
        with emulated.schedule(**turns):
            yield emulated.operators("checked")

    def takes(self, drawn: Any) -> Any:
        """`drawn` without float64, which only the CPU has."""
        on_cpu = self.name == "native" or drawn.dtype != torch.float64
        return drawn if on_cpu else replace(drawn, dtype=torch.float32)


NATIVE, EMULATED, GPU = Backend("native", "cpu"), Backend("emulated", "cpu"), Backend("gpu", "cuda")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
every_backend = pytest.mark.parametrize(
    "backend",
    [NATIVE, EMULATED, pytest.param(GPU, marks=[pytest.mark.gpu, no_gpu])],
    ids=["native", "emulated", "gpu"],
)

turns = st.fixed_dictionaries(
    {
        "order": st.sampled_from(["forward", "reverse", "random"]),
        "seed": st.integers(0, 2**31),
        "preempt": st.sampled_from([0, 0, 0, 100, 20]),
        "resident_blocks": st.integers(1, 4),
        "poison": st.sampled_from([0x00, 0x3F, 0xFF]),
        "shared_bytes": st.sampled_from([225 * 1024, 46 * 1024, 4 * 1024]),
    }
)


# Without channels the reference could not tell how many regions there were.
NO_CHANNELS = Regions(((1, 1),), 0, 1, ((0, 0), (1, 1)), torch.float32, "random", "contiguous", False, 0)


@every_backend
@given(drawn=regions(), turns=turns)
@example(drawn=NO_CHANNELS, turns={})
def test_region_pool(backend: Backend, drawn: Regions, turns: dict[str, Any]) -> None:
    arguments = backend.takes(drawn).arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        check_region_pool(operators.region_pool(*arguments), *arguments)


@every_backend
@given(drawn=regions(), turns=turns)
@example(drawn=NO_CHANNELS, turns={})
def test_region_pool_backward(backend: Backend, drawn: Regions, turns: dict[str, Any]) -> None:
    arguments = backend.takes(drawn).backward_arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        check_region_pool_backward(operators.region_pool_backward(*arguments), *arguments)


# As much shared memory as a GPU gives a block, less the kernel's own variables.
FULL_48_KB = Regions(((4, 4),), 768, 4, ((4, 4), (2, 2), (1, 1)), torch.float32, "random", "contiguous", False, 0)


@every_backend
@given(drawn=regions(), turns=turns)
@example(drawn=NO_CHANNELS, turns={})
@example(drawn=FULL_48_KB, turns={})
def test_region_route(backend: Backend, drawn: Regions, turns: dict[str, Any]) -> None:
    arguments = backend.takes(drawn).route_arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        check_region_route(operators.region_route(*arguments), *arguments)


@every_backend
@given(drawn=attentions(most=120_000), turns=turns)
def test_importance(backend: Backend, drawn: Attention, turns: dict[str, Any]) -> None:
    arguments = backend.takes(drawn).arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        check_importance(operators.importance(*arguments), *arguments)


@every_backend
@given(drawn=selections(), turns=turns)
# -0 ranks as +0: the cut is among both, which the drawn examples meet by chance alone.
@example(drawn=Selection((24, 33), 0.5, 12, torch.float32, "zeros", "contiguous", 0), turns={})
# Negative scores had a share on the CPU.
@example(drawn=Selection((31,), 0.5, None, torch.float32, "random", "contiguous", 0), turns={})
# As many scores as have their numbers in shared memory, and more.
@example(drawn=Selection((4043,), 0.5, None, torch.float32, "random", "contiguous", 0), turns={})
@example(drawn=Selection((2928, 2928), 0.85, None, torch.bfloat16, "random", "contiguous", 0), turns={})
def test_select_top_p(backend: Backend, drawn: Selection, turns: dict[str, Any]) -> None:
    arguments = backend.takes(drawn).arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        check_selection(operators.select_top_p(*arguments), *arguments)


@every_backend
@given(drawn=gathers(), turns=turns)
# One number is contiguous whatever its stride, so contiguous() leaves a stride of 2.
@example(drawn=Gather(1, ((torch.float32, (1,)),), 1, "sliced", 0), turns={})
def test_gather_tokens(backend: Backend, drawn: Gather, turns: dict[str, Any]) -> None:
    arguments = drawn.arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        check_gather(operators.gather_tokens(*arguments), *arguments)


@every_backend
@settings(max_examples=settings.default.max_examples // 5)
@given(drawn=attentions(), turns=turns)
def test_importance_is_the_same_in_every_run(backend: Backend, drawn: Attention, turns: dict[str, Any]) -> None:
    """To the bit, although it adds: no sum depends on which thread comes first."""
    arguments = backend.takes(drawn).arguments(backend.device)
    with backend.taking_turns(turns) as operators:
        first = operators.importance(*arguments)
    with backend.taking_turns({}) as operators:
        again = operators.importance(*arguments)
    assert torch.equal(first.nan_to_num(nan=-1), again.nan_to_num(nan=-1))


# ----------------------------------------------------------------------------------- paths that drawn inputs rarely take


@pytest.mark.parametrize("seed", range(3))
def test_the_look_back_goes_beyond_a_warp_of_waiting_regions(seed: int) -> None:
    """100 of 150 regions run at once. Some of them find that the 32 before them do not know their sums yet."""
    drawn = Regions(((1, 150),), 1, 1, ((0, 0), (1, 1)), torch.float32, "random", "contiguous", False, seed)
    arguments = drawn.arguments()
    with EMULATED.taking_turns({"order": "random", "seed": seed, "resident_blocks": 100}) as operators:
        check_region_pool(operators.region_pool(*arguments), *arguments)


@pytest.mark.parametrize("tensor_cores", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("item", [(17, 130, 6, 2, 80), (3, 70, 4, 1, 264), (1, 1, 1, 1, 8), (66, 65, 2, 2, 16)])
def test_importance_with_tensor_cores_and_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, item: tuple[int, int, int, int, int], tensor_cores: str
) -> None:
    """The emulator does the one instruction of the tensor cores by hand, as PTX describes it. The rest is the kernel itself."""
    monkeypatch.setenv("MINIFOCUS_TENSOR_CORES", tensor_cores)
    text, visual, heads, kv_heads, dim = item
    drawn = Attention(((text, visual), (2, 40)), heads, kv_heads, dim, dim**-0.5, dtype, "random", "contiguous", 0)
    arguments = drawn.arguments()
    with EMULATED.taking_turns({"order": "random", "seed": 1}) as operators:
        check_importance(operators.importance(*arguments), *arguments)


def test_rows_that_do_not_exist_have_no_part_in_importance() -> None:
    """The last tile's rows of no text token are 0: multiplied with an infinite key they are NaN, which must reach no score."""
    drawn = Attention(((17, 33),), 2, 1, 16, 0.3, torch.bfloat16, "random", "contiguous", 0)
    q, k, *rest = drawn.arguments()
    q, k = q.abs() + 1, -k.abs()
    k[5] = -torch.inf  # its products are -infinity, its share 0
    with EMULATED.taking_turns({}) as operators:
        scores = operators.importance(q, k, *rest)
    assert scores[5] == 0 and bool(scores.isfinite().all())
    check_importance(scores, q, k, *rest)


# ------------------------------------------------------------------- inputs that another thread writes to meanwhile

FULL_REGIONS = Regions(
    ((8, 8), (4, 12)), 20, 4, ((4, 4), (2, 2), (1, 1)), torch.float32, "random", "contiguous", True, 0
)
ATTENTION = Attention(((70, 40), (3, 100)), 4, 2, 8, 0.3, torch.float32, "random", "contiguous", 0)
SELECTION = Selection((40, 60), 0.6, None, torch.float32, "random", "contiguous", 0)
GATHER = Gather(9, ((torch.float32, (20,)), (torch.int64, ())), 30, "contiguous", 0)
CHANGING: dict[
    str, tuple[Callable[[], tuple[Any, ...]], dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]]]
] = {
    # operator: its arguments, and which of them change into what. Both contents are right ones.
    "region_pool": (FULL_REGIONS.arguments, {"choice": (2, lambda choice: (choice + 1) % 3)}),
    "region_pool_backward": (
        FULL_REGIONS.backward_arguments,
        {"choice": (3, lambda choice: (choice + 1) % 3), "offsets": (4, lambda offsets: offsets // 2)},
    ),
    "region_route": (
        FULL_REGIONS.route_arguments,
        {"bias": (3, lambda bias: 100 * bias.flip(0)), "x": (0, lambda x: -x)},
    ),
    "importance": (
        ATTENTION.arguments,
        {"cu_text": (2, lambda _: torch.tensor([0, 2, 73])), "cu_visual": (3, lambda _: torch.tensor([0, 130, 140]))},
    ),
    "select_top_p": (
        SELECTION.arguments,
        {"scores": (0, lambda scores: scores.flip(0)), "cu_visual": (1, lambda _: torch.tensor([0, 90, 100]))},
    ),
    "gather_tokens": (GATHER.arguments, {"index": (1, lambda index: index.flip(0))}),
}
CHANGES = [(name, argument) for name, (_, changes) in CHANGING.items() for argument in changes]


@pytest.mark.parametrize("name, argument", CHANGES)
def test_kernels_stay_in_bounds_whatever_another_stream_writes(name: str, argument: str) -> None:
    """Each read of the input finds one of two contents. A block uses one of them, or its own check stops it."""
    arguments_of, changes = CHANGING[name]
    place, change = changes[argument]
    for seed in range(8):
        arguments = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments_of()]
        turns = {"order": "random", "seed": seed, "changing": (argument, change(arguments[place]).contiguous())}
        untouched = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        with EMULATED.taking_turns({**turns, "shared_bytes": 4 * 1024}) as operators:
            try:
                got = getattr(operators, name)(*arguments)
            except emulated.EmulationError as error:
                # Blocks and kernels see different offsets, so that parts may be left out or done twice.
                assert argument in ("cu_text", "cu_visual"), error
                twice = (
                    str(error).startswith("racecheck: write")
                    and "by thread" in str(error)
                    and "another block" in str(error)
                )
                assert twice or str(error).startswith(("check: DEVICE_CHECK", "initcheck")), error
                continue
        if name == "region_pool":
            counts = torch.tensor([1, 4, 16])  # of tokens, by branch: they tell which branch each region got
            untouched[2] = torch.searchsorted(counts, got[2].diff())
            check_region_pool(got, *untouched)
        if argument == "bias":
            check_region_pool(got[:3], *untouched[:2], got[3], *untouched[4:])
        if argument == "scores":
            for begin, length, count in zip([0, 40], [40, 60], got[1].tolist(), strict=True):
                kept = got[0][begin : begin + count]
                assert kept.tolist() == sorted(set(kept.tolist()))
                assert not count or begin <= kept[0] <= kept[-1] < begin + length
                assert (got[0][begin + count : begin + length] == -1).all()


@pytest.mark.parametrize(
    "name, argument, place, value",
    [
        ("region_pool", "choice", 0, 2**32),
        ("region_pool_backward", "choice", 1, -(2**32)),
        ("region_pool_backward", "offsets", 1, 2**63 - 1),
        ("importance", "cu_text", 2, -(2**63)),
        ("importance", "cu_visual", 2, -(2**63)),
        ("select_top_p", "cu_visual", 2, -(2**63)),
    ],
)
def test_kernels_stop_at_indices_that_would_overflow(name: str, argument: str, place: int, value: int) -> None:
    """Their own check stops them before they compute anything with the indices."""
    arguments = {**RIGHT[name], argument: RIGHT[name][argument].clone()}
    arguments[argument][place] = value
    with EMULATED.taking_turns({}) as operators, pytest.raises(emulated.EmulationError, match="^check: DEVICE_CHECK"):
        getattr(operators, name)(*arguments.values())


# --------------------------------------------------------------------------------------------------- only on the CPU


def test_native_operators_use_what_they_have_checked() -> None:
    """Another process writes to the tensors meanwhile."""
    program = Path(__file__).with_name("racing_writer.py")
    done = subprocess.run([sys.executable, program, "0.4"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("reference\n" if WANTS_REFERENCE else "native\n")


@pytest.mark.parametrize("grids", [[[2**63 - 1, 0], [1, 3], [0, 2**63 - 1], [2, 2], [2**62, 0]]])
def test_native_operators_take_any_side_of_a_map_without_cells(grids: list[list[int]]) -> None:
    """Such a map has no region, and sums with its side must not overflow."""
    grid_hw, least = torch.tensor(grids), MAPS["grid_hw"]
    pooled = X, least, CHOICE, WINDOW, POOLS, WEIGHT
    with NATIVE.taking_turns({}) as operators:
        for run in (operators, SimpleNamespace(**ops.backend.REFERENCE)):
            got = run.region_pool(X, grid_hw, *pooled[2:])
            check_region_pool(got, *pooled)
            back = torch.randn(7, 3), X, grid_hw, CHOICE, got[2], *pooled[3:]
            check_region_pool_backward(run.region_pool_backward(*back), *back[:2], least, *back[3:])
            route = torch.rand(len(grids), 2, 3), torch.rand(2), WINDOW, POOLS
            got = run.region_route(X, grid_hw, *route)
            check_region_route(got, X, least, route[0][[1, 3]], *route[1:])


ONE = torch.zeros(1, dtype=torch.int64)
BEYOND_MEMORY: dict[str, tuple[str, tuple[Any, ...]]] = {
    # Large sizes with strides of 0, in a few bytes of memory.
    "regions": (
        "region_pool",
        (torch.empty(2**62, 0), torch.tensor([[2**31, 2**31]]), ONE.expand(2**62), 1, [1, 1], None),
    ),
    "choice": (
        "region_route",
        (torch.empty(2**63 - 1, 0), torch.tensor([[2**63 - 1, 1]]), torch.rand(1, 1, 0), torch.rand(1), 1, [1, 1]),
    ),
    "scores": ("select_top_p", (torch.rand(1).expand(2**62), torch.tensor([0, 2**62]), 0.5, None)),
    "row": ("gather_tokens", ([torch.rand(0).as_strided((0, 2**40, 2**40), (0, 0, 0))], ONE - 1)),
    "no row": ("gather_tokens", ([torch.rand(0).as_strided((0, 2**40, 2**40), (0, 0, 0))], ONE[:0])),
}


@pytest.mark.parametrize("name, arguments", BEYOND_MEMORY.values(), ids=[f"native-{id}" for id in BEYOND_MEMORY])
def test_sizes_beyond_memory_are_refused(name: str, arguments: tuple[Any, ...]) -> None:
    with NATIVE.taking_turns({}) as operators, pytest.raises(RuntimeError) as caught:
        getattr(operators, name)(*arguments)
    assert WANTS_REFERENCE or str(caught.value).startswith("cannot allocate ")


def equal(one: Any, other: Any) -> bool:
    """To the bit, NaN too."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LARGE = {  # enough work for more than one thread
    "region_pool": lambda: Regions(
        ((48, 47), (30, 31)), 130, 4, ((4, 4), (2, 2), (1, 1)), torch.float32, "random", "contiguous", True, 0
    ).arguments(),
    "region_pool_backward": lambda: Regions(
        ((48, 47), (30, 31)), 130, 4, ((4, 4), (2, 2), (1, 1)), torch.bfloat16, "random", "contiguous", True, 0
    ).backward_arguments(),
    "region_route": lambda: Regions(
        ((48, 47), (30, 31)), 130, 4, ((4, 4), (2, 2), (1, 1)), torch.float32, "random", "contiguous", False, 0
    ).route_arguments(),
    "importance": lambda: Attention(
        ((40, 500), (7, 333)), 8, 2, 64, 0.125, torch.float32, "random", "contiguous", 0
    ).arguments(),
    "select_top_p": lambda: Selection(
        (5000, 3, 4000, 700), 0.7, None, torch.float32, "uniform", "contiguous", 0
    ).arguments(),
    "gather_tokens": lambda: Gather(
        3000, ((torch.float32, (500,)), (torch.int64, ())), 2500, "contiguous", 0
    ).arguments(),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    arguments = LARGE[name]()
    with num_threads(1):
        alone = [*call(name, *arguments)]
    with num_threads(2):
        together = [*call(name, *arguments)]
    assert equal(alone, together)


def call(name: str, *arguments: Any) -> list[torch.Tensor]:
    with NATIVE.taking_turns({}) as operators:
        got = getattr(operators, name)(*arguments)
    return [got] if isinstance(got, torch.Tensor) else list(got)


@pytest.mark.skipif(psutil.virtual_memory().available < 12 * 2**30, reason="takes 9 GiB of memory")
@pytest.mark.slow
def test_more_than_two_to_the_31_numbers() -> None:
    """A map, and tokens, of a little more than 2^31 numbers (4 GiB each): the last regions end up in the last rows."""
    channels, cells = 2**16, 2**15 + 4
    x = torch.zeros(cells, channels, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([[1.0], [2.0], [3.0]])
    choice = torch.ones(cells, dtype=torch.int64)
    choice[:2] = 0
    with NATIVE.taking_turns({}) as operators:
        tokens, source, offsets = operators.region_pool(x, torch.tensor([[1, cells]]), choice, 1, [0, 0, 1, 1])
        count = int(offsets[-1])
        assert count == cells - 2
        assert source[:count][-2:].tolist() == [cells - 2, cells - 1]
        assert tokens[cells - 5 : cells - 2, [0, -1]].tolist() == [[1, 1], [2, 2], [3, 3]]
        del tokens
        (rows,) = operators.gather_tokens([x], torch.tensor([cells - 1, 0, cells - 2]))
        assert rows[:, [0, -1]].tolist() == [[3, 3], [0, 0], [2, 2]]


# ---------------------------------------------------------------------------------------------------------- gradients


@given(drawn=regions(dtypes=[torch.float64], most=60).filter(lambda drawn: drawn.pattern in ("random", "uniform")))
@settings(max_examples=settings.default.max_examples // 5)
def test_gradcheck_of_region_pool(drawn: Regions) -> None:
    x, grid_hw, choice, window, _, weight = drawn.arguments()
    # Distinct numbers, further apart than gradcheck's steps: elsewhere the maximum is not differentiable.
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(drawn.seed))
    x = (order.view(x.shape).double() / 10).requires_grad_()
    weight = None if weight is None else weight.detach().contiguous().requires_grad_()

    def tokens(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return ops.region_pool(x, grid_hw, choice, window, list(drawn.pools), weight)[0]

    assert torch.autograd.gradcheck(tokens, (x,) if weight is None else (x, weight))


@given(drawn=regions(), weight_too=st.booleans())
def test_autograd_is_region_pool_backward(drawn: Regions, weight_too: bool) -> None:
    x, grid_hw, choice, window, _, weight = drawn.arguments()
    x.requires_grad_()
    if weight is not None and weight_too:
        weight.requires_grad_()
    tokens, _, _ = ops.region_pool(x, grid_hw, choice, window, list(drawn.pools), weight)
    grad_tokens = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(drawn.seed)).to(x.dtype)
    wanted = [t for t in (x, weight) if t is not None and t.requires_grad]
    got = torch.autograd.grad(tokens, wanted, grad_tokens)
    expected = reference.region_pool_backward(
        grad_tokens, x.detach(), grid_hw, choice, window, list(drawn.pools), None if weight is None else weight.detach()
    )
    check_same("grad_x", got[0].contiguous(), expected[0])
    if len(wanted) == 2 and drawn.pattern in ("random", "uniform", "few"):
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


@given(drawn=regions())
def test_autograd_of_region_route_is_that_of_what_it_chose(drawn: Regions) -> None:
    x, grid_hw, context, bias, window, _ = drawn.route_arguments()
    for value in (x, context, bias):
        value.requires_grad_()
    tokens, _, _, choice = ops.region_route(x, grid_hw, context, bias, window, list(drawn.pools))
    grad_tokens = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(drawn.seed)).to(x.dtype)
    got = torch.autograd.grad(tokens, [x, context, bias], grad_tokens, allow_unused=True)
    expected = reference.region_pool_backward(grad_tokens, x.detach(), grid_hw, choice, window, list(drawn.pools), None)
    check_same("grad_x", got[0].contiguous(), expected[0])
    assert got[1] is None
    assert got[2] is None


@pytest.mark.parametrize("rows, index", [(4, [2, 0, 2, -1, 3]), (3, []), (0, [-1, -1]), (2, [-1])])
def test_gradcheck_of_gather_tokens(rows: int, index: list[int]) -> None:
    columns = [torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)]
    for column in columns:
        column.requires_grad_()

    def gathered(*columns: torch.Tensor) -> list[torch.Tensor]:
        return ops.gather_tokens(list(columns), torch.tensor(index, dtype=torch.int64))

    assert torch.autograd.gradcheck(gathered, columns)


def test_columns_of_whole_numbers_have_no_gradient() -> None:
    hidden, positions = torch.randn(3, 2, requires_grad=True), torch.arange(3)
    rows, places = ops.gather_tokens([hidden, positions], torch.tensor([2, -1, 2]))
    rows.sum().backward()
    assert not places.requires_grad
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0, 0], [0, 0], [2, 2]]


# ----------------------------------------------------------------------------------------------------- wrong arguments

X = torch.randn(7, 3)  # maps of 1 × 3 and 2 × 2, regions of 2 × 2: two and one
MAPS = {"x": X, "grid_hw": torch.tensor([[1, 3], [2, 2]])}
CHOICE, WINDOW, POOLS = torch.tensor([1, 0, 1]), 2, [2, 2, 1, 1]
WEIGHT = torch.rand(3)
ITEMS = torch.tensor([0, 2, 5])

RIGHT: dict[str, dict[str, Any]] = {
    "region_pool": {**MAPS, "choice": CHOICE, "window": WINDOW, "pools": POOLS, "weight": WEIGHT},
    "region_pool_backward": {
        "grad_tokens": torch.randn(7, 3),
        **MAPS,
        "choice": CHOICE,
        "offsets": torch.tensor([0, 2, 3, 7]),
        "window": WINDOW,
        "pools": POOLS,
        "weight": WEIGHT,
    },
    "region_route": {**MAPS, "context": torch.rand(2, 2, 3), "bias": torch.rand(2), "window": WINDOW, "pools": POOLS},
    "importance": {
        "q": torch.randn(4, 4, 8),
        "k": torch.randn(5, 2, 8),
        "cu_text": torch.tensor([0, 1, 4]),
        "cu_visual": ITEMS,
        "scale": 0.5,
    },
    "select_top_p": {"scores": torch.rand(5), "cu_visual": ITEMS, "gamma": 0.5, "keep": None},
    "gather_tokens": {"columns": [X, torch.arange(7)], "index": torch.tensor([6, -1])},
}

OFFSETS = [  # instead of ITEMS
    ITEMS[None],
    ITEMS.int(),
    ITEMS[:0],
    ITEMS[:2],
    ITEMS + 1,
    torch.tensor([0, 6, 5]),
    torch.tensor([0, -1, 5]),
    torch.tensor([0, 2, 4, 5]),
]
WRONG_MAPS: dict[str, list[Any]] = {
    "x": [X[0], X[None], X.long(), X.bool(), X.to(torch.complex64), X[:6], X.repeat(2, 1)],
    "grid_hw": [
        MAPS["grid_hw"][0],
        MAPS["grid_hw"].int(),
        MAPS["grid_hw"].float(),
        MAPS["grid_hw"][:, :1],
        torch.tensor([[1, 3]]),
        torch.tensor([[1, 3], [2, 3]]),
        torch.tensor([[1, 3], [-2, -2]]),
        torch.tensor([[7, 1], [0, -1]]),
        torch.tensor([[1, 7], [2**32, 2**32]]),
        torch.tensor([[2**62, 4]]),
    ],
    "window": [0, -2],
    "pools": [[], [2], [2, 2, 1], [1, 1] * 9, [2, 2, 3, 1], [2, 2, 1, 0], [2, 2, 0, 1], [2, 2, -1, -1], [4, 4, 1, 1]],
}
WRONG_CHOICE = [CHOICE[None], CHOICE.int(), CHOICE.float(), CHOICE[:2], CHOICE + 1, CHOICE - 1]
WRONG_WEIGHT = [WEIGHT[None], WEIGHT.double(), WEIGHT.half(), WEIGHT[:2]]
WRONG: dict[str, dict[str, list[Any]]] = {
    "region_pool": {**WRONG_MAPS, "choice": WRONG_CHOICE, "weight": WRONG_WEIGHT},
    "region_pool_backward": {
        **WRONG_MAPS,
        "choice": WRONG_CHOICE,
        "weight": WRONG_WEIGHT,
        "grad_tokens": [X[0], X.double(), X.long(), X[:5], X[:, :2]],
        "offsets": [
            torch.zeros(1, 4).long(),
            torch.tensor([0, 2, 3, 7]).int(),
            torch.tensor([0, 2, 3]),
            torch.tensor([0, 2, 3, 8]),
            torch.tensor([1, 2, 3, 7]),
        ],
    },
    "region_route": {
        **WRONG_MAPS,
        "context": [torch.rand(2, 2, 3)[0], torch.rand(2, 2, 3).half(), torch.rand(2, 2, 2), torch.rand(1, 2, 3)],
        "bias": [torch.rand(1, 2), torch.rand(2).double(), torch.rand(3)],
    },
    "importance": {
        "q": [torch.randn(4, 8), torch.randn(4, 4, 8).long(), torch.randn(4, 4, 0)],
        "k": [
            torch.randn(5, 8),
            torch.randn(5, 2, 8).half(),
            torch.randn(5, 2, 7),
            torch.randn(5, 3, 8),
            torch.randn(5, 0, 8),
        ],
        "cu_text": [torch.tensor([0, 1, 4]).int(), torch.tensor([0, 1, 5]), torch.tensor([0, 3, 2]), ITEMS[:0]],
        "cu_visual": OFFSETS,
    },
    "select_top_p": {
        "scores": [torch.rand(1, 5), torch.rand(5).long(), torch.tensor(1.0)],
        "cu_visual": OFFSETS[:-1],  # any number of items is right here
        "keep": [-1],
    },
    "gather_tokens": {
        "columns": [
            [],
            [X] * 9,
            [torch.tensor(1.0)],
            [X, X[:5]],
            [X.to(torch.complex64)],
            [X.to(torch.float8_e4m3fn)],
            [X.to(torch.uint16)],
        ],
        "index": [
            torch.tensor([[6]]),
            torch.tensor([6]).int(),
            torch.tensor([6.0]),
            torch.tensor([7]),
            torch.tensor([0, -2]),
        ],
    },
}
CASES = [(name, argument, value) for name, own in WRONG.items() for argument, values in own.items() for value in values]
CASES += [  # torch lets None pass
    (name, argument, None)
    for name, own in RIGHT.items()
    for argument, value in own.items()
    if isinstance(value, torch.Tensor) and argument != "weight"
]


def message_of(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*arguments.values())
    return str(caught.value)


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        drawn = value.is_floating_point()  # anew in every process, which must agree on the names
        return f"{value.dtype} {list(value.shape)}" if drawn or value.numel() > 6 else f"{value.dtype} {value.tolist()}"
    return ", ".join(map(described, value)) if isinstance(value, list) and value else str(value)


@pytest.mark.parametrize("name, argument, value", CASES, ids=[f"{n}-{a}={described(v)}" for n, a, v in CASES])
def test_a_wrong_argument_is_named(name: str, argument: str, value: Any) -> None:
    """Every implementation uses the same words. In place of a wrong x, q or index it may name what depends on it."""
    arguments = {**RIGHT[name], argument: value}
    with NATIVE.taking_turns({}) as operators:
        message = message_of(getattr(operators, name), arguments)
    assert message == message_of(ops.backend.REFERENCE[name], arguments)
    depends = {"x": ("x", "grid_hw"), "q": ("q", "k", "cu_text")}.get(argument, (argument,))
    assert message.startswith(tuple(f"{named}: expected " for named in depends))


def test_the_right_arguments_are_right() -> None:
    for name, arguments in RIGHT.items():
        call(name, *arguments.values())


ELSEWHERE = [
    (name, argument)
    for name, own in RIGHT.items()
    for argument in list(own)[1:]
    if isinstance(own[argument], torch.Tensor) and (name, argument) != ("region_pool_backward", "x")
]


@pytest.mark.parametrize("name, argument", ELSEWHERE)
def test_a_tensor_on_another_device_is_named(name: str, argument: str) -> None:
    arguments = {**RIGHT[name], argument: RIGHT[name][argument].to("meta")}
    for function in (getattr(torch.ops.minifocus, name), ops.backend.REFERENCE[name]):
        named = "columns" if argument == "index" else argument  # they have to be where index is
        assert message_of(function, arguments).startswith(f"{named}: expected ")


@pytest.mark.parametrize("name, argument, value", CASES, ids=[f"{n}-{a}={described(v)}" for n, a, v in CASES])
def test_the_emulated_half_stops_at_a_wrong_argument(name: str, argument: str, value: Any) -> None:
    """It uses the words of the others, except for wrong contents of a tensor: kernels check the indices that they read."""
    arguments = {**RIGHT[name], argument: value}
    expected = message_of(ops.backend.REFERENCE[name], arguments)
    with EMULATED.taking_turns({}) as operators:
        if expected == "offsets: expected region_pool's for this choice":
            operators.region_pool_backward(*arguments.values())  # stays within bounds, or the emulator would say so
            return
        with pytest.raises((RuntimeError, emulated.EmulationError)) as caught:
            getattr(operators, name)(*arguments.values())
    message, contents = str(caught.value), isinstance(value, torch.Tensor) and value.dtype == torch.int64
    if isinstance(caught.value, emulated.EmulationError):
        assert message.startswith("check: DEVICE_CHECK")
    elif not (contents and message.startswith(f"{argument}: expected ")):
        assert message == expected.replace("bfloat16, float16 or float64", "bfloat16 or float16")
