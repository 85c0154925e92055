"""Scalar functions of a layer's filters that bring their own gradient, whatever torch has active around the call.

Eagerly, an autograd.Function shares between the value and the gradient what both need. Under a transform of
`torch.func` it is a Function of the form that transforms require, at a few tens of µs more per call. torch.compile
sees an operator. None of them lets autocast or TF32 in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from convsim_cli.machine.modes import transformed
from convsim_cli.machine.precision import full_precision

Taps = tuple[int, ...]

_SAFE = 1e30  # a float32 value below it means that no product on the way to it, or to its gradient, has overflowed


@dataclass(frozen=True)
class Differentiable:
    """A function `(filters, taps) → scalar ≥ 0`, differentiable to any order.

    name: unique, how torch.compile refers to it. value(filters, taps): the scalar, and a tensor that its gradient
    shares with it. gradient(filters, shared, taps): ∂value/∂filters. Both consist of differentiable operations, and
    work in the precision of their arguments.
    """

    name: str
    value: Callable[[Tensor, Taps], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Taps], Tensor]

    def __post_init__(self) -> None:
        _BY_NAME[self.name] = self

    def __call__(self, filters: Tensor, taps: Taps) -> Tensor:
        if torch.compiler.is_compiling():
            if transformed():  # which the operator is not made for: traced, in a precision that nothing lowers
                return self.value(_widened(filters), taps)[0].to(filters.dtype)
            return cast(Tensor, torch.ops.convsim.value(filters, taps, self.name))
        if transformed():
            return cast(Tensor, _Transformed.apply(filters, _Wide(self, taps)))
        return cast(Tensor, _Eager.apply(filters, taps, self))

    def evaluate(self, filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
        """Return the value and what the gradient shares with it, in float64 where float32 would overflow."""
        with full_precision(filters.device):
            value, shared = self.value(filters, taps)
            if _overflowed(value):
                value, shared = self.value(filters.double(), taps)
            return value.to(filters.dtype), shared

    def differentiate(self, filters: Tensor, shared: Tensor, taps: Taps) -> Tensor:
        """Return the gradient, in the precision of `shared`; in float64 where it is to be differentiated again."""
        with full_precision(filters.device):
            if torch.is_grad_enabled():  # create_graph: the second derivative flows through what is shared as well
                filters = _widened(filters)
                _, shared = self.value(filters, taps)
            return self.gradient(filters.to(shared.dtype), shared, taps)


_BY_NAME: dict[str, Differentiable] = {}


def _overflowed(value: Tensor) -> bool:
    """Say whether to compute again in float64: where the value can be looked at without waiting for a device."""
    looked_at = value.dtype == torch.float32 and value.device.type == "cpu" and type(value) is Tensor
    return looked_at and not value.item() < _SAFE


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, filters: Tensor, taps: Taps, function: Differentiable) -> Tensor:
        value, shared = function.evaluate(filters, taps)
        ctx.taps, ctx.function = taps, function
        ctx.save_for_backward(filters, shared)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        filters, shared = ctx.saved_tensors
        gradient = upstream * ctx.function.differentiate(filters, shared, ctx.taps)
        return gradient.to(filters.dtype), None, None


class _Transformed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(filters: Tensor, wide: _Wide) -> Tensor:
        return wide.value(filters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Wide], _: Tensor) -> None:
        filters, ctx.wide = inputs
        ctx.save_for_backward(filters)
        ctx.save_for_forward(filters)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (filters,) = ctx.saved_tensors
        return (upstream * ctx.wide.gradient(filters)).to(filters.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # torch switches forward mode off in here, so that jvp of jvp would be 0: on again, for the outer levels only
        filters = forward_ad.unpack_dual(ctx.saved_tensors[0], level=0).primal
        with forward_ad._set_fwd_grad_enabled(True):
            return (tangent * ctx.wide.gradient(filters)).sum().to(filters.dtype)


@dataclass(frozen=True)
class _Wide:
    """A function at given taps, computed in float64: no one can look, under a transform, whether float32 overflows.

    One object, since transforms take a tuple of arguments apart.
    """

    function: Differentiable
    taps: Taps

    def value(self, filters: Tensor) -> Tensor:
        with full_precision(filters.device):
            return self.function.value(_widened(filters), self.taps)[0].to(filters.dtype)

    def gradient(self, filters: Tensor) -> Tensor:
        with full_precision(filters.device):
            filters = _widened(filters)
            _, shared = self.function.value(filters, self.taps)
            return self.function.gradient(filters, shared, self.taps)


def _widened(filters: Tensor) -> Tensor:
    """Filters in float64, which neither autocast nor TF32 touches when recorded operations are differentiated later."""
    return filters if filters.device.type == "mps" else filters.double()  # mps has no float64


@torch.library.custom_op(
    "convsim::value", mutates_args=(), schema="(Tensor filters, SymInt[] taps, str name) -> Tensor"
)
def _value(filters: Tensor, taps: Sequence[int], name: str) -> Tensor:
    return _BY_NAME[name].evaluate(filters, tuple(taps))[0]


@torch.library.custom_op(
    "convsim::gradient", mutates_args=(), schema="(Tensor filters, SymInt[] taps, str name) -> Tensor"
)
def _gradient(filters: Tensor, taps: Sequence[int], name: str) -> Tensor:
    function = _BY_NAME[name]
    _, shared = function.evaluate(filters, tuple(taps))
    return function.differentiate(filters, shared, tuple(taps)).to(filters.dtype)


@_value.register_fake
def _(filters: Tensor, _taps: Sequence[int], _name: str) -> Tensor:
    return filters.new_empty(())


@_gradient.register_fake
def _(filters: Tensor, _taps: Sequence[int], _name: str) -> Tensor:
    return torch.empty_like(filters)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  (passed by name)
    filters, ctx.taps, ctx.name = inputs
    ctx.save_for_backward(filters)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    return upstream * _gradient(*ctx.saved_tensors, ctx.taps, ctx.name), None, None


_value.register_autograd(_backward, setup_context=_save)
