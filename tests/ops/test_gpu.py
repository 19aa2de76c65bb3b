"""What only a GPU shows of the operators: graphs, streams, devices. Their properties there are in test_operators.py."""

from __future__ import annotations

import pytest
import torch

from minifocus import ops
from minifocus.ops import reference
from minifocus.testing import check_importance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
POOLS = [4, 4, 2, 2, 1, 1]


@pytest.fixture(autouse=True)
def _native() -> None:
    assert ops.BACKENDS["cuda"] == "native", "the compiled CUDA operators are missing"


def pipeline(x, context, bias, q, k, cu_text, cu_visual):
    """Every operator once, on buffers that stay where they are."""
    grid = torch.tensor([[13, 11]])
    tokens, source, offsets, choice = torch.ops.minifocus.region_route(x, grid, context, bias, 4, POOLS)
    pooled = torch.ops.minifocus.region_pool(x, grid, choice, 4, POOLS)
    scores = torch.ops.minifocus.importance(q, k, cu_text, cu_visual, 0.3)
    index, count = torch.ops.minifocus.select_top_p(scores, cu_visual, 0.7)
    (gathered,) = torch.ops.minifocus.gather_tokens([k], index)
    return tokens, source, offsets, choice, pooled[0], scores, index, count, gathered


def inputs(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).cuda()

    offsets = [torch.tensor([0, 5, 9]).cuda(), torch.tensor([0, 70, 143]).cuda()]
    return [normal(143, 40), normal(1, 3, 40), normal(3), normal(9, 8, 24), normal(143, 2, 24), *offsets]


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    written = int(expected[2][-1])  # rows of tokens beyond are not
    for one, other in zip(got, expected, strict=True):
        rows = slice(written) if one.shape == (143, 40) else slice(None)
        assert torch.equal(one[rows], other[rows])


def test_a_captured_graph_replays_on_new_inputs() -> None:
    """Nothing in the operators waits for the GPU or allocates behind the allocator's back: a graph takes them all."""
    static = inputs(0)
    pipeline(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pipeline(*static)
    for seed in (1, 2, 1):
        for buffer, value in zip(static, inputs(seed), strict=True):
            buffer.copy_(value)
        graph.replay()
        replayed = tuple(output.clone() for output in captured)
        assert_same(replayed, pipeline(*inputs(seed)))


def test_work_goes_to_the_current_stream() -> None:
    given = inputs(3)
    expected = pipeline(*given)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    slow = torch.randn(4096, 4096, device="cuda")
    fresh = [torch.zeros_like(value) for value in given[:5]] + given[5:]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            slow = slow @ slow / 4096
        for buffer, value in zip(fresh[:5], given[:5], strict=True):
            buffer.copy_(value)  # only after the products: on any other stream the operators would see zeros
        got = pipeline(*fresh)
    side.synchronize()
    assert_same(got, expected)


def test_work_goes_to_the_tensors_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    given = inputs(4)
    expected = pipeline(*given)
    with torch.cuda.device(0):
        got = pipeline(*(value.to("cuda:1") for value in given))
    assert_same(tuple(value.to("cuda:0") for value in got), expected)


def test_tensors_of_two_devices_are_refused() -> None:
    given = inputs(5)
    with pytest.raises(RuntimeError, match=r"^cu_visual: expected int64 \[\*\] on cuda:0, got int64 \[3\] on cpu$"):
        torch.ops.minifocus.importance(*given[3:6], given[6].cpu(), 0.3)


@pytest.mark.parametrize("tensor_cores", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text, visual, heads, kv_heads, dim", [(64, 2304, 32, 8, 128), (17, 130, 6, 2, 80), (1, 1, 1, 1, 8)]
)
def test_importance_with_tensor_cores_and_without(
    monkeypatch, tensor_cores, dtype, text, visual, heads, kv_heads, dim
) -> None:
    monkeypatch.setenv("MINIFOCUS_TENSOR_CORES", tensor_cores)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(text, heads, dim, generator=generator).to("cuda", dtype)
    k = torch.randn(visual, kv_heads, dim, generator=generator).to("cuda", dtype)
    cu_text, cu_visual = (torch.tensor([0, n]).cuda() for n in (text, visual))
    scores = torch.ops.minifocus.importance(q, k, cu_text, cu_visual, dim**-0.5)
    check_importance(scores, q, k, cu_text, cu_visual, dim**-0.5)


def test_wrappers_cut_outputs_to_size() -> None:
    x, context, bias = inputs(6)[:3]
    grid, pools = torch.tensor([[13, 11]]), [(4, 4), (2, 2), (1, 1)]
    tokens, source, offsets, choice = ops.region_route(x, grid, context, bias, 4, pools)
    expected = reference.region_pool(x, grid, choice, 4, pools)
    for one, other in zip((tokens, source, offsets), expected, strict=True):
        assert torch.equal(one, other)
