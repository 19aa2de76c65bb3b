"""The operators inside torch: opcheck, fake kernels, torch.compile, torch.export, and how a backend is chosen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import minifocus
from minifocus import ops, reference
from minifocus.testing import Attention, Gather, Regions, Selection

OPERATORS = [schema.split("(")[0] for schema in ops.SCHEMAS]
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


@pytest.mark.parametrize("schema", ops.SCHEMAS, ids=OPERATORS)
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
        (uncompiled / "_build.txt").write_text(record)
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
    (uncompiled / "_cpu.abi3.so").write_bytes(b"not a library")
    done = in_a_new_python(uncompiled, None)
    assert done.stdout == "reference [1, 2] [2]\n", done.stderr
    (line,) = done.stderr.splitlines()
    assert "plain PyTorch on cpu" in line
    assert "too short" in line or "invalid ELF header" in line


def test_every_backend_has_every_operator() -> None:
    assert sorted(ops._REFERENCE) == sorted(OPERATORS)
    for name in OPERATORS:
        assert callable(getattr(reference, name))
