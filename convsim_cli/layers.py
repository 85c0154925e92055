"""Run a network, or one of its layers, to look at its convolutions, and leave it as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convsim_cli.kernels import Kernel, evaluation_mode, is_convolution, own_weight


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Let a model run in evaluation mode, without gradients and not compiled, so that hooks added later are called.

    On leaving, its modes, its buffers and the random number generators, also Python's and numpy's, are as they were.
    Precision and autocast are those of the caller.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    # loading torch.compile takes seconds: where it has not been loaded, nothing is compiled
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with (
        torch.random.fork_rng(list(devices)),
        _other_generators(),
        torch.no_grad(),
        uncompiled,
        evaluation_mode(model),
        _own_buffers(model),
    ):
        yield


@contextmanager
def _other_generators() -> Iterator[None]:
    """Put back the states of Python's and numpy's generators, and of an Apple GPU's, on leaving."""
    numpy = sys.modules.get("numpy.random")  # not loaded, it draws nothing
    state, theirs = random.getstate(), numpy and numpy.get_state()
    apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.set_state(theirs)
        if apple is not None:
            torch.mps.set_rng_state(apple)


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Give the model copies of its buffers, and drop what is written to them. A scripted one's values are put back."""
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    values = [(buffer, buffer.clone()) for module in scripted for buffer in module.buffers(recurse=False)]
    own = {module: dict(module._buffers) for module in model.modules() if module not in scripted}
    copies = {buffer: buffer.clone() for buffers in own.values() for buffer in buffers.values() if buffer is not None}
    try:
        for module, buffers in own.items():
            module._buffers.update({name: copies[was] for name, was in buffers.items() if was is not None})
        yield
    finally:
        for module, buffers in own.items():
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)


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


def layers_of(
    model: nn.Module, kernels: Iterable[Kernel], names: Mapping[str, str] | None = None
) -> Iterator[tuple[Kernel, Any]]:
    """Give each kernel with every layer that convolves with it: layers can share one weight.

    names: the model's name of a tensor → the kernel's, where they differ. A layer that shares a weight but not its
    filters, as a decoder does that transposes its encoder's convolution, is none of the kernel's.
    """
    names = names or {}
    known = {kernel.name: kernel for kernel in kernels}
    owners: dict[int, Kernel] = {}
    for path, layer in model.named_modules():
        if not is_convolution(layer):
            continue
        name, own = f"{path}.weight".lstrip("."), own_weight(layer)
        kernel = known.get(names.get(name, name)) or owners.get(id(own))
        if kernel is not None and (layer.transposed, layer.groups) == (kernel.transposed, kernel.groups):
            if own is not None:
                owners[id(own)] = kernel
            yield kernel, layer


def convolve_with(layer: nn.Module, weight: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    """Return the maps `[images, S, *space]` that a convolution gives for another weight and no bias.

    weight: of the shape of the layer's. inputs, options: what its `forward` is called with. Padding, stride and so on
    are the layer's, whatever its class does around the convolution. Hooks are not called, and on leaving the layer has
    its own parameters and parametrizations back.
    """
    kind, state, parameters = type(layer), vars(layer), dict(layer._parameters)
    attributes = {name: value for name, value in state.items() if name in ("weight", "bias")}
    try:
        if parametrize.is_parametrized(layer):
            layer.__class__ = kind.__mro__[1]  # its properties compute the weight, whatever the instance holds
        for name in ("weight", "bias"):
            layer._parameters.pop(name, None)
        state.update(weight=weight, bias=None)
        maps: Tensor = layer.forward(*inputs, **options)
    finally:
        layer.__class__ = kind
        for name in ("weight", "bias"):
            state.pop(name, None)
        state.update(attributes)
        layer._parameters.clear()
        layer._parameters.update(parameters)
    return maps if maps.ndim == weight.ndim else maps.unsqueeze(0)  # a single image without an axis for the batch
