"""What torch is told of each operator: its schema, the reference's kernel, a fake kernel for tracing, and its gradient.

So that nothing waits for a GPU, the registered operators return outputs with room for all that they might keep: on a GPU,
tokens and their source have a row for each cell, of which the first offsets[-1] count; select_top_p's index has a place for each
score, those of an item's kept ones first and then -1. Pools are flat: [height, width, height, width, …].

Gradients are of the first order and in reverse: what torch would silently take for zeros raises NotImplementedError, a
RuntimeError. That is forward mode (torch.func.jvp), second derivatives of all but gather_tokens, and gradients of importance.

To add an operator: its meaning in reference.py, what it demands in checks.py, its schema, fake kernel and gradient here, and in
__init__.py the function that cuts its outputs to size. csrc/torch_glue.h says what its C++ and CUDA need, minifocus/testing.py
how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import backend, checks, reference
from .checks import wide
from .reference import Pool

SCHEMAS = (
    "region_pool(Tensor x, Tensor grid_hw, Tensor choice, int window, int[] pools, Tensor? weight=None)"
    " -> (Tensor tokens, Tensor source, Tensor offsets)",
    "region_pool_backward(Tensor grad_tokens, Tensor x, Tensor grid_hw, Tensor choice, Tensor offsets, int window,"
    " int[] pools, Tensor? weight=None) -> (Tensor grad_x, Tensor grad_weight)",
    "region_route(Tensor x, Tensor grid_hw, Tensor context, Tensor bias, int window, int[] pools)"
    " -> (Tensor tokens, Tensor source, Tensor offsets, Tensor choice)",
    "importance(Tensor q, Tensor k, Tensor cu_text, Tensor cu_visual, float scale) -> Tensor",
    "select_top_p(Tensor scores, Tensor cu_visual, float gamma=0., int? keep=None) -> (Tensor index, Tensor count)",
    "gather_tokens(Tensor[] columns, Tensor index) -> Tensor[]",
)


# ------------------------------------------------------------------------------------------------ the reference's kernels


def _region_pool_backward(
    grad_tokens: torch.Tensor,
    x: torch.Tensor,
    grid_hw: torch.Tensor,
    choice: torch.Tensor,
    offsets: torch.Tensor,
    window: int,
    pools: list[Pool],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    own = reference.region_pool(x, grid_hw, choice, window, pools, weight)[2]
    checks.tensor("grad_tokens", grad_tokens, [x.dtype], [None, x.shape[1]], x.device)
    checks.tensor("offsets", offsets, [torch.int64], [len(choice) + 1], x.device)
    checks.expect(torch.equal(own, offsets), "offsets: expected region_pool's for this choice")
    count, rows = int(own[-1]), len(grad_tokens)
    checks.expect(rows >= count, f"grad_tokens: expected at least {count} rows, got {rows}")
    grad = grad_tokens[:count]
    grad_x, grad_weight = reference.region_pool_backward(grad, x, grid_hw, choice, window, pools, weight)
    return grad_x, x.new_empty(0, dtype=wide(x.dtype)) if grad_weight is None else grad_weight


def _select_top_p(
    scores: torch.Tensor, cu_visual: torch.Tensor, gamma: float = 0.0, keep: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    kept, count = reference.select_top_p(scores, cu_visual, gamma, keep)
    index = torch.full_like(scores, -1, dtype=torch.int64)
    for own, begin in zip(kept.split(count.tolist()), cu_visual.tolist(), strict=False):
        index[begin : begin + len(own)] = own
    return index, count


# For every device without compiled operators. reference.py's function itself, but where the registered operator has other
# arguments or results; pools come as pairs.
_kernels: dict[str, Callable[..., Any]] = {
    "region_pool": reference.region_pool,
    "region_pool_backward": _region_pool_backward,
    "region_route": reference.region_route,
    "importance": reference.importance,
    "select_top_p": _select_top_p,
    "gather_tokens": reference.gather_tokens,
}
REFERENCE = {name: backend.kernel(function) for name, function in _kernels.items()}
BACKENDS = backend.load(SCHEMAS, REFERENCE)  # {"cpu": "native", "cuda": "reference"}, say


# ------------------------------------------------------------------------------------------------------- shapes for tracing


def _same_device(
    *, grid_hw: torch.Tensor | None = None, weight: torch.Tensor | None = None, **tensors: torch.Tensor
) -> None:
    """torch calls a fake kernel, and no other, as soon as one of the tensors is on the meta device. The first of `tensors`
    says where the others have to be."""
    for name, value in tensors.items():
        checks.given(name, value)
    first = next(iter(tensors.values()))
    for name, value in (tensors if weight is None else tensors | {"weight": weight}).items():
        checks.tensor(name, value, [value.dtype], [None] * value.ndim, first.device)
    if grid_hw is not None and first.device.type != "meta":
        checks.tensor("grid_hw", grid_hw, [grid_hw.dtype], [None] * grid_hw.ndim, torch.device("cpu"))


@torch.library.register_fake("minifocus::region_pool")
def _(x, grid_hw, choice, window, pools, weight=None):  # type: ignore[no-untyped-def]
    _same_device(x=x, grid_hw=grid_hw, choice=choice, weight=weight)
    rows = torch.library.get_ctx().new_dynamic_size()  # it depends on what is in choice
    return x.new_empty(rows, x.shape[1]), choice.new_empty(rows), choice.new_empty(choice.shape[0] + 1)


@torch.library.register_fake("minifocus::region_pool_backward")
def _(grad_tokens, x, grid_hw, choice, offsets, window, pools, weight=None):  # type: ignore[no-untyped-def]
    _same_device(x=x, grid_hw=grid_hw, grad_tokens=grad_tokens, choice=choice, offsets=offsets, weight=weight)
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else choice.shape[0], dtype=wide(x.dtype))


@torch.library.register_fake("minifocus::region_route")
def _(x, grid_hw, context, bias, window, pools):  # type: ignore[no-untyped-def]
    _same_device(x=x, grid_hw=grid_hw, context=context, bias=bias)
    rows, regions = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))  # the latter: of what is in grid_hw
    source = x.new_empty(rows, dtype=torch.int64)
    return x.new_empty(rows, x.shape[1]), source, source.new_empty(regions + 1), source.new_empty(regions)


@torch.library.register_fake("minifocus::importance")
def _(q, k, cu_text, cu_visual, scale):  # type: ignore[no-untyped-def]
    _same_device(q=q, k=k, cu_text=cu_text, cu_visual=cu_visual)
    return k.new_empty(k.shape[0], dtype=wide(q.dtype))


@torch.library.register_fake("minifocus::select_top_p")
def _(scores, cu_visual, gamma=0.0, keep=None):  # type: ignore[no-untyped-def]
    _same_device(scores=scores, cu_visual=cu_visual)
    return cu_visual.new_empty(scores.shape[0]), cu_visual.new_empty(cu_visual.shape[0] - 1)


@torch.library.register_fake("minifocus::gather_tokens")
def _(columns, index):  # type: ignore[no-untyped-def]
    for column in columns:
        _same_device(index=index, columns=column)
    return [column.new_empty(index.shape[0], *column.shape[1:]) for column in columns]


# ---------------------------------------------------------------------------------------------------------------- gradients


class _ReverseMode(torch.library.Library):
    """What it registers for autograd raises where an argument has a tangent: torch would take the result's for zero."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: Any = "", **options: Any) -> None:
        def reverse_mode(*arguments: Any) -> Any:
            for argument in arguments:
                for value in argument if isinstance(argument, list) else (argument,):
                    if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                        raise NotImplementedError(f"{op_name}: there is no forward-mode derivative through it")
            return fn(*arguments)

        super().impl(op_name, reverse_mode, dispatch_key, **options)


_gradients = _ReverseMode("minifocus", "FRAGMENT")


def _register_gradient(name: str, gradient: Callable[..., Any], save: Callable[..., None] | None = None) -> None:
    torch.library.register_autograd(f"minifocus::{name}", gradient, setup_context=save, lib=_gradients)


def _save_region_pool(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, grid_hw, choice, ctx.window, ctx.pools, weight = inputs
    ctx.save_for_backward(x, grid_hw, choice, output[2], weight)


def _region_pool_gradient(ctx, grad_tokens, _source, _offsets):  # type: ignore[no-untyped-def]
    x, grid_hw, choice, offsets, weight = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.minifocus.region_pool_backward(
        grad_tokens, x, grid_hw, choice, offsets, ctx.window, ctx.pools, weight
    )
    return grad_x, None, None, None, None, None if weight is None else grad_weight


_register_gradient("region_pool", _region_pool_gradient, _save_region_pool)


def _save_region_route(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, grid_hw, _, _, ctx.window, ctx.pools = inputs
    ctx.save_for_backward(x, grid_hw, output[3], output[2])


def _region_route_gradient(ctx, grad_tokens, *_indices):  # type: ignore[no-untyped-def]
    x, grid_hw, choice, offsets = ctx.saved_tensors
    grad_x, _ = torch.ops.minifocus.region_pool_backward(
        grad_tokens, x, grid_hw, choice, offsets, ctx.window, ctx.pools
    )
    return grad_x, None, None, None, None, None  # a choice has no gradient for what it was made by


_register_gradient("region_route", _region_route_gradient, _save_region_route)


def _save_gather(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    columns, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = columns[0].shape[0]


def _gather_gradient(ctx, grads):  # type: ignore[no-untyped-def]
    (index,) = ctx.saved_tensors
    place = index % (ctx.rows + 1)  # of -1: one row more, left out below

    def scatter(grad):  # type: ignore[no-untyped-def]
        if grad is None or not grad.is_floating_point():
            return None
        return grad.new_zeros(ctx.rows + 1, *grad.shape[1:]).index_add(0, place, grad).narrow(0, 0, ctx.rows)

    return [scatter(grad) for grad in grads], None


_register_gradient("gather_tokens", _gather_gradient, _save_gather)


def _no_second_derivative(ctx, *_grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError("region_pool and region_route: there is no second derivative through them")


def _no_gradient(ctx, *_grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError("importance: there is no gradient through it; detach q and k, or call it under no_grad()")


# torch would take what is not there for zeros. select_top_p needs none of this: all that it returns are whole numbers.
_register_gradient("region_pool_backward", _no_second_derivative)
_register_gradient("importance", _no_gradient)
