"""How fast the operators are beside their PyTorch references, and beside copying as many bytes.

    python -m experiments.operators --out experiments/results/operators_cpu.json
    python -m experiments.operators --device cuda --out experiments/results/operators_cuda.json
    python -m experiments.operators --quick          # toy sizes and few rounds, to test the script

Each case is one operator on random numbers, `minifocus` beside its peers:

    reference   minifocus/ops/reference.py, in eager PyTorch
    indexing    column[index] of every column, for gather_tokens
    compiled    torch.compile of what the operator computes, for one item (on a GPU, where it can be timed fairly)
    copy        torch's copy of a tensor into a new one that reads and writes as many bytes together as the operator must.
                Neither writes to new pages of memory: the C library hands out again what the last call gave back

A round times one after the other, so that a change in the machine's speed falls on all; figures are medians over rounds,
ratios medians of each round's ratio. On the CPU a round in which one had too little of the processors is run again (clocks.py).
On a GPU, events are recorded around each call. A gigabyte is written before it, which
empties the L2 cache and keeps the GPU busy until the host has sent all that the call consists of; "host" is how long the
sending takes. "extra" is the largest growth of memory in use during one call, outputs included: resident
pages on the CPU (Linux only), torch's allocations on a GPU. "GB/s" counts what must be read and written, once each.

The last line of the output is the report as one JSON object. Exit status: 0 measured, 1 the operators run in plain PyTorch.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from examples.command_line import expect_file, expect_numbers, write_text
from minifocus import ops
from minifocus.cpu_memory import keep_freed_memory
from minifocus.ops import reference
from minifocus.samplers.vision_guided import pools_for

from .clocks import Spent, read
from .memory import extra_memory
from .record import environment
from .timing import columns, interleaved, ratio, remark

POOLS = pools_for(4, 3)
FLAT = [side for pool in POOLS for side in pool]
KEPT = 0.39  # of the tokens, the paper's share


@dataclass
class Case:
    """`runs`: the operator ("minifocus") and its peers. `bars`, which the project sets itself: figure → (at least or at
    most, bound)."""

    name: str
    sizes: str
    runs: dict[str, Callable[[], object]]
    bytes: int
    flops: int = 0
    bars: dict[str, tuple[str, float]] = field(default_factory=dict)
    calls: int = 1  # timed together, where one is too short for the clock


# --------------------------------------------------------------------------------------------------------------- cases


def mixed_choice(regions: int, generator: torch.Generator) -> torch.Tensor:
    """1×1, 2×2 and 4×4 at random, so that about KEPT of the tokens stay: 0.3 + 0.3 / 4 + 0.4 / 16 = 0.4."""
    return torch.multinomial(torch.tensor([0.4, 0.3, 0.3]), regions, replacement=True, generator=generator)


def copy_of(byte_count: int, device: str) -> Callable[[], object]:
    """A copy that reads half of `byte_count` and writes the other half."""
    source = torch.randint(1 << 30, (byte_count // 8,), dtype=torch.int32, device=device)
    return lambda: source.clone()


def region_cases(pictures: int, side: int, channels: int, dtype: torch.dtype, device: str) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(pictures * side * side, channels, generator=generator).to(device, dtype)
    grid = torch.tensor([[side, side]] * pictures)
    regions = pictures * (side // 4) ** 2
    choice = mixed_choice(regions, generator).to(device)
    context = (torch.randn(pictures, 3, channels, generator=generator) / channels**0.5).to(device)
    bias = torch.tensor([-0.4, 0.0, 0.0], device=device)
    tokens = int(reference.region_pool(x, grid, choice, 4, POOLS)[2][-1])
    routed = int(reference.region_route(x, grid, context, bias, 4, POOLS)[2][-1])
    row = channels * x.element_size()
    pool_bytes, route_bytes = (len(x) + tokens) * row, (len(x) + routed) * row + context.numel() * 4
    gpu = device == "cuda"
    sizes = f"{pictures} × {side}×{side}×{channels} {str(dtype)[6:]}, {tokens / len(x):.0%} of the tokens kept"
    return [
        Case(
            "region_pool",
            sizes,
            {
                "minifocus": lambda: torch.ops.minifocus.region_pool(x, grid, choice, 4, FLAT),
                "reference": lambda: reference.region_pool(x, grid, choice, 4, POOLS),
                "copy": copy_of(pool_bytes, device),
            },
            pool_bytes,
            bars={} if gpu else {"reference": ("at_least", 5.0), "copy": ("at_least", 0.7)},
        ),
        Case(
            "region_route",
            sizes.replace(f"{tokens / len(x):.0%}", f"{routed / len(x):.0%}"),
            {
                "minifocus": lambda: torch.ops.minifocus.region_route(x, grid, context, bias, 4, FLAT),
                "reference": lambda: reference.region_route(x, grid, context, bias, 4, POOLS),
                "copy": copy_of(route_bytes, device),
            },
            route_bytes,
            bars={"copy": ("at_least", 0.8)} if gpu else {},
        ),
    ]


def importance_case(text: int, visual: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    dim = 128
    q = torch.randn(text, heads, dim, generator=generator).to(device, dtype)
    k = torch.randn(visual, kv_heads, dim, generator=generator).to(device, dtype)
    cu_text, cu_visual = (torch.tensor([0, n], device=device) for n in (text, visual))
    scale = dim**-0.5

    def one_item(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        queries = q.transpose(0, 1).float()
        keys = k.transpose(0, 1).float().repeat_interleave(heads // kv_heads, dim=0)
        return (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1).amax(dim=0).mean(dim=0)

    runs: dict[str, Callable[[], object]] = {
        "minifocus": lambda: torch.ops.minifocus.importance(q, k, cu_text, cu_visual, scale),
        "reference": lambda: reference.importance(q, k, cu_text, cu_visual, scale),
    }
    bars = {"reference": ("at_least", 1.0), "extra": ("at_most", 0.1)}
    if device == "cuda":
        compiled = torch.compile(one_item, fullgraph=True)
        runs["compiled"] = lambda: compiled(q, k)
        bars = {"reference": ("at_least", 5.0), "compiled": ("at_least", 2.0)}
    return Case(
        "importance",
        f"T = {text}, N = {visual}, {heads} heads ({kv_heads} KV) of {dim}, {str(dtype)[6:]}",
        runs,
        (q.numel() + k.numel()) * q.element_size() + visual * 4,
        2 * heads * text * visual * dim,
        bars,
    )


def select_case(visual: int, device: str) -> Case:
    scores = torch.rand(visual, generator=torch.Generator().manual_seed(0)).pow(4).to(device)
    cu_visual = torch.tensor([0, visual], device=device)
    return Case(
        "select_top_p",
        f"N = {visual}, γ = 0.85",
        {
            "minifocus": lambda: torch.ops.minifocus.select_top_p(scores, cu_visual, 0.85),
            "reference": lambda: reference.select_top_p(scores, cu_visual, 0.85),
        },
        visual * 12,
        bars={"microseconds": ("at_most", 20.0)} if device == "cuda" else {},
        calls=10,
    )


def gather_case(rows: int, channels: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, channels, generator=generator).to(device, dtype)
    columns = [hidden, *(torch.randint(9, (rows,), generator=generator).to(device) for _ in range(3))]
    index = torch.randperm(rows, generator=generator)[: int(rows * KEPT)].sort().values.to(device)
    moved = 2 * len(index) * (channels * hidden.element_size() + 3 * 8)
    return Case(
        "gather_tokens",
        f"{len(index)} of {rows} rows of {channels} {str(dtype)[6:]} and three int64",
        {
            "minifocus": lambda: torch.ops.minifocus.gather_tokens(columns, index),
            "indexing": lambda: [column[index] for column in columns],
            "copy": copy_of(moved, device),
        },
        moved,
        bars={"copy": ("at_least", 0.85)} if device == "cuda" else {},
    )


def cases(device: str, quick: bool) -> list[Case]:
    side, channels, text, visual, heads, kv = (12, 256, 8, 300, 8, 2) if quick else (48, 4096, 64, 2304, 32, 8)
    if device == "cuda":
        half = torch.bfloat16
        return [
            *region_cases(8, side, channels, half, device),
            importance_case(text, visual, heads, kv, half, device),
            importance_case(text, visual, heads, kv, torch.float32, device),
            select_case(visual, device),
            select_case(4096, device),
            gather_case(8 * visual, channels, half, device),
        ]
    return [
        *region_cases(1, side, channels, torch.float32, device),
        *region_cases(1, side, channels, torch.bfloat16, device)[:1],
        importance_case(text, visual, heads, kv, torch.float32, device),
        importance_case(text, visual, heads, kv, torch.bfloat16, device),
        select_case(visual, device),
        gather_case(visual, channels, torch.float32, device),
    ]


# -------------------------------------------------------------------------------------------------------------- clocks


class Clock:
    """What a call takes on a device."""

    def __init__(self, device: str):
        self.gpu = device == "cuda"
        self.flush = torch.empty(1 << 30, dtype=torch.uint8, device=device) if self.gpu else None

    def spent(self, run: Callable[[], object], calls: int) -> Spent:
        if self.flush is None:
            begun = read()
            for _ in range(calls):
                run()
            return Spent.since(begun, calls=calls)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return Spent(start.elapsed_time(end) / 1e3)

    def host_seconds(self, run: Callable[[], object]) -> float:
        """How long a call keeps the host of a GPU."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------------------- report


def measure(case: Case, clock: Clock, rounds: int) -> dict[str, Any]:
    failed = {}
    for name, run in list(case.runs.items()):
        try:
            run()
            run()
        except Exception as error:  # of a peer, such as a compiler that is not there: the others are measured
            if name == "minifocus":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del case.runs[name]
    extra = {name: extra_memory(run, clock.gpu)[1] for name, run in case.runs.items()}
    timed = {name: partial(clock.spent, run, case.calls) for name, run in case.runs.items()}
    found = interleaved({name: lambda _, call=call: call() for name, call in timed.items()}, lambda one: [one], rounds)
    times = {name: [one.wall for one in values] for name, values in found.results.items()}
    spent = {name: columns(values) for name, values in found.results.items()}
    seconds = {name: median(values) for name, values in times.items()}
    sending = {name: partial(clock.host_seconds, run) for name, run in case.runs.items() if clock.gpu}
    sent = interleaved({name: lambda _, call=call: call() for name, call in sending.items()}, lambda _: [], rounds)
    host = {name: median(values) for name, values in sent.results.items()}
    ratios = {name: ratio(values, times["minifocus"]) for name, values in times.items() if name != "minifocus"}
    figures: dict[str, float | None] = {**ratios, "microseconds": seconds["minifocus"] * 1e6}
    if extra["minifocus"] is not None and extra.get("reference"):
        figures["extra"] = extra["minifocus"] / extra["reference"]
    bars = {}
    for name, (kind, bound) in case.bars.items():
        value = figures.get(name)
        met = None if value is None else (value >= bound if kind == "at_least" else value <= bound)
        bars[name] = {"value": value, kind: bound, "met": met}
    return {
        "operator": case.name,
        "sizes": case.sizes,
        "failed": failed,
        "seconds": seconds,
        **({} if clock.gpu else {"rounds": found.note(), "spent": spent}),
        **({"host_seconds": host} if clock.gpu else {}),
        "peer ÷ minifocus": ratios,
        "gb_per_second": case.bytes / seconds["minifocus"] / 1e9,
        "copy_gb_per_second": case.bytes / seconds["copy"] / 1e9 if "copy" in seconds else None,
        "tflop_per_second": case.flops / seconds["minifocus"] / 1e12 if case.flops else None,
        "extra_bytes": extra,
        "bars": bars,
    }


def print_case(result: dict[str, Any]) -> None:
    rate = f"{result['gb_per_second']:.1f} GB/s"
    if result["copy_gb_per_second"]:
        rate += f" (copy: {result['copy_gb_per_second']:.1f})"
    if result["tflop_per_second"]:
        rate += f", {result['tflop_per_second']:.3f} TFLOP/s"
    print(f"{result['operator']}, {result['sizes']}: {result['seconds']['minifocus'] * 1e6:.0f} µs, {rate}")
    for name, times in result["peer ÷ minifocus"].items():
        print(f"    {times:6.2f} × as fast as {name} ({result['seconds'][name] * 1e6:.0f} µs)")
    for name, reason in result["failed"].items():
        print(f"    not measured: {name}: {reason}")
    for name, seconds in result.get("host_seconds", {}).items():
        print(f"    {seconds * 1e6:9.0f} µs of the host for {name}")
    for name, size in result["extra_bytes"].items():
        print(f"    {'not measured' if size is None else f'{size / 1e6:.1f} MB':>12} extra for {name}")
    for name, bar in result["bars"].items():
        print(f"    bar {name}: {bar}")
    if "rounds" in result:
        print(f"    {remark(result['rounds'])}")


@command_line.guarded
def main() -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, help="of torch, on the CPU (torch's own default)")
    parser.add_argument("--quick", action="store_true", help="toy sizes and three rounds, to test the script")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "rounds")
    expect_numbers(arguments, 1, "threads", 1024)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if ops.BACKENDS[arguments.device] != "native":
        print(f"the operators run in plain PyTorch on {arguments.device}: nothing to compare", file=sys.stderr)
        return 1
    if arguments.device == "cpu":
        # Or else glibc decides, differently from run to run, for which outputs the system has to clear new pages each time:
        # five times what region_pool takes.
        keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
    clock, results = Clock(arguments.device), []
    report = {**environment(Path(__file__), "torch"), "device": device, "cases": results}
    expect_file(arguments.out, "out")
    if arguments.out:
        arguments.out.unlink(missing_ok=True)
    with torch.no_grad():
        for case in cases(arguments.device, arguments.quick):
            if arguments.quick:
                case.bars = {}  # they are set for the real sizes
            results.append(measure(case, clock, 3 if arguments.quick else arguments.rounds))
            print_case(results[-1])
            if arguments.out:  # after each: a later one may fail
                write_text(arguments.out, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report))  # in ASCII: a terminal may have no ÷, and its escape is JSON's own
    return 0


if __name__ == "__main__":
    command_line.run(main)
