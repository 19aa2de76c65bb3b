"""Large arrays on a CPU: the pages they come in, freed ones given back or kept, and what is written in place."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import python

import minifocus
from minifocus.activations import ACTIVATIONS, quick_gelu, silu, times
from minifocus.generate import Generation

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = """
import minifocus, torch
before = torch.ones(2**24)
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("AnonHugePages:"):
        print(int(line.split()[1]) * 1024)
"""
# Arrays that are freed while a later one lives: what of them stays with the process?
FREED = """
import sys, torch
from minifocus import cpu_memory
getattr(cpu_memory, sys.argv[1])()
def own():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
torch.ones(6 * 2**20)  # 24 MB, freed: by itself glibc then takes smaller arrays out of its own heap
begun = own()
many = [torch.ones(2**22) for _ in range(8)]
kept = [torch.ones(2**20)]  # behind them in the heap, if they are in one
del many
print(own() - begun)
"""


def output_of(program: str, **variables: str) -> int:
    """In an interpreter of its own, for torch reads variables when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | variables
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="Linux gives no huge pages here")
def test_large_arrays_come_in_huge_pages_unless_the_user_has_said_otherwise() -> None:
    wanted, refused = (output_of(HUGE, **given) for given in ({}, {"THP_MEM_ALLOC_ENABLE": "0"}))
    if "[madvise]" in THP.read_text():
        assert refused == 0
    assert wanted >= 2**24  # of 64 MB, as much as the system found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_arrays_are_given_back_or_kept(tmp_path: Path) -> None:
    program = tmp_path / "freed.py"
    program.write_text(FREED)
    given_back, kept, by_default = (
        int(python(program, name).stdout) for name in ("give_back_freed_memory", "keep_freed_memory", "want_huge_pages")
    )
    assert given_back < 2**24 < 2**26 < min(kept, by_default)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_the_same_whether_something_learns_or_not(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (4 * torch.randn(50, 30, generator=generator) for _ in range(3))
    x, y, act = x.to(dtype), y.to(dtype), ACTIVATIONS[name]
    learning = x.clone().requires_grad_()
    expected = act(learning * 1) * y
    assert torch.equal(times(act(x.clone()), y), expected)
    other = y.clone().requires_grad_()
    product = times(act(learning * 1), other)
    assert torch.equal(product, expected)
    (product * weight).sum().backward()
    exact = learning.detach().double().requires_grad_()
    plain = {"quick_gelu": lambda v: v * torch.sigmoid(1.702 * v), "silu": F.silu, "swish": F.silu}.get(name, act)
    (plain(exact) * y.double() * weight.double()).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert learning.grad is not None and exact.grad is not None and other.grad is not None
    assert torch.allclose(learning.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 4)
    assert torch.allclose(other.grad.double(), plain(x.double()) * weight.double(), rtol=tolerance, atol=tolerance * 4)


def test_what_learns_is_not_written_over() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    before = x.detach().clone()
    for act in (silu, quick_gelu):
        act(x)
        times(x, torch.ones(6))
        times(before, x)
    assert torch.equal(x, before) and not torch.equal(silu(before.clone()), before)


def test_a_product_takes_the_place_of_its_first_factor() -> None:
    x, y = torch.randn(2, 4, 6)
    assert times(x, y).data_ptr() == x.data_ptr() and silu(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("wanted, room", [(3, 3), (500, 128)])
def test_a_cache_has_room_for_the_answer_and_little_more(wanted: int, room: int) -> None:
    model = minifocus.load(TINY, "none")
    generation = Generation(model, model.processor, [None], ["What?"], {"max_new_tokens": wanted})
    generation.prefill()
    for cache in generation.caches:
        assert cache._keys.shape[2] == cache._values.shape[2] == cache.length + room
