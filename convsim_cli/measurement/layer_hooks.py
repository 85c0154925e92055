"""See the feature maps of a network's layers, by hooks, while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

from convsim_cli.kernels import Kernel, is_convolution
from convsim_cli.machine.effective_weight import own_weight
from convsim_cli.measurement.feature_maps import inputs_at_once
from convsim_cli.measurement.layer import LayerMaps
from convsim_cli.measurement.lent_weight import convolve_with

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call: by position and by name


def layers_of(
    model: nn.Module, kernels: Iterable[Kernel], names: Mapping[str, str]
) -> Iterator[tuple[Kernel, nn.Module]]:
    """Give each kernel with every layer that computes with it: layers can share one weight.

    names: the model's name of a tensor → the kernel's, where they differ.
    """
    known = {kernel.name: kernel for kernel in kernels}
    owners: dict[int, Kernel] = {}
    for path, layer in model.named_modules():
        if not is_convolution(layer):
            continue
        name, own = f"{path}.weight".lstrip("."), own_weight(layer)
        kernel = known.get(names.get(name, name)) or owners.get(id(own))
        if kernel is not None:
            if own is not None:
                owners[id(own)] = kernel
            yield kernel, layer


@contextmanager
def observed(layer: nn.Module, kernel: Kernel, seen: LayerMaps) -> Iterator[None]:
    """Add a layer's feature maps to what is seen of them, at every call."""
    handle = layer.register_forward_hook(partial(_look, kernel, seen), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _look(
    kernel: Kernel, seen: LayerMaps, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor
) -> None:
    seen.calls += 1
    weight, positions = layer.weight, prod(_batched(output, kernel).shape[2:])
    if layer.bias is None:
        seen.similarity.update(_batched(output, kernel))
    filters = kernel.filters if seen.chance is None else seen.chance.filters
    for part in _parts((inputs, options), kernel, inputs_at_once(filters, kernel.groups, positions)):
        if layer.bias is not None:  # subtracting it would leave rounding in maps that are small beside it
            seen.similarity.update(_maps(kernel, layer, part, weight))
        if seen.chance is not None:
            seen.chance.update(partial(_maps, kernel, layer, part), weight)


def _parts(arguments: Arguments, kernel: Kernel, size: int) -> Iterator[Arguments]:
    """A layer's arguments, `size` images at a time."""
    inputs, options = arguments
    images: Tensor = inputs[0] if inputs else options["input"]
    alone = images.ndim < len(kernel.shape)  # an image without an axis for the batch
    for part in [images] if alone else images.split(size):
        yield ((part, *inputs[1:]), options) if inputs else ((), {**options, "input": part})


def _maps(kernel: Kernel, layer: nn.Module, arguments: Arguments, weight: Tensor) -> Tensor:
    return _batched(convolve_with(layer, weight, *arguments), kernel)


def _batched(maps: Tensor, kernel: Kernel) -> Tensor:
    """Maps `[inputs, S, *space]`, also those of a single image without an axis for the batch."""
    return maps.unsqueeze(0) if maps.ndim < len(kernel.shape) else maps
