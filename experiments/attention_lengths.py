"""What a new length costs attention on a GPU: torch's default, which on Hopper is cuDNN's kernel, beside all others.

    python -m experiments.attention_lengths

Prints milliseconds a call. Nothing is interleaved: what a length costs depends on which lengths came before. minifocus keeps
away from cuDNN's (minifocus/attention_kernels.py). Exit status: 3 without a GPU.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from minifocus.attention_kernels import no_plans


def normal(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def decode(call: int) -> None:
    """One token, grouped by key head, with 300 and more before it."""
    k = normal(1, 8, 300 + call, 128)
    F.scaled_dot_product_attention(normal(1, 8, 4, 128), k, k)


def prefill(call: int) -> None:
    q = normal(1, 32, 300 + call, 128)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)


def train(call: int) -> None:
    """Forwards and backwards, 256 queries and their mask."""
    length = 900 + call
    q, k = normal(4, 9, 256, 64, grad=True), normal(4, 9, length, 64, grad=True)
    mask = torch.rand(4, 1, 256, length, device="cuda") < 0.8
    F.scaled_dot_product_attention(q, k, k, attn_mask=mask).sum().backward()


def milliseconds(attend: Callable[[int], None], calls: int) -> float:
    """A call, on average over so many, each of one more token than the last."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for call in range(calls):
        attend(call)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / calls * 1e3


@command_line.guarded
def main() -> int:
    command_line.Parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("attention_lengths: torch sees no GPU on this machine, so nothing was run", file=sys.stderr)
        return 3
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for attend in (decode, prefill, train):
        with no_plans():
            milliseconds(attend, 3)
            others = milliseconds(attend, 30)
        first, new, again = (milliseconds(attend, calls) for calls in (1, 30, 30))
        print(
            f"{attend.__name__}: without cuDNN {others:.2f}; by default the first {first:.0f}, new lengths {new:.2f}, ",
            end="",
        )
        print(f"the same lengths again {again:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    command_line.run(main)
