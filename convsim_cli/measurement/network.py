"""Run a network on images and measure every convolution's real feature maps.

See the feature maps of a network's layers, by hooks, while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.batch_norm import INPUTS, choose_statistics, evaluation_mode, input_statistics
from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Patterns, is_convolution, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.kernels.modules import effective_weight, own_weight
from convsim_cli.layers import convolve_with
from convsim_cli.measurement.feature_maps import inputs_at_once
from convsim_cli.measurement.figures import Record, make_record
from convsim_cli.measurement.kernel_figures import Layer, LayerMaps, describe
from convsim_cli.measurement.pairs import THRESHOLD
from convsim_cli.precision import as_written, full_precision

PIXELS = "pixel_values"  # the images of a batch that is a dictionary


def measure(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threshold: float = THRESHOLD,
    bn_statistics: str = "auto",
    seed: int = 0,
) -> list[Record]:
    """Return a record per convolution of a network, its feature maps taken from running the images through it.

    images: one batch `[B, C, …]`, or an iterable of batches, such as a loader: images, `(images, labels)` or
    `{"pixel_values": images}`; they are moved to the model's device. include, exclude: globs over the names of weights
    (`layer1.*`). threshold: mean cosine, in (0, 1], above which two filters are duplicates. bn_statistics: `stored`
    batch-norm statistics, those of the `inputs`, or `auto`: of the inputs where the stored ones do not belong to the
    kernels, as in a fresh network; the model keeps its own in any case. seed: of the random kernels that chance is
    measured with.

    The model is run in evaluation mode, without autocast or TF32, and left as it was. A layer that is never called has
    null feature-map figures; warns of layers that are left out. Raises InputError for a kernel with NaN or Inf, a
    pattern that matches nothing, or images of another form. Keys of a record: `measurement.figures.FIGURES`.

    >>> from torch import nn
    >>> record = measure(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 32, 32))[0]
    >>> record["name"], record["shape"], record["dead"]
    ('0.weight', [8, 3, 3, 3], 0)
    """
    selection = module_kernels(model, Patterns(include, exclude), parametrized=True)
    warn_of_unsupported(selection)
    chosen = choose_statistics(model, bn_statistics)
    batches = Batches(model, images, twice=chosen == INPUTS)
    seen = feature_maps(model, selection.kernels, batches, bn_statistics=chosen, seed=seed)
    with evaluation_mode(model):  # reading a spectral-normalized weight then leaves its state as it is
        weights = [weight_of(model, kernel).detach() for kernel in selection.kernels]
    return [
        describe(kernel) | make_record(Layer(kernel, weight, seen[kernel.name], threshold))
        for kernel, weight in zip(selection.kernels, weights, strict=True)
    ]


def fm_cos_by_layer(model: nn.Module, images: Tensor, kernels_changed: bool = False) -> dict[str, float | None]:
    """Return `fm_cos` of every convolution on one batch, on the model's device: a fraction of the cost of `measure`.

    kernels_changed: whether the kernels were changed after the batch-norm statistics were stored.
    """
    kernels = module_kernels(model, parametrized=True).kernels
    statistics = choose_statistics(model, kernels_changed=kernels_changed)
    seen = feature_maps(model, kernels, [images], bn_statistics=statistics, whole=False)
    return {name: layer.similarity.fm_cos for name, layer in seen.items()}


class Batches:
    """The images of batches of any form, moved to a model's device. Raises InputError for another form, or none."""

    def __init__(self, model: nn.Module, images: Tensor | Iterable[Any], twice: bool = False) -> None:
        """twice: keep what can be iterated once only."""
        one_shot = isinstance(images, Iterator)
        self._batches = [images] if isinstance(images, Tensor) else list(images) if twice and one_shot else images
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def __iter__(self) -> Iterator[Tensor]:
        number = 0
        for number, batch in enumerate(self._batches, 1):
            yield _images(batch, number).to(self._device)
        if not number:
            raise InputError("expected at least one batch of images, got none")


def _images(batch: Any, number: int) -> Tensor:
    images = batch
    if isinstance(batch, Mapping):
        if PIXELS not in batch:
            raise InputError(f"batch {number}: a dictionary with {', '.join(map(str, batch))}; expected {PIXELS!r}")
        images = batch[PIXELS]
    elif isinstance(batch, list | tuple) and batch:
        images = batch[0]
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"batch {number}: got {found}; expected floating images [B, C, …], (images, labels) "
            f"or a dictionary with {PIXELS!r}"
        )
    return images


def feature_maps(
    model: nn.Module,
    kernels: Iterable[Kernel],
    batches: Iterable[Tensor],
    names: Mapping[str, str] | None = None,
    *,
    bn_statistics: str | None = None,
    seed: int = 0,
    whole: bool = True,
) -> dict[str, LayerMaps]:
    """Run batches through a network and return what is seen of the maps of each kernel's layer, by the kernel's name.

    batches: on the model's device. names: the model's name of a tensor → the kernel's, where they differ.
    bn_statistics: `inputs` to re-estimate batch-norm statistics on the batches first, which are then taken twice.
    whole: measure chance and keep pairs. The network runs in evaluation mode and keeps its mode and statistics. One
    layer's maps are held at a time.
    """
    statistics = input_statistics(model, batches) if bn_statistics == INPUTS else nullcontext()
    with statistics, evaluation_mode(model), as_written(), torch.no_grad():
        seen: dict[str, LayerMaps] = {}
        with ExitStack() as hooked:
            for kernel, layer in layers_of(model, kernels, names or {}):
                if kernel.name not in seen:
                    seen[kernel.name] = LayerMaps(kernel, _weight(layer), seed=seed, whole=whole)
                hooked.enter_context(observed(layer, kernel, seen[kernel.name]))
            for images in batches:
                with full_precision(images.device):
                    model(images)
    return seen


def _weight(layer: nn.Module) -> Tensor:
    weight = effective_weight(layer)
    assert weight is not None  # a layer without one is not selected
    return weight.detach()


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
