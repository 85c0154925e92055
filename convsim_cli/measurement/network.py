"""Run a network on images and measure every convolution's real feature maps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.kernels import Kernel, is_convolution, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity
from convsim_cli.measurement.figures import Record, layer_record


def measure(model: nn.Module, images: Tensor | Iterable[Tensor]) -> list[Record]:
    """Return a record per convolution of a network, its feature maps taken from running the images through it.

    images: one batch `[B, C, …]`, or several, on the model's device. The model is run in evaluation mode, without
    autocast or TF32, and left as it was. A layer that was never called has null feature-map figures; a parametrized one
    is left out, with a warning. Raises InputError for a kernel with NaN or Inf. Source: the keys' formulas in this
    module's head.

    >>> from torch import nn
    >>> record = measure(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 32, 32))[0]
    >>> record["name"], record["shape"], record["dead"]
    ('0.weight', [8, 3, 3, 3], 0)
    """
    selection = module_kernels(model)
    warn_of_unsupported(selection)
    kernels = selection.kernels
    maps = feature_maps(model, kernels, [images] if isinstance(images, Tensor) else images)
    return [layer_record(kernel, weight_of(model, kernel).detach(), maps[kernel.name].result()) for kernel in kernels]


def feature_maps(
    model: nn.Module, kernels: Iterable[Kernel], batches: Iterable[Tensor], names: Mapping[str, str] | None = None
) -> dict[str, FeatureMapSimilarity]:
    """Run batches through a network and return the similarity of the maps of each kernel's layer, by the kernel's name.

    names: the model's name of a tensor → the kernel's, where they differ. The network runs in evaluation mode and is
    left in the mode it was in. One layer's maps are held at a time; their `calls` counts how often a layer was called.
    """
    kernels = list(kernels)
    similarities = {kernel.name: FeatureMapSimilarity(kernel.groups) for kernel in kernels}
    with _evaluation(model), _as_written(), _hooks(model, similarities, names or {}), torch.no_grad():
        for images in batches:
            with full_precision(images.device):
                model(images)
    return similarities


@contextmanager
def _hooks(
    model: nn.Module, similarities: Mapping[str, FeatureMapSimilarity], names: Mapping[str, str]
) -> Iterator[None]:
    named = model.named_parameters(remove_duplicate=False)  # a parameter may be registered under several names
    known = [(weight, names.get(name, name)) for name, weight in named]
    weights = {id(weight): similarities[name] for weight, name in known if name in similarities}
    handles = []
    for layer in model.modules():
        found = weights.get(id(layer.weight)) if is_convolution(layer) else None
        if found is not None:
            handles.append(layer.register_forward_hook(_hook(found), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_written() -> AbstractContextManager[Any]:
    """Run what torch.compile has compiled as it was written: compiled code does not call hooks that came after it.

    Only where its machinery is loaded: loading it takes seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _hook(similarity: FeatureMapSimilarity) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def collect(layer: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
        similarity.calls += 1
        maps = output if layer.bias is None else _without_bias(layer, inputs, options)
        if maps.ndim < layer.weight.ndim:  # a single image without an axis for the batch
            maps = maps.unsqueeze(0)
        for chunk in maps.split(similarity.chunk(*maps.shape[1:])):
            similarity.update(chunk)

    return collect


def _without_bias(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Convolve again: subtracting the bias would leave rounding in maps that are small beside it."""
    bias: Any = layer.bias
    layer.bias = None  # type: ignore[assignment]
    try:
        maps: Tensor = layer.forward(*inputs, **options)
        return maps
    finally:
        layer.bias = bias


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
