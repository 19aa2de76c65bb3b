"""Calls every operator while another process writes to its index tensors: two right contents in turn, or a wrong one.

    python tests/ops/racing_writer.py 0.5        # seconds for each operator

A call may work or raise RuntimeError, because an operator has to use what it has checked. If one reads a tensor again after
the check, this program crashes. tests/ops/test_operators.py runs it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from minifocus import ops
from minifocus.ops.reference import region_pool

OPERATORS = torch.ops.minifocus
GENERATOR = torch.Generator().manual_seed(0)
POOLS = [4, 4, 2, 2, 1, 1]
FAR = 2**40


def calls() -> dict[str, tuple[list[tuple[torch.Tensor, torch.Tensor]], Callable[..., Any]]]:
    """For each operator, some tensors with two contents each, and the call with these tensors."""
    x = torch.randn(48 * 48, 130, generator=GENERATOR)
    maps, other_maps = torch.tensor([[48, 48], [0, 0]]), torch.tensor([[16, 144], [0, 0]])
    choice, other_choice = (torch.randint(3, (144,), generator=GENERATOR) for _ in range(2))
    offsets = region_pool(x, maps, choice, 4, [(4, 4), (2, 2), (1, 1)])[2]
    context, bias = torch.randn(2, 3, 130, generator=GENERATOR), torch.zeros(3)
    q, k = torch.randn(3, 2, 8), torch.randn(3000, 2, 8)
    words, tokens = torch.tensor([0, 3, 3]), torch.tensor([0, 3000, 3000])
    scores = torch.rand(3000, generator=GENERATOR)
    index = torch.randint(-1, 2304, (9000,), generator=GENERATOR)
    within = torch.tensor([0, FAR, 0])
    return {
        "region_pool": (
            [(maps, other_maps), (choice, other_choice)],
            lambda maps, choice: OPERATORS.region_pool(x, maps, choice, 4, POOLS),
        ),
        "region_pool_backward": (
            [(choice, other_choice), (offsets, offsets + FAR)],
            lambda choice, offsets: OPERATORS.region_pool_backward(x, x, maps, choice, offsets, 4, POOLS),
        ),
        "region_route": (
            [(maps, other_maps), (bias, torch.tensor([9.0, 0, float("nan")]))],
            lambda maps, bias: OPERATORS.region_route(x, maps, context, bias, 4, POOLS),
        ),
        "importance": (
            [(words, words + within), (tokens, tokens + within)],
            lambda words, tokens: OPERATORS.importance(q, k, words, tokens, 0.3),
        ),
        "select_top_p": (
            [(scores, scores.flip(0)), (tokens, tokens + within)],
            lambda scores, tokens: OPERATORS.select_top_p(scores, tokens, 0.5),
        ),
        "gather_tokens": ([(index, index + FAR)], lambda index: OPERATORS.gather_tokens([x], index)),
    }


def write(tensors: list[torch.Tensor], contents: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write both contents in turn, as long as the parent process lives."""
    parent = os.getppid()
    arrays = [(t.numpy(), one.numpy(), other.numpy()) for t, (one, other) in zip(tensors, contents, strict=True)]
    while os.getppid() == parent:
        for array, _, other in arrays:
            array[...] = other
        for array, one, _ in arrays:
            array[...] = one


def main(seconds: float) -> None:
    assert [schema.split("(")[0] for schema in ops.backend.schemas()] == list(calls())
    for name, (contents, run) in calls().items():
        print(name, end=" ", flush=True)
        tensors = [one.clone().share_memory_() for one, _ in contents]
        writer = os.fork()  # a process of its own, which Python's lock does not stop
        if writer == 0:
            write(tensors, contents)
            os._exit(0)
        end, right = time.monotonic() + seconds, 0
        try:
            while time.monotonic() < end or not right:
                try:
                    run(*tensors)
                    right += 1
                except RuntimeError as error:  # it found a wrong content, or a mixture of both
                    assert ": expected " in str(error), error
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        print(right, "calls", flush=True)
    print(ops.BACKENDS["cpu"])


if __name__ == "__main__":
    main(float(sys.argv[1]))
