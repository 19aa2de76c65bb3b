"""What the operators demand of their arguments, in Python: csrc/torch_glue.h says the same, in the same words.

Every function raises RuntimeError, as torch's own operators do, naming the argument, what was expected and what came.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

MAX_WINDOW = 1024
MAX_BRANCHES = 8
MAX_COLUMNS = 8
# Those that a column of gather_tokens may have, and that messages name.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(text)


def given(name: str, value: object) -> None:
    """torch lets None pass for a tensor of an operator's schema."""
    expect(value is not None, f"{name}: expected a tensor, got None")


def no_tensor(name: str, value: object) -> None:
    """torch would take a tensor of one element for a number, and cut off its fraction if a whole number is expected."""
    expect(not isinstance(value, torch.Tensor), f"{name}: expected a number, got a tensor")


def _describe(dtype: str, sizes: Sequence[int | None], device: torch.device) -> str:
    listed = ", ".join("*" if size is None else str(size) for size in sizes)
    return f"{dtype} [{listed}] on {device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if dtype in DTYPES else "another dtype"


def tensor(
    name: str, value: torch.Tensor, dtypes: list[torch.dtype], sizes: list[int | None], device: torch.device
) -> None:
    """`sizes`: None where any size will do."""
    given(name, value)
    fits = value.ndim == len(sizes) and all(s is None or s == came for s, came in zip(sizes, value.shape, strict=False))
    if fits and value.dtype in dtypes and value.device == device:
        return
    *others, last = map(_name, dtypes)
    expected = f"{', '.join(others)} or {last}" if others else last
    came = _describe(_name(value.dtype), value.shape, value.device)
    raise RuntimeError(f"{name}: expected {_describe(expected, sizes, device)}, got {came}")


def _floating(value: torch.Tensor) -> list[torch.dtype]:
    on_cpu = [torch.float64] if value.device.type == "cpu" else []
    return [torch.float32, torch.bfloat16, torch.float16, *on_cpu]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated and returned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def offsets(name: str, value: torch.Tensor, rows: int, device: torch.device) -> None:
    """Offsets that begin with 0, never fall and end with `rows`."""
    tensor(name, value, [torch.int64], [None], device)
    expect(len(value) >= 1, f"{name}: expected at least one number, got none")
    expect(rows == 0 or len(value) >= 2, f"{name}: expected offsets from 0 to {rows}, got one number")
    numbers = value.tolist()
    for before, after in itertools.pairwise(numbers):
        expect(before <= after, f"{name}: expected offsets that never fall, got {before} before {after}")
    expect(
        numbers[0] == 0 and numbers[-1] == rows,
        f"{name}: expected offsets from 0 to {rows}, got {numbers[0]} to {numbers[-1]}",
    )


def _regions(x: torch.Tensor, grid_hw: torch.Tensor, window: int, pools: list[tuple[int, int]]) -> int:
    """The number of regions."""
    given("x", x)
    tensor("x", x, _floating(x), [None, None], x.device)
    tensor("grid_hw", grid_hw, [torch.int64], [None, 2], torch.device("cpu"))
    expect(1 <= window <= MAX_WINDOW, f"window: expected from 1 to {MAX_WINDOW}, got {window}")
    expect(
        1 <= len(pools) <= MAX_BRANCHES,
        f"pools: expected from 1 to {MAX_BRANCHES} pairs of numbers, got {2 * len(pools)} numbers",
    )
    for h, w in pools:
        fits = (h, w) == (0, 0) or (h > 0 and w > 0 and window % h == 0 and window % w == 0)
        expect(fits, f"pools: expected pairs that divide the window {window}, or (0, 0), got ({h}, {w})")
    cells = regions = 0
    for h, w in grid_hw.tolist():
        expect(
            h >= 0 and w >= 0 and h * w <= len(x),
            f"grid_hw: expected maps of at most {len(x)} cells, as x has, got ({h}, {w})",
        )
        cells += h * w
        expect(cells <= len(x), f"grid_hw: expected {len(x)} cells in all, as x has, got more")
        regions += -(-h // window) * -(-w // window)
    expect(cells == len(x), f"grid_hw: expected {len(x)} cells in all, as x has, got {cells}")
    return regions


def region_pool(
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    choice: torch.Tensor,
    window: int,
    pools: list[tuple[int, int]],
    weight: torch.Tensor | None,
) -> None:
    regions = _regions(x, grid_hw, window, pools)
    tensor("choice", choice, [torch.int64], [regions], x.device)
    wrong = choice[(choice < 0) | (choice >= len(pools))]
    expect(not len(wrong), f"choice: expected from 0 to {len(pools) - 1}, got {wrong[0] if len(wrong) else None}")
    if weight is not None:
        tensor("weight", weight, [wide(x.dtype)], [regions], x.device)


def region_route(
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    context: torch.Tensor,
    bias: torch.Tensor,
    window: int,
    pools: list[tuple[int, int]],
) -> None:
    _regions(x, grid_hw, window, pools)
    tensor("context", context, [wide(x.dtype)], [len(grid_hw), len(pools), x.shape[1]], x.device)
    tensor("bias", bias, [wide(x.dtype)], [len(pools)], x.device)


def importance(q: torch.Tensor, k: torch.Tensor, cu_text: torch.Tensor, cu_visual: torch.Tensor) -> None:
    given("q", q)
    tensor("q", q, _floating(q), [None, None, None], q.device)
    tensor("k", k, [q.dtype], [None, None, q.shape[2]], q.device)
    heads, kv_heads = q.shape[1], k.shape[1]
    divides = kv_heads >= 1 and heads >= 1 and heads % kv_heads == 0
    expect(divides, f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")
    expect(q.shape[2] >= 1, "q: expected heads of at least 1 channel, got 0")
    offsets("cu_text", cu_text, len(q), q.device)
    offsets("cu_visual", cu_visual, len(k), q.device)
    expect(
        len(cu_text) == len(cu_visual),
        f"cu_visual: expected as many offsets as cu_text, {len(cu_text)}, got {len(cu_visual)}",
    )


def select_top_p(scores: torch.Tensor, cu_visual: torch.Tensor, keep: int | None) -> None:
    given("scores", scores)
    tensor("scores", scores, _floating(scores), [None], scores.device)
    offsets("cu_visual", cu_visual, len(scores), scores.device)
    expect(keep is None or keep >= 0, f"keep: expected at least 0, got {keep}")


def gather_tokens(columns: list[torch.Tensor], index: torch.Tensor) -> None:
    expect(
        1 <= len(columns) <= MAX_COLUMNS,
        f"columns: expected from 1 to {MAX_COLUMNS} tensors, got {len(columns)}",
    )
    given("index", index)
    tensor("index", index, [torch.int64], [None], index.device)
    for column in columns:
        came = _describe(_name(column.dtype), column.shape, column.device)
        expect(
            column.ndim >= 1 and column.dtype in DTYPES and column.device == index.device,
            f"columns: expected tensors of rank 1 or more where index is, got {came}",
        )
        rows = len(columns[0])
        expect(len(column) == rows, f"columns: expected {rows} rows in each, as the first has, got {len(column)}")
    wrong = index[(index < -1) | (index >= len(columns[0]))]
    expect(not len(wrong), f"index: expected from -1 to {len(columns[0]) - 1}, got {wrong[0] if len(wrong) else None}")
