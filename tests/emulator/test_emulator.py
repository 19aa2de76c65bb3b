"""The emulator's own test: it finds the bugs planted in planted_bugs.cu, and none in the kernels that are right."""

from __future__ import annotations

import re
from typing import Any

import emulated
import numpy as np
import pytest
import torch

SOURCE = "tests/emulator/planted_bugs.cu"


def run(
    kernel: str,
    mode: str = "checked",
    n: int = 512,
    grid: tuple[int, ...] = (2,),
    block: tuple[int, ...] = (256,),
    shared_bytes: int = 1024,
    y: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Runs a kernel of planted_bugs.cu; → y and the counter. y begins unwritten, as long as x, unless one is given."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) if x is None else x
    result = emulated.garbage(len(x), dtype=torch.float32) if y is None else y.clone()
    counter = torch.zeros(1, dtype=torch.int32)
    shape = [(*grid, 1, 1)[:3], (*block, 1, 1)[:3]]
    arrays = emulated.array(x), emulated.array(result), y is not None, emulated.array(counter)
    module = emulated.load("planted_bugs", mode)
    emulated.call(module, module.run, kernel, *arrays, *shape, shared_bytes)
    return result, int(counter)


def reported_lines(kernel: str) -> list[int]:
    """The lines marked "// reported" in a kernel."""
    lines = (emulated.ROOT / SOURCE).read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if f"void {kernel}(" in line)
    end = lines.index("}", begin)
    return [i + 1 for i in range(begin, end) if "// reported" in lines[i]]


# ------------------------------------------------------------------------------------------------------ right kernels


@pytest.fixture(params=["fast", "checked"])
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=list(emulated.SCHEDULES))
def any_schedule(request: pytest.FixtureRequest) -> Any:
    with emulated.schedule(**emulated.SCHEDULES[request.param]):
        yield request.param


def test_right_kernels_pass(mode: str, any_schedule: str) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(1024)
    padded[:1000] = x
    sums = padded.view(4, 256).double().sum(1)

    y, _ = run("block_sum", mode, grid=(4,), x=x, y=torch.zeros(4))
    torch.testing.assert_close(y.double(), sums, atol=1e-4, rtol=0)

    y, _ = run("warp_exchange", mode, grid=(4,), x=padded)
    assert torch.equal(y, padded.view(-1, 2).flip(1).flatten() + 2)

    y, counter = run("last_block_adds", mode, grid=(4,), x=x, y=torch.zeros(4))
    torch.testing.assert_close(y[0].double(), sums.sum(), atol=1e-4, rtol=0)
    assert counter == 4

    y, _ = run("chain_of_blocks", mode, grid=(9,), y=torch.zeros(18))
    assert y.view(torch.int64).tolist() == list(range(1, 10))


def test_largest_block(mode: str) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2))
    y, _ = run("large_block", mode, x=x, grid=(1,), block=(1024,), shared_bytes=225 * 1024)
    assert torch.equal(y, 225 * 256 - 1 - torch.arange(1024) + x)


def test_warp_operations(mode: str, any_schedule: str) -> None:
    values = np.random.default_rng(3).integers(-100, 100, 64)
    x = torch.zeros(16 * 64)
    x[:64] = torch.from_numpy(values)
    y, _ = run("warp_operations", mode, grid=(1,), block=(64,), x=x)

    lane = np.arange(32)
    expected = []
    for v in values.reshape(2, 32):
        masked = v & 1023
        both = [v[:16].max()] * 16 + [v[16:].min()] * 16
        expected.append(
            [
                np.full(32, v[5]),
                v[lane // 8 * 8 + lane * 3 % 8],
                v[np.where(lane >= 2, lane - 2, lane)],
                v[np.where(lane % 16 < 12, lane + 4, lane)],
                v[lane ^ 9],
                np.full(32, (np.fmod(v, 3) == 0).sum()),
                np.full(32, int((v < -90).any()) + 2),
                np.full(32, v.sum()),
                np.full(32, v.min()),
                np.full(32, v.max()),
                np.full(32, np.bitwise_and.reduce(masked | 64)),
                np.full(32, np.bitwise_or.reduce(masked) + np.bitwise_xor.reduce(masked)),
                np.array([1 + np.flatnonzero(np.fmod(v, 5) == np.fmod(own, 5))[0] for own in v]),
                np.full(32, (values > 0).sum()),
                np.full(32, 1),
                np.array(both),
            ]
        )
    assert y.view(16, 64).numpy().astype(int).tolist() == np.concatenate(expected, axis=1).tolist()


# ------------------------------------------------------------------------------------------------------- planted bugs

PLANTED: list[tuple[str, dict[str, Any], str, str]] = [  # kernel, how it is run, modes that find it, what is said
    ("exit_before_barrier", dict(n=500), "both", r"barrier: 12 of 256 threads exited"),
    ("divergent_barriers", {}, "both", r"barrier: divergent __syncthreads"),
    ("barrier_in_uneven_loop", {}, "both", r"barrier: \d+ of 256 threads exited"),
    ("barrier_against_warp", {}, "both", r"deadlock: 256 of 256 threads"),
    ("half_warp_shuffle", {}, "both", r"warp: .* in another operation"),
    ("shuffle_from_exited", dict(n=500), "both", r"warp: lane \d+ shuffles from lane 31, which has exited"),
    ("lane_outside_its_mask", {}, "both", r"warp: lane \d+ is not in its own mask 0000ffff"),
    ("failing_check", dict(n=500), "both", r"check: DEVICE_CHECK\(i < n\) does not hold"),
    ("static_shared_overrun", {}, "checked", r"bounds: index 256 is outside"),
    (
        "dynamic_shared_overrun",
        {},
        "checked",
        r"memcheck: read of 4 bytes .*'dynamic shared memory' of 1024 bytes, at byte 1024",
    ),
    ("vector_tail", dict(n=498), "checked", r"memcheck: read of 4 bytes outside .*'x' of 1992 bytes, at byte 199[26]"),
    (
        "half_outside",
        dict(n=499),
        "checked",
        r"memcheck: read of 8 bytes at byte 1992 of 'x' crosses its end at byte 1996",
    ),
    ("far_outside", {}, "checked", r"memcheck: read of 4 bytes outside of every buffer"),
    ("write_to_input", {}, "checked", r"memcheck: write to 'x', which is read-only"),
    ("another_threads_stack", {}, "checked", r"memcheck: read of 4 bytes outside of every buffer"),
    ("misaligned_vector", {}, "checked", r"alignment: address 0x[0-9a-f]+4 is misaligned"),
    ("unwritten_shared", {}, "checked", r"initcheck: read of '__shared__ variables' at byte \d+, which is unwritten"),
    ("shared_of_the_last_block", {}, "checked", r"initcheck: read of '__shared__ variables'"),
    (
        "last_unwritten",
        {},
        "checked",
        r"initcheck: 4 of the 2048 bytes of output 'y' were never written, the first at byte 2044",
    ),
    ("integer_overflow", {}, "checked", r"arithmetic: an integer product overflows"),
    ("missing_barrier", {}, "checked", r"racecheck: .*'__shared__ variables'.* of its block"),
    ("early_reuse", {}, "checked", r"racecheck: (write to|read of) '__shared__ variables' .* of its block"),
    ("missing_syncwarp", {}, "checked", r"racecheck: .*'__shared__ variables'|initcheck: .*'__shared__ variables'"),
    ("plain_accumulation", dict(y=torch.zeros(1)), "checked", r"racecheck: .*'y' at byte 0 .* of another block"),
    ("atomic_against_plain", {}, "checked", r"racecheck: .*'counter' at byte 0"),
    ("missing_fence", dict(y=torch.zeros(2)), "checked", r"racecheck: read of 'y' .* of another block"),
]


@pytest.mark.parametrize(("kernel", "how", "modes", "message"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_planted_bug_is_reported(kernel: str, how: dict[str, Any], modes: str, message: str, any_schedule: str) -> None:
    for mode in ["fast", "checked"] if modes == "both" else ["checked"]:
        with pytest.raises(emulated.EmulationError, match=message) as raised:
            run(kernel, mode, **how)
        text = str(raised.value)
        marked = reported_lines(kernel)
        if marked:
            named = [int(line) for line in re.findall(re.escape(SOURCE) + r":(\d+)", text)]
            assert named and named[-1] in marked, text
        if not re.search("deadlock|never written", message):
            assert re.search(rf"in kernel .*{kernel}\b.*, block \(\d+, 0, 0\), thread \(\d+, 0, 0\)", text), text


def test_spin_wait_is_reported(mode: str) -> None:
    with pytest.raises(emulated.EmulationError, match="livelock") as raised:
        run("spin_wait", mode, grid=(1,), y=torch.zeros(1))
    assert f"{SOURCE}:{reported_lines('spin_wait')[0]}" in str(raised.value) or mode == "fast"


def test_chain_by_index_needs_blocks_in_order() -> None:
    y, _ = run("chain_by_index", grid=(5,), y=torch.zeros(10))
    assert y.view(torch.int64).tolist() == [1, 2, 3, 4, 5]
    with emulated.schedule(order="reverse"), pytest.raises(emulated.EmulationError, match="livelock") as raised:
        run("chain_by_index", grid=(5,), y=torch.zeros(10))
    assert f"{SOURCE}:{reported_lines('chain_by_index')[0]}" in str(raised.value)


@pytest.mark.parametrize("kernel", ["append_in_any_order", "add_in_any_order"])
def test_order_of_atomics_shows_between_schedules(kernel: str, mode: str) -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(4)).exp()
    results = []
    for options in (dict(order="forward"), dict(order="forward"), dict(order="reverse")):
        with emulated.schedule(**options):
            results.append(run(kernel, mode, x=x, y=torch.zeros(512))[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_preemption_finds_check_then_act(mode: str) -> None:
    def counted(**options: Any) -> int:
        with emulated.schedule(**options):
            return run("check_then_act", mode, grid=(1,), y=torch.zeros(1))[1]

    assert counted() == 10
    found = [counted(order="random", seed=seed, preempt=5) for seed in range(20)]
    assert sum(count > 10 for count in found) >= 15
    assert found == [counted(order="random", seed=seed, preempt=5) for seed in range(20)], "the same seed, the same run"


INVALID = [
    (dict(grid=(0,)), "the grid is empty"),
    (dict(grid=(1, 65536)), "the grid is too large"),
    (dict(grid=(2**31,)), "the grid is too large"),
    (dict(block=(0,)), "the block is empty"),
    (dict(block=(1025,)), "the block is too large in one direction"),
    (dict(block=(1, 1, 65)), "the block is too large in one direction"),
    (dict(block=(64, 32)), "the block has more than 1024 threads"),
    (dict(shared_bytes=225 * 1024 + 1), "more dynamic shared memory than the kernel is allowed"),
]


@pytest.mark.parametrize(("how", "message"), INVALID)
def test_invalid_launch_is_reported(how: dict[str, Any], message: str, mode: str) -> None:
    with pytest.raises(emulated.EmulationError, match=f"launch: invalid configuration, {message}"):
        run("block_sum", mode, **how)


def test_memset_is_checked(mode: str) -> None:
    module = emulated.load("planted_bugs", mode)
    memory = np.full(16, 7, np.uint8)
    emulated.call(module, module.clear, memory, 16, False)
    assert (memory == 0).all()
    with pytest.raises(
        emulated.EmulationError, match="cudaMemsetAsync of 17 bytes at byte 0 of 'array', which is too small"
    ):
        emulated.call(module, module.clear, memory, 17, False)
    with pytest.raises(
        emulated.EmulationError, match="cudaMemsetAsync of 16 bytes at byte 0 of 'array', which is read-only"
    ):
        emulated.call(module, module.clear, memory, 16, True)


def test_memset_counts_as_writing() -> None:
    module = emulated.load("planted_bugs", "checked")
    with pytest.raises(
        emulated.EmulationError, match="1 of the 16 bytes of output 'array' were never written.* at byte 15"
    ):
        emulated.call(module, module.clear, np.zeros(16, np.uint8), 15, False)


def test_an_error_is_forgotten_by_the_next_call(mode: str) -> None:
    with pytest.raises(emulated.EmulationError):
        run("exit_before_barrier", mode, n=500)
    y, _ = run("exit_before_barrier", mode, n=512)
    assert len(y) == 512


# ------------------------------------------------------------------------------------------------------------ numbers


def some_floats() -> np.ndarray[Any, Any]:
    """Random bit patterns; every bfloat16 and half, their midpoints, and the neighbours of both."""
    every = np.arange(2**16, dtype=np.uint16)
    halves = every.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        middles = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    bits = [
        every.astype(np.uint32) << 16,
        (every.astype(np.uint32) << 16) + 0x8000,
        halves.view(np.uint32),
        middles.view(np.uint32),
    ]
    bits = [b + np.uint32(step) for b in bits for step in (0, 1, 2**32 - 1)]
    random = np.random.default_rng(5).integers(0, 2**32, 500_000, dtype=np.uint32)
    return np.concatenate([*bits, random]).view(np.float32)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("half", torch.float16)])
def test_conversions(name: str, dtype: torch.dtype) -> None:
    module = emulated.load("planted_bugs", "fast")
    every = np.arange(2**16, dtype=np.uint16)
    as_torch = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    as_cuda = getattr(module, f"from_{name}")(every)
    nan = np.isnan(as_torch)
    assert np.array_equal(np.isnan(as_cuda), nan)
    assert np.array_equal(as_cuda.view(np.uint32)[~nan], as_torch.view(np.uint32)[~nan])

    floats = some_floats()
    as_torch = torch.from_numpy(floats).to(dtype).view(torch.int16).numpy().view(np.uint16)
    as_cuda = getattr(module, f"to_{name}")(floats)
    nan = np.isnan(floats)
    assert nan.sum() > 1000 and (np.abs(floats) < 1e-38).sum() > 1000
    assert np.array_equal(as_cuda[~nan], as_torch[~nan])
    assert (as_cuda[nan] == 0x7FFF).all(), "CUDA has one NaN"


# ----------------------------------------------------------------------------------------------------------- building


def test_missing_compiler_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    emulated._compiler.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"needs g\+\+, which is not on the PATH"):
            emulated.build("planted_bugs", "fast")
    finally:
        emulated._compiler.cache_clear()


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="no such option: sed"), emulated.schedule(sed=1):
        pass
