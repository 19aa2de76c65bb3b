"""The operators inside torch: opcheck, fake kernels, torch.compile, torch.export, and how a backend is chosen."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import minifocus
from minifocus import ops
from minifocus.ops import reference
from minifocus.testing import Attention, Gather, Regions, Selection

OPERATORS = [schema.split("(")[0] for schema in ops.backend.schemas()]
SETTINGS = ["contiguous", "transposed", "sliced", "misaligned", "empty"]
POOLS = ((2, 2), (2, 1), (1, 1))


def operator(name: str) -> Any:
    return getattr(torch.ops.minifocus, name).default


def sample(name: str, setting: str, pools: tuple[tuple[int, int], ...] = POOLS) -> tuple[Any, ...]:
    """Arguments of the operator; "empty": no picture, no item, no row."""
    empty, layout = setting == "empty", "contiguous" if setting == "empty" else setting
    maps = Regions(() if empty else ((5, 3), (2, 4)), 6, 2, pools, torch.float32, "random", layout, True, 0)
    if name == "region_pool":
        return maps.arguments()
    if name == "region_pool_backward":
        return maps.backward_arguments()
    if name == "region_route":
        return maps.route_arguments()
    if name == "importance":
        lengths = () if empty else ((3, 7), (0, 2), (2, 5))
        return Attention(lengths, 4, 2, 8, 0.3, torch.float32, "random", layout, 0).arguments()
    if name == "select_top_p":
        lengths = () if empty else (5, 0, 9)
        return Selection(lengths, 0.6, None, torch.float32, "uniform", layout, 0).arguments()
    assert name == "gather_tokens"
    columns = ((torch.float32, (4,)), (torch.int64, ()), (torch.bool, (2, 3)))
    return Gather(0 if empty else 6, columns, 0 if empty else 9, layout, 0).arguments()


def gradient_wanted(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    def wanted(value: Any) -> Any:
        if isinstance(value, list):
            return [wanted(item) for item in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if floating else value

    return tuple(wanted(value) for value in arguments)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, setting: str) -> None:
    arguments = sample(name, setting)
    if name in ("region_pool", "gather_tokens"):
        arguments = gradient_wanted(arguments)
    torch.library.opcheck(operator(name), arguments)


@pytest.mark.parametrize("schema", ops.backend.schemas(), ids=OPERATORS)
def test_the_registered_schema_is_the_one_in_ops(schema: str) -> None:
    """Whether C++ or Python has registered it."""
    expected = torch._C.parse_schema(f"minifocus::{schema}")
    assert str(operator(schema.split("(")[0])._schema) == str(expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_outputs_are_like_the_real_ones(name: str, setting: str) -> None:
    arguments = sample(name, setting)
    real = operator(name)(*arguments)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = operator(name)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    if isinstance(real, torch.Tensor):
        real, fake = [real], [fake]
    assert len(real) == len(fake)
    unknown = {
        "region_pool": {0, 1},
        "region_route": {0, 1, 2, 3},
    }  # outputs whose first size depends on tensors' contents
    for number, (one, other) in enumerate(zip(real, fake, strict=True)):
        assert (one.dtype, one.device, one.layout) == (other.dtype, other.device, other.layout)
        known = slice(number in unknown.get(name, ()), None)
        assert (one.shape[known], one.stride()) == (other.shape[known], other.stride())


# -------------------------------------------------------------------------------------------------- compile and export


SAMPLER_POOLS = [(2, 2), (1, 1)]


class Sample(torch.nn.Module):
    """All that the samplers call, one after the other: no size of a result is known before it runs."""

    def forward(
        self, x: torch.Tensor, grid_hw: torch.Tensor, context: torch.Tensor, bias: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        tokens, source, offsets, choice = ops.region_route(x, grid_hw, context, bias, 2, SAMPLER_POOLS)
        again = ops.region_pool(x, grid_hw, choice, 2, SAMPLER_POOLS)[0]
        ends = torch.stack([offsets[0], offsets[-1]])
        scores = ops.importance(q, tokens[:, None] + 0 * again[:, None], torch.tensor([0, len(q)]), ends, 0.3)
        index, count = ops.select_top_p(scores, ends, 0.5)
        rows, places = ops.gather_tokens([tokens * 2, source], index)
        return rows + 1, places, index, count, scores


def sampler_inputs(seed: int, height: int = 5, width: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    grid_hw = torch.tensor([[height, width]])
    return normal(height * width, 8), grid_hw, normal(1, 2, 8), normal(2), normal(3, 2, 8)


@pytest.fixture
def data_dependent_sizes() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("data_dependent_sizes")
def test_compile_without_a_graph_break(backend: str) -> None:
    compiled = torch.compile(Sample(), fullgraph=True, backend=backend, dynamic=True)
    sizes = set()
    for seed, (height, width) in enumerate([(5, 6), (5, 6), (7, 3)]):
        inputs = sampler_inputs(seed, height, width)
        got, expected = compiled(*inputs), Sample()(*inputs)
        sizes.add(len(expected[0]))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(sizes) > 1, "the samples were to differ in size"


@pytest.mark.usefixtures("data_dependent_sizes")
def test_compile_trains_through_region_pool_and_gather_tokens() -> None:
    x, grid_hw, *_ = sampler_inputs(0)
    choice, weight = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 1]), torch.rand(9)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tokens, _, _ = ops.region_pool(x, grid_hw, choice, 2, [(2, 2), (1, 1)], weight)
        (rows,) = ops.gather_tokens([tokens], torch.tensor([3, 1, -1, 3]))
        return rows.sin().sum()

    def gradients(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(function(*inputs), inputs)

    got = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for one, other in zip(got, gradients(loss), strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_export() -> None:
    inputs = sampler_inputs(0)
    exported = torch.export.export(Sample(), inputs, strict=False)
    called = {str(node.target) for node in exported.graph.nodes}
    assert {f"minifocus.{name}.default" for name in OPERATORS} - called == {"minifocus.region_pool_backward.default"}
    for seed in (0, 1):
        inputs = sampler_inputs(seed)
        for one, other in zip(exported.module()(*inputs), Sample()(*inputs), strict=True):
            torch.testing.assert_close(one, other)


# --------------------------------------------------------------------------------- derivatives that are not there


DERIVED: dict[
    str, Callable[..., torch.Tensor]
] = {  # what has a gradient, and importance, as functions of all that is float
    name: lambda *given, name=name: tensors_of(operator(name)(*filled(name, given)))[0]
    for name in OPERATORS
    if name != "select_top_p"
}


def floats_of(name: str) -> list[torch.Tensor]:
    return [v for v in tree_leaves(sample(name, "contiguous")) if isinstance(v, torch.Tensor) and v.is_floating_point()]


def filled(name: str, given: tuple[torch.Tensor, ...]) -> Any:
    """The operator's arguments, with other tensors of floating-point numbers."""
    leaves, spec = tree_flatten(sample(name, "contiguous"))
    others = iter(given)
    wanted = [next(others) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in leaves]
    return tree_unflatten(wanted, spec)


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("way", ["func", "dual", "with grad", "compiled"])
def test_forward_mode_is_refused(name: str, way: str) -> None:
    """For each argument by itself: torch would say that nothing depends on it."""
    run, floats = DERIVED[name], floats_of(name)
    for place, value in enumerate(floats):
        if way == "compiled" and place:
            break

        def of_one(value: torch.Tensor, place: int = place) -> torch.Tensor:
            return run(*floats[:place], value, *floats[place + 1 :])

        with pytest.raises(NotImplementedError, match=f"^{name}: there is no forward-mode derivative"):
            if way == "func":
                torch.func.jvp(of_one, (value,), (torch.ones_like(value),))
            elif way == "compiled":
                torch.func.jvp(torch.compile(of_one, backend="eager"), (value,), (torch.ones_like(value),))
            else:
                with forward_ad.dual_level():
                    of_one(forward_ad.make_dual(value.requires_grad_(way == "with grad"), torch.ones_like(value)))


def test_whole_numbers_have_zero_tangents() -> None:
    """As torch.argsort's."""
    scores, cu_visual, *rest = sample("select_top_p", "contiguous")
    tangent = torch.ones_like(scores)
    (index, count), tangents = torch.func.jvp(
        lambda scores: operator("select_top_p")(scores, cu_visual, *rest), (scores,), (tangent,)
    )
    expected = operator("select_top_p")(scores, cu_visual, *rest)
    assert torch.equal(index, expected[0]) and torch.equal(count, expected[1])
    assert [t.count_nonzero().item() for t in tangents] == [0, 0]


@pytest.mark.parametrize("name", ["region_pool", "region_route"])
def test_second_derivatives_are_refused(name: str) -> None:
    run, floats = DERIVED[name], floats_of(name)
    x = floats[0].requires_grad_()
    (first,) = torch.autograd.grad(run(*floats).square().sum(), x, create_graph=True)  # which itself is there
    refused = pytest.raises(NotImplementedError, match="^region_pool and region_route: there is no second derivative")
    with refused:
        torch.autograd.grad(first.sum(), x)
    with refused:
        torch.autograd.functional.hessian(lambda x: run(x, *floats[1:]).square().sum(), x)
    with refused:  # by the gradient of the gradient
        torch.autograd.functional.jvp(lambda x: run(x, *floats[1:]), x, torch.ones_like(x))
    assert torch.autograd.functional.vjp(lambda x: run(x, *floats[1:]), x, torch.ones_like(run(*floats)))[1].any()


def test_second_derivatives_of_gather_tokens() -> None:
    """Its gradient is made of torch's own operators."""
    column = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, -1, 0, 2])
    assert torch.autograd.gradgradcheck(lambda column: ops.gather_tokens([column], index)[0].sin(), column)


def test_importance_has_no_gradient() -> None:
    q, k, *rest = sample("importance", "contiguous")
    with pytest.raises(NotImplementedError, match="^importance: there is no gradient through it; detach q and k"):
        ops.importance(q, k.requires_grad_(), *rest).sum().backward()
    with torch.no_grad():
        assert not ops.importance(q, k, *rest).requires_grad


def test_the_reference_has_every_derivative() -> None:
    """It is plain PyTorch."""
    _, grid_hw, choice, window, _, weight = sample("region_pool", "contiguous")
    x = torch.randperm(23 * 6).view(23, 6).double().requires_grad_()

    def pooled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.region_pool(x, grid_hw, choice, window, list(POOLS), weight)[0].square()

    inputs = x, weight.double().requires_grad_()
    assert torch.autograd.gradcheck(pooled, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pooled, inputs)


# --------------------------------------------------------------------------------------------------------- numbers


def test_numbers_from_numpy_are_numbers() -> None:
    x, grid_hw, choice, _, _, weight = sample("region_pool", "contiguous")
    scores, cu_visual, *_ = sample("select_top_p", "contiguous")
    arguments = sample("importance", "contiguous")
    pools = [(np.int64(height), np.uint8(width)) for height, width in POOLS]
    got = ops.region_pool(x, grid_hw, choice, cast(int, np.int32(2)), cast(Any, pools), weight)
    assert all(map(torch.equal, got, ops.region_pool(x, grid_hw, choice, 2, list(POOLS), weight)))
    assert torch.equal(
        ops.importance(*arguments[:4], cast(float, np.float32(0.5))), ops.importance(*arguments[:4], 0.5)
    )
    kept = ops.select_top_p(scores, cu_visual, cast(float, np.float16(0.5)), cast(int, np.int64(2)))
    assert all(map(torch.equal, kept, ops.select_top_p(scores, cu_visual, 0.5, 2)))


WRONG_NUMBERS: list[tuple[str, int, Any]] = [
    ("region_pool", 3, torch.tensor(2.5)),
    ("region_pool", 3, torch.tensor(2)),
    ("region_pool", 3, 2**63),
    ("region_pool", 3, np.uint64(2**64 - 1)),
    ("region_pool", 3, np.array([2, 2])),
    ("region_pool", 4, None),
    ("region_pool", 4, [2, 2, 1, 1]),
    ("region_pool", 4, [(2, 2, 1), (1,)]),
    ("region_pool", 4, [(2**64, 2)]),
    ("region_pool", 4, [(torch.tensor(2.5), 2)]),
    ("region_pool", 4, ["22", "11"]),
    ("region_route", 4, torch.tensor([2])),
    ("region_route", 5, None),
    ("importance", 4, 10**400),
    ("importance", 4, None),
    ("importance", 4, torch.tensor(0.5)),
    ("select_top_p", 2, 10**400),
    ("select_top_p", 2, torch.tensor(0.5)),
    ("select_top_p", 3, torch.tensor(1.5)),
    ("select_top_p", 3, 2**63),
    ("select_top_p", 3, math.nan),
]


@pytest.mark.parametrize("name, place, value", WRONG_NUMBERS, ids=range(len(WRONG_NUMBERS)))
def test_what_is_no_number_is_refused(name: str, place: int, value: Any) -> None:
    arguments: list[Any] = list(sample(name, "contiguous"))
    if name.startswith("region"):
        arguments[4 if name == "region_pool" else 5] = list(POOLS)
    getattr(ops, name)(*arguments)
    arguments[place] = value
    argument = operator(name)._schema.arguments[place].name
    with pytest.raises(
        RuntimeError, match=rf"^{argument}: expected |Expected a value of type .* for argument '{argument}'"
    ):
        getattr(ops, name)(*arguments)


# ---------------------------------------------------------------------------------------------- choosing the backend

SELECT = """
import logging, sys
logging.basicConfig(format="%(name)s: %(message)s")
import torch
from minifocus import ops
index, count = ops.select_top_p(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 3]), 0.6)
print(ops.BACKENDS["cpu"], index.tolist(), count.tolist())
"""


def in_a_new_python(package: Path, backend: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MINIFOCUS_BACKEND"}
    environment |= {"PYTHONPATH": str(package.parent)} | ({} if backend is None else {"MINIFOCUS_BACKEND": backend})
    command = [sys.executable, "-c", SELECT]
    return subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True, timeout=120)


@pytest.fixture
def uncompiled(tmp_path: Path) -> Path:
    """A copy of the package without its compiled operators and without the record of their being built."""
    without = shutil.ignore_patterns("*.so", "_build.txt", "__pycache__")
    return Path(shutil.copytree(Path(minifocus.__file__).parent, tmp_path / "minifocus", ignore=without))


def test_reference_is_chosen() -> None:
    done = in_a_new_python(Path(minifocus.__file__).parent, "reference")
    assert done.stdout == "reference [1, 2] [2]\n", done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(os.environ.get("MINIFOCUS_BACKEND") == "reference", reason="the reference was asked for")
@pytest.mark.parametrize("backend", [None, "native"])
def test_native_is_chosen(backend: str | None) -> None:
    done = in_a_new_python(Path(minifocus.__file__).parent, backend)
    assert done.stdout == "native [1, 2] [2]\n", done.stderr


def test_another_backend_is_refused() -> None:
    done = in_a_new_python(Path(minifocus.__file__).parent, "fastest")
    assert done.returncode != 0
    assert "RuntimeError: MINIFOCUS_BACKEND: expected native or reference, got 'fastest'" in done.stderr


@pytest.mark.parametrize(
    "record", [None, "cpu: not built, there is no C++ compiler\ncuda: not built", "cpu: built with g++"]
)
def test_without_compiled_operators_one_line_says_why(uncompiled: Path, record: str | None) -> None:
    if record is not None:
        (uncompiled / "ops/_build.txt").write_text(record)
    done = in_a_new_python(uncompiled, None)
    assert done.stdout == "reference [1, 2] [2]\n", done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("minifocus: operators run in plain PyTorch on cpu")
    assert ("there is no C++ compiler" if "not built" in (record or "") else "_cpu.abi3.so is not there") in line


def test_native_is_not_replaced_in_silence(uncompiled: Path) -> None:
    done = in_a_new_python(uncompiled, "native")
    assert done.returncode != 0
    assert "RuntimeError: MINIFOCUS_BACKEND=native: no compiled operators for cpu" in done.stderr


def test_a_library_that_does_not_load_is_told(uncompiled: Path) -> None:
    (uncompiled / "ops/_cpu.abi3.so").write_bytes(b"not a library")
    done = in_a_new_python(uncompiled, None)
    assert done.stdout == "reference [1, 2] [2]\n", done.stderr
    (line,) = done.stderr.splitlines()
    assert "plain PyTorch on cpu" in line
    assert "too short" in line or "invalid ELF header" in line


def test_every_backend_has_every_operator() -> None:
    assert sorted(ops.backend.REFERENCE) == sorted(OPERATORS)
    for name in OPERATORS:
        assert callable(getattr(reference, name))
