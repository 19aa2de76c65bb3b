"""Layers of int8 and int4 weights: what a weight becomes, and products beside its values written out a second time."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minifocus
from minifocus import quantized
from minifocus.quantized import Int4Linear, Int8Linear, QuantizedLinear, operator_works

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PATTERNS = ("random", "zero rows", "outlier", "constant", "offset", "huge range", "tiny", "zeros", "large")


def a_weight(pattern: str, outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=generator)
    if pattern == "zero rows":
        w[::2] = 0
    elif pattern == "outlier":
        w[outputs // 2, inputs // 2] = 3000.0
    elif pattern == "constant":
        w = w[:, :1].expand(outputs, inputs).clone()
    elif pattern == "offset":
        w = w * 1e-3 + 100
    elif pattern == "huge range":
        w = w * 10 ** torch.linspace(-20, 20, outputs)[:, None]
    elif pattern == "tiny":
        w = w * 1e-38
    elif pattern == "zeros":
        w.zero_()
    elif pattern == "large":
        w = w / w.abs().max() * 1e38
    return w.to(dtype)


def a_layer(kind: type[QuantizedLinear], weight: torch.Tensor, bias: torch.Tensor | None = None) -> QuantizedLinear:
    layer = kind(weight.shape[1], weight.shape[0], None if bias is None else torch.nn.Parameter(bias), CPU)
    expected = {name: (tuple(value.shape), value.dtype) for name, value in layer.named_buffers()}
    layer.weight, layer.weight_scale = kind.quantize(weight)
    assert {name: (tuple(value.shape), value.dtype) for name, value in layer.named_buffers()} == expected
    return layer.eval()


def values_of(layer: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """The weight that a layer stands for, and the step between its values, float64 [out, in], as docs/checkpoints.md says."""
    if isinstance(layer, Int8Linear):
        step = np.repeat(layer.weight_scale.double().numpy()[:, None], layer.in_features, axis=1)
        return layer.weight[0].numpy() * step, step
    value, step = np.zeros((2, layer.out_features, layer.in_features))
    stored, scales = layer.weight.numpy(), layer.weight_scale.double().numpy()
    for output in range(layer.out_features):
        block, row = divmod(output, 64)
        q = stored[block, :, row % 32] % 16 if row < 32 else stored[block, :, row % 32] // 16
        step[output], zero = np.repeat(scales[:, output], 64, axis=0).T
        value[output] = zero + (q.astype(float) - 8) * step[output]
    return value, step


WEIGHTS = st.tuples(
    st.sampled_from([Int8Linear, Int4Linear]),
    st.sampled_from(PATTERNS),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)


def drawn(case: tuple[Any, ...]) -> tuple[type[QuantizedLinear], torch.Tensor]:
    """A kind of layer and a weight of a size that it takes. float16 keeps what it can hold."""
    kind, pattern, outputs, inputs, dtype, seed = case
    if kind is Int4Linear:
        outputs, inputs = 64 * (1 + outputs % 3), 64 * (1 + inputs % 3)
    return kind, a_weight(pattern, outputs, inputs, dtype, seed).nan_to_num()


@given(case=WEIGHTS)
def test_no_value_is_further_than_half_a_step(case: tuple[Any, ...]) -> None:
    kind, weight = drawn(case)
    layer = a_layer(kind, weight)
    assert layer.sound(layer.weight_scale)
    value, step = values_of(layer)
    error = np.abs(value - weight.double().numpy())
    assert (error <= step / 2 * (1 + 1e-5) + 1e-6 * np.abs(value)).all()
    # The step is what the largest value, or the group's range, asks for.
    groups = weight.double().numpy().reshape(len(weight), -1, 64 if kind is Int4Linear else weight.shape[1])
    extent = groups.max(-1) - groups.min(-1) if kind is Int4Linear else np.abs(groups).max(-1)
    extent = np.repeat(extent, groups.shape[-1], axis=1)
    wide = extent > 1e-2 * np.abs(weight.double().numpy()).max() if kind is Int4Linear else extent > 1e-35
    assert (step <= extent / (15 if kind is Int4Linear else 127) * 1.02 + 2e-38)[wide].all()


@given(
    case=WEIGHTS, count=st.integers(0, 80), dtype=st.sampled_from([torch.bfloat16, torch.float32]), biased=st.booleans()
)
def test_products_are_those_of_the_values(case: tuple[Any, ...], count: int, dtype: torch.dtype, biased: bool) -> None:
    kind, weight = drawn(case if case[1] != "large" else (case[0], "random", *case[2:]))
    generator = torch.Generator().manual_seed(case[-1])
    bias = torch.randn(len(weight), generator=generator).to(dtype) if biased else None
    layer = a_layer(kind, weight, bias)
    x = torch.randn(count, 2, weight.shape[1], generator=generator).to(dtype)[:, 1]  # with gaps between the rows
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == (count, len(weight)) and found.dtype == dtype
    value, _ = values_of(layer)
    exact = x.double().numpy() @ value.T
    size = np.abs(x.double().numpy()) @ np.abs(value.T)
    if bias is not None:
        exact, size = exact + bias.double().numpy(), size + np.abs(bias.double().numpy())
    # One rounding of the weights, and three of the result: product, scale, bias.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-17
    assert (np.abs(found.double().numpy() - exact) <= 4 * unit * size + 1e-37).all()


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_few_rows_go_through_the_operator(kind: type[QuantizedLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    """From any address, with any leading dimensions; many, and float32, do not."""
    layer = a_layer(kind, torch.randn(128, 192))
    calls: list[int] = []
    original = kind.operator

    def counted(self: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor:
        assert rows.is_contiguous() and rows.data_ptr() % 32 == 0
        calls.append(len(rows))
        return original(self, rows)

    assert operator_works(kind, "cpu")
    monkeypatch.setattr(kind, "operator", counted)
    shifted = torch.randn(1 + 10 * 192).bfloat16()[1:].view(2, 5, 192)
    assert torch.allclose(layer(shifted), layer.multiply(shifted.view(-1, 192)).view(2, 5, 128), rtol=0.05, atol=0.2)
    layer(torch.randn(kind.most_rows + 1, 192).bfloat16())
    layer(torch.randn(3, 192))  # float32
    assert calls == [10]


def test_sizes_that_the_int8_operator_would_read_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int8Linear, "operator", lambda *_: pytest.fail("called"))
    for inputs in (1, 8, 17, 40, 200):
        a_layer(Int8Linear, torch.randn(5, inputs))(torch.randn(2, inputs).bfloat16())


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("fault", ["absent", "refusing", "wrong"])
def test_an_operator_that_does_not_work(
    kind: type[QuantizedLinear], fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so once, and products are right without it."""
    name = "_weight_int8pack_mm" if kind is Int8Linear else "_weight_int4pack_mm_for_cpu"

    class Operators:
        def __getattr__(self, other: str) -> Any:
            if other != name:
                return getattr(torch._ops._OpNamespace("aten"), other)
            if fault == "absent":
                raise AttributeError(f"no {name}")
            if fault == "refusing":
                raise NotImplementedError("not on this device\nand more")
            return lambda rows, weight, *_: rows.new_zeros(len(rows), 192)

    layer, x = a_layer(kind, torch.randn(192, 128)), torch.randn(3, 128).bfloat16()
    expected = layer(x)
    monkeypatch.setattr(torch.ops, "aten", Operators())
    operator_works.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "minifocus"):
            found = [layer(x) for _ in range(3)]
    finally:
        operator_works.cache_clear()
    (message,) = [record.getMessage() for record in caplog.records]
    assert kind.__name__ in message and "not used" in message and "\n" not in message
    assert all(torch.allclose(one, expected, rtol=0.02, atol=0.2) for one in found)


ELSEWHERE = """
import torch
from minifocus import quantized
from minifocus.quantized import Int4Linear, Int8Linear, operator_works
print(torch.backends.cpu.get_cpu_capability(), quantized.stored_as_read())
for kind in (Int8Linear, Int4Linear):
    assert operator_works(kind, "cpu")
    layer = kind(192, 320, None, torch.device("cpu"))
    layer.weight, layer.weight_scale = kind.quantize(torch.randn(320, 192))
    for count in (1, 5, 24):
        x = torch.randn(count, 192).bfloat16()
        assert torch.allclose(layer.operator(x), layer.multiply(x), rtol=0.05, atol=0.3)
    layer.weight, layer.weight_scale = kind.quantize(torch.randn(320, 192))  # nothing of the last is kept
    assert torch.allclose(layer.operator(x), layer.multiply(x), rtol=0.05, atol=0.3)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable chooses among kernels for x86")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_without_avx512(capability: str) -> None:
    """There int4 weights are packed anew."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [{"default": "DEFAULT"}.get(capability, "AVX2"), "False"]


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_show_in_the_scale(kind: type[QuantizedLinear], value: float) -> None:
    weight = torch.randn(128, 128)
    weight[70, 100] = value
    assert not kind.sound(kind.quantize(weight)[1])


def test_training_is_refused() -> None:
    layer = a_layer(Int8Linear, torch.randn(8, 16))
    x = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(minifocus.InputError, match="no gradient"):
        layer(x)
    with torch.no_grad():
        layer(x)
    with pytest.raises(minifocus.InputError, match="cannot be trained"):
        torch.nn.Sequential(layer).train()
    torch.nn.Sequential(layer).eval()


def test_large_weights_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And quantised in parts: the same as at once."""
    weight, x = torch.randn(320, 192), torch.randn(30, 192).bfloat16()
    for kind in (Int8Linear, Int4Linear):
        whole = a_layer(kind, weight)
        for part in (1, 64 * 192 * 2, 192 * 7):
            monkeypatch.setattr(quantized, "PART", part)
            layer = a_layer(kind, weight)
            assert torch.equal(layer.weight, whole.weight) and torch.equal(layer.weight_scale, whole.weight_scale)
            assert torch.allclose(layer(x), whole.multiply(x), rtol=0.02, atol=0.1)
        monkeypatch.undo()
