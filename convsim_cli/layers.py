"""Run a network, or one of its layers, to observe its convolutions, without side effects."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from convsim_cli.device import generator_states, restore_generators
from convsim_cli.errors import InputError
from convsim_cli.kernels import (
    ConvolutionCall,
    Kernel,
    evaluation_mode,
    is_convolution,
    kept_attributes,
    own_weight,
    reach_convolution,
    unwrapped,
    without_wrappers,
)


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Let a model run in evaluation mode, without gradients and not compiled, so that hooks added later are called.

    On leaving, its modes, its buffers, the attributes of its modules and the random number generators, also Python's,
    numpy's and the model's own, are as they were. Precision and autocast are those of the caller. A lazy layer that is
    not yet initialized raises InputError when it is called.
    """
    tensors = chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    # loading torch.compile takes seconds: where it has not been loaded, nothing is compiled
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with (
        torch.random.fork_rng(list(devices)),
        _other_generators(model),
        torch.no_grad(),
        uncompiled,
        evaluation_mode(model),
        _own_buffers(model),
        ExitStack() as hooks,
    ):
        for module in model.modules():
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                hooks.enter_context(module.register_forward_pre_hook(_refuse_lazy, prepend=True))
        yield


def _refuse_lazy(layer: nn.Module, _: Any) -> None:
    raise InputError(f"the model calls a {type(layer).__name__} that is not yet initialized; run a forward pass first")


@contextmanager
def _other_generators(model: nn.Module) -> Iterator[None]:
    """Put back the states of Python's and numpy's generators, an Apple GPU's and the model's own, on leaving."""
    states = generator_states()
    apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    own = {value: value.get_state() for value in attributes if isinstance(value, torch.Generator)}
    try:
        yield
    finally:
        restore_generators(states)
        if apple is not None:
            torch.mps.set_rng_state(apple)
        for generator, was in own.items():
            generator.set_state(was)


@contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Give the model copies of its buffers, and drop what is written to them and to attributes of its modules.

    A scripted module's values are put back.
    """
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    values = [(buffer, buffer.clone()) for module in scripted for buffer in module.buffers(recurse=False)]
    own = {module: dict(module._buffers) for module in model.modules() if module not in scripted}
    copies = {buffer: buffer.clone() for buffers in own.values() for buffer in buffers.values() if _is_given(buffer)}
    try:
        for module, buffers in own.items():
            module._buffers.update({name: copies[was] for name, was in buffers.items() if _is_given(was)})
        with kept_attributes(own):
            yield
    finally:
        for module, buffers in own.items():
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)


def _is_given(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not is_lazy(buffer)


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
    for path, layer in unwrapped(model).named_modules():
        if not is_convolution(layer):
            continue
        name, own = f"{without_wrappers(path)}.weight".lstrip("."), own_weight(layer)
        kernel = known.get(names.get(name, name)) or owners.get(id(own))
        if kernel is not None and (layer.transposed, layer.groups) == (kernel.transposed, kernel.groups):
            if own is not None:
                owners[id(own)] = kernel
            yield kernel, layer


def images_of(inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """Return the images that a layer is called with: its first tensor, under whatever name, in whatever container."""
    return next((value for value in tree_leaves((inputs, options)) if isinstance(value, Tensor)), None)


def is_empty_call(inputs: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Return whether a layer is called on nothing, as a mask head is where no object was found."""
    images = images_of(inputs, options)
    return images is not None and not images.numel()


def convolve_with(layer: nn.Module, weight: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    """Return the maps `[images, S, *space]` that a convolution gives for another weight and no bias.

    weight: of the shape of the layer's. inputs, options: what its `forward` is called with. The maps are those of the
    convolution itself, with the layer's padding, stride and so on, whatever its class does around it.
    """
    return find_convolution(layer, tuple(weight.shape), inputs, options).convolve(weight)


def find_convolution(
    layer: nn.Module, shape: tuple[int, ...], inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> ConvolutionCall:
    """Return the convolution that a layer calls with a weight of this shape, on a batch. No hook is called.

    Raises InputError if there is none.
    """
    call = reach_convolution(layer, shape, inputs, options)
    if call is None:
        raise InputError(f"a {type(layer).__name__} convolves with no weight {list(shape)} on these inputs")
    if call.images.ndim == len(shape):
        return call
    return call._replace(images=call.images.unsqueeze(0))  # a single image without an axis for the batch
