"""Run a layer once more with another weight, whatever its class does around the convolution.

Run a network to look at its convolutions as they are called, and leave it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convsim_cli.batch_norm import batch_statistics, evaluation_mode
from convsim_cli.kernels import Kernel, is_convolution, weight_of
from convsim_cli.precision import as_written, full_precision

_TENSORS = ("weight", "bias")


def convolve_with(layer: nn.Module, weight: Tensor, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Return what a convolution gives for another weight and no bias, under its own padding, stride and so on.

    weight: of the shape of the layer's. inputs, options: what its `forward` is called with. Hooks are not called.
    """
    with _lent(layer, weight):
        maps: Tensor = layer.forward(*inputs, **options)
    return maps


@contextmanager
def _lent(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Give a layer a plain weight and no bias; on leaving it has its own parameters and parametrizations back."""
    kind, state = type(layer), vars(layer)
    parameters, attributes = dict(layer._parameters), {name: state[name] for name in _TENSORS if name in state}
    try:
        if parametrize.is_parametrized(layer):
            layer.__class__ = kind.__mro__[1]  # its properties compute the weight, whatever the instance holds
        for name in _TENSORS:
            layer._parameters.pop(name, None)
        state.update(weight=weight, bias=None)
        yield
    finally:
        layer.__class__ = kind
        for name in _TENSORS:
            state.pop(name, None)
        state.update(attributes)
        layer._parameters.clear()
        layer._parameters.update(parameters)


Look = Callable[[Kernel, Any, tuple[Any, ...], dict[str, Any]], None]  # kernel, layer, its arguments by position, name


@contextmanager
def before_calls(model: nn.Module, kernels: Sequence[Kernel], look: Look) -> Iterator[None]:
    """Call `look` before each call of a layer that holds one of the kernels."""
    owners = {id(weight_of(model, kernel)): kernel for kernel in kernels}
    handles = []
    try:
        for layer in model.modules():
            kernel = owners.get(id(layer.weight)) if is_convolution(layer) else None
            if kernel and _same_filters(layer, kernel):
                handles.append(layer.register_forward_pre_hook(partial(look, kernel), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def maps_of(layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Return a convolution's maps `[images, S, *space]` without its bias, in float32 at least."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    inputs, options = tuple(_cast(x, dtype) for x in inputs), {key: _cast(x, dtype) for key, x in options.items()}
    own = dict(layer._parameters)
    layer._parameters.update(weight=layer.weight.detach().to(dtype), bias=None)
    try:
        with full_precision(layer.weight.device):  # the network may switch autocast on by itself
            maps: Tensor = layer.forward(*inputs, **options)
    finally:
        layer._parameters.update(own)
    return maps if maps.ndim == layer.weight.ndim else maps.unsqueeze(0)  # an image without an axis for the batch


@contextmanager
def undisturbed(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Let a model run in evaluation mode, batch normalization by the batch's statistics, without gradients or TF32.

    On leaving, its modes, its buffers and the states of the random number generators are as they were.
    """
    used = (tensor.device for tensor in (images, *model.parameters()))
    devices = {device.index for device in used if device.type == "cuda"}
    with (
        torch.no_grad(),
        torch.random.fork_rng(sorted(devices)),
        full_precision(images.device),
        as_written(),
        _scratch_buffers(model),
        evaluation_mode(model),
        batch_statistics(model),
    ):
        yield


@contextmanager
def undone_on_failure(weights: Sequence[Tensor]) -> Iterator[None]:
    """Write the former values back to weights, to the bit, where the block raises."""
    former = [weight.detach().clone() for weight in weights]
    try:
        yield
    except BaseException:
        for weight, was in zip(weights, former, strict=True):
            weight.copy_(was)
        raise


@contextmanager
def _scratch_buffers(model: nn.Module) -> Iterator[None]:
    """Give the model copies of its buffers, and drop what it writes to them."""
    own = {module: dict(module._buffers) for module in model.modules()}
    copies = {buffer: buffer.clone() for buffers in own.values() for buffer in buffers.values() if buffer is not None}
    try:
        for module, buffers in own.items():
            module._buffers.update({name: copies[was] for name, was in buffers.items() if was is not None})
        yield
    finally:
        for module, buffers in own.items():
            module._buffers.clear()
            module._buffers.update(buffers)


def _same_filters(layer: Any, kernel: Kernel) -> bool:
    """Whether a layer's filters are those of the kernel: an encoder and its decoder may share a weight."""
    return bool(layer.transposed == kernel.transposed and layer.groups == kernel.groups)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value
