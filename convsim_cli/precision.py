"""Full float32, and functions with explicit gradients, whatever the process and torch have active around a call.

torch ≥ 2.9 has two sets of switches that lower the precision of float32 products. The new ones are a precision per
backend and operator; "none" inherits that of the backend, and then the generic one. The old ones are
`set_float32_matmul_precision` and `cudnn.allow_tf32`; their setters write to both sets, and their getters raise where
the two disagree. Inside `full_precision` both sets say full float32, so that code which reads or writes either of them
works there.

`Differentiable` is a scalar function of a layer's filters with its gradient. Eagerly, an autograd.Function shares
between the two what both need. Under a transform of `torch.func` it is a Function of the form that transforms require,
at a few tens of µs more per call. torch.compile sees an operator. None of them lets autocast or TF32 in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Concatenate, ParamSpec, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
Taps = tuple[int, ...]
Restore = tuple[Callable[[Any], object], Any]  # a setter, and what it is to set
Key = tuple[str, str]  # backend and operator of a new switch

_HAS_NEW = hasattr(torch._C, "_get_fp32_precision_getter")  # the public attributes cannot write to all of the switches
_FULL = ("none", "ieee")
_LOOKED_AT: tuple[Key, ...] = (("mkldnn", "matmul"), ("mkldnn", "conv"), ("cuda", "matmul"))
_ON_CPU: tuple[Key, ...] = (("generic", "all"), ("mkldnn", "all"), ("cuda", "all"), *_LOOKED_AT)  # parents first
_ELSEWHERE: tuple[Key, ...] = (*_ON_CPU, ("cuda", "conv"), ("cuda", "rnn"))

_LOCK = Lock()  # of the switches, since autograd has a thread for each device
_BLOCKS: list[list[Restore]] = []  # of `full_precision` that are running, in the order in which they were entered

_KEPT = 64  # constants of one kind, the latest
_SAFE = 1e30  # a float32 value below it means that no product on the way to it, or to its gradient, has overflowed


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and reduced-precision float32 products out of the enclosed block.

    device: where the enclosed products run. The switches are process-wide and are restored on leaving. On the CPU,
    switches that are off already cost 2 µs to look at.
    """
    if device.type == "meta":  # nothing is computed
        yield
        return
    with _LOCK:
        block = _switch_off(device.type)
        _BLOCKS.append(block)
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        with _LOCK:
            _leave(block)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Allow TF32 in the enclosed products and convolutions on CUDA, and keep everything else as `full_precision` does.

    On other devices the numbers are those of `full_precision`. A `full_precision` inside counts.
    """
    with full_precision(device):
        if device.type != "cuda":
            yield
            return
        torch.set_float32_matmul_precision("high")
        _allow_tf32_in_cudnn(True)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
            _allow_tf32_in_cudnn(False)


def _leave(block: list[Restore]) -> None:
    """Restore the switches; or, where a block that was entered later still runs in another thread, leave it to that."""
    index = next(i for i, other in enumerate(_BLOCKS) if other is block)
    del _BLOCKS[index]
    if index < len(_BLOCKS):
        _BLOCKS[index] += block
        return
    for write, value in block:
        write(value)


def _switch_off(kind: str) -> list[Restore]:
    """Switch off what lowers the precision on that kind of device, and return how to undo it, in order."""
    if not _HAS_NEW:
        return _switch_off_old(kind != "cpu" and torch.backends.cudnn.allow_tf32)
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    if kind == "cpu" and all(read(*key) in _FULL for key in _LOOKED_AT):
        return []
    cudnn = kind != "cpu" and _cudnn_allows_tf32()
    new: list[Restore] = []
    for key in _ON_CPU if kind == "cpu" else _ELSEWHERE:
        own = read(*key)  # not inherited: all that it inherits from is "none" by now
        new.append((partial(write, *key), own))
        if own != "none":
            write(*key, "none")
    if cudnn is None:  # with every new switch off, the getter still raises if the old one is on
        cudnn = _cudnn_allows_tf32() is None
    return _switch_off_old(cudnn) + new  # the old setters write to new switches, and so come first


def _switch_off_old(cudnn: bool) -> list[Restore]:
    old: list[Restore] = []
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        torch.set_float32_matmul_precision("highest")
        old.append((torch.set_float32_matmul_precision, precision))
    if cudnn:
        _allow_tf32_in_cudnn(False)
        old.append((_allow_tf32_in_cudnn, True))
    return old


def _cudnn_allows_tf32() -> bool | None:
    """Read the old switch of cuDNN: None if the new ones contradict it, which makes its getter raise."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _allow_tf32_in_cudnn(allow: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allow


def transformed() -> bool:
    """Return whether a transform of `torch.func` is active: grad, vmap, jvp and those made of them."""
    return torch._C._are_functorch_transforms_active()  # what autograd.Function.apply itself asks


def constant(make: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Cache what `make(like, *rest)` returns, by device, dtype and `rest`.

    A tensor made under a mode is useless, or an error, outside of it: what is made while compiling or under a transform
    is not kept, and what is made for a fake tensor is kept for the FakeTensorMode of that tensor alone.
    """
    kept: dict[Hashable, Tensor] = {}

    def get(like: Tensor, /, *rest: P.args, **named: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(like, *rest, **named)
        fake = getattr(like, "fake_mode", None)
        key = (like.device, like.dtype, fake, *rest)
        hidden = transformed() and torch._C._len_torch_dispatch_stack() > 0  # fake tensors inside a transform's
        if key in kept and not hidden:
            return kept[key]
        with fake or nullcontext(), torch.inference_mode(False):
            made = make(like, *rest, **named)
        if (fake or type(made) is Tensor) and not transformed():
            kept[key] = made
            if len(kept) > _KEPT:
                del kept[next(iter(kept))]
        return made

    return get


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
        BY_NAME[self.name] = self

    def __call__(self, filters: Tensor, taps: Taps) -> Tensor:
        if torch.compiler.is_compiling():
            if transformed():  # which the operator is not made for: traced, in a precision that nothing lowers
                return self.value(_widened(filters), taps)[0].to(filters.dtype)
            return cast(Tensor, torch.ops.convsim.value(filters, taps, self.name))
        if transformed() or forward_ad._current_level >= 0:  # in forward mode
            return cast(Tensor, _Transformed.apply(filters, _Wide(self, taps)))
        return cast(Tensor, _Eager.apply(filters, taps, self))

    def evaluate(self, filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
        """Return the value and what the gradient shares with it, in float64 where float32 would overflow."""
        with full_precision(filters.device):
            value, shared = self.value(filters, taps)
            is_known = value.device.type == "cpu" and type(value) is Tensor  # without waiting for a device
            if is_known and value.dtype == torch.float32 and not value.item() < _SAFE:
                value, shared = self.value(filters.double(), taps)
            return value.to(filters.dtype), shared

    def differentiate(self, filters: Tensor, shared: Tensor, taps: Taps) -> Tensor:
        """Return the gradient, in the precision of `shared`; in float64 where it is to be differentiated again."""
        with full_precision(filters.device):
            if torch.is_grad_enabled():  # create_graph: the second derivative flows through what is shared as well
                filters = _widened(filters)
                _, shared = self.value(filters, taps)
            return self.gradient(filters.to(shared.dtype), shared, taps)


BY_NAME: dict[str, Differentiable] = {}


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


# Constants are kept, and some are copied from the host: not within a CUDA graph that torch.compile records
_OPERATOR: dict[str, Any] = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _OPERATOR["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("convsim::value", schema="(Tensor filters, SymInt[] taps, str name) -> Tensor", **_OPERATOR)
def _value(filters: Tensor, taps: Sequence[int], name: str) -> Tensor:
    return BY_NAME[name].evaluate(filters, tuple(taps))[0]


@torch.library.custom_op("convsim::gradient", schema="(Tensor filters, SymInt[] taps, str name) -> Tensor", **_OPERATOR)
def _gradient(filters: Tensor, taps: Sequence[int], name: str) -> Tensor:
    function = BY_NAME[name]
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
