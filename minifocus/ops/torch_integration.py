"""What torch needs besides kernels: the shapes of the operators' outputs, for tracing, and their gradients.

Gradients are of the first order and in reverse: what torch would silently take for zeros raises NotImplementedError, a
RuntimeError. That is forward mode (torch.func.jvp), second derivatives of all but gather_tokens, and gradients of importance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import (
    backend,  # noqa: F401 (it declares the operators)
    checks,
)
from .checks import wide


def _same_device(
    *, grid_hw: torch.Tensor | None = None, weight: torch.Tensor | None = None, **tensors: torch.Tensor
) -> None:
    """All tensors have to be where the first of `tensors` is. Fake kernels check this, as torch calls no other kernel once one of
    the tensors is on the meta device."""
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
    rows = torch.library.get_ctx().new_dynamic_size()  # it depends on the contents of choice
    return x.new_empty(rows, x.shape[1]), choice.new_empty(rows), choice.new_empty(choice.shape[0] + 1)


@torch.library.register_fake("minifocus::region_pool_backward")
def _(grad_tokens, x, grid_hw, choice, offsets, window, pools, weight=None):  # type: ignore[no-untyped-def]
    _same_device(x=x, grid_hw=grid_hw, grad_tokens=grad_tokens, choice=choice, offsets=offsets, weight=weight)
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else choice.shape[0], dtype=wide(x.dtype))


@torch.library.register_fake("minifocus::region_route")
def _(x, grid_hw, context, bias, window, pools):  # type: ignore[no-untyped-def]
    _same_device(x=x, grid_hw=grid_hw, context=context, bias=bias)
    rows, regions = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))  # regions: on those of grid_hw
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


class _ReverseMode(torch.library.Library):
    """Registers functions for autograd that raise if an argument has a tangent. torch would take the result's for zero."""

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
    return grad_x, None, None, None, None, None  # nothing flows back through the choice


_register_gradient("region_route", _region_route_gradient, _save_region_route)


def _save_gather(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    columns, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = columns[0].shape[0]


def _gather_gradient(ctx, grads):  # type: ignore[no-untyped-def]
    (index,) = ctx.saved_tensors
    place = index % (ctx.rows + 1)  # -1 becomes the row after the last, which is cut off below

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


# torch would take a missing gradient for zeros. select_top_p needs none: it returns whole numbers only.
_register_gradient("region_pool_backward", _no_second_derivative)
_register_gradient("importance", _no_gradient)
