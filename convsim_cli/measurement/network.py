"""Run a network on images and measure every convolution's real feature maps, by hooks, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from convsim_cli.batch_norm import INPUTS, batch_norm_layers, choose_statistics, reestimate_statistics
from convsim_cli.device import Advance
from convsim_cli.errors import (
    ConvsimError,
    InputError,
    describe_tensor,
    is_number,
    is_out_of_memory,
    kind_of,
    model_failed,
)
from convsim_cli.kernels import (
    Kernel,
    Patterns,
    effective_weight,
    module_kernels,
    overrides_forward,
    unwrapped,
    warn_of_unsupported,
    weight_of,
)
from convsim_cli.layers import find_convolution, is_empty_call, layers_of, side_effect_free
from convsim_cli.measurement.feature_maps import LayerMaps, inputs_at_once
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import check_finite, measure_layer
from convsim_cli.precision import full_precision

PIXELS = "pixel_values"  # the images of a batch that is a dictionary


def measure(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threshold: float = 0.95,
    bn_statistics: str = "auto",
    seed: int = 0,
) -> list[Record]:
    """Return a record per convolution of a network, with figures of its feature maps on the images.

    images: a batch `[B, C, …]` or `{"pixel_values": images}`, or an iterable of batches, such as a loader, of which
    each may also be `(images, labels)`; they are moved to the model's device. include, exclude: globs over the names of
    weights (`layer1.*`). threshold: correlation, in (0, 1], above which two filters are duplicates. bn_statistics:
    `stored` batch-norm statistics, those of the `inputs` (averages over batches, which should hold 8 images or more),
    or `auto`: of the inputs if the stored ones do not match the kernels, as in a fresh network; the model keeps its own
    in any case. seed: of the random kernels that chance is measured with.

    The model runs in evaluation mode, without autocast or TF32, and is not modified. A layer that no inputs reach has
    null feature-map figures. Warns about skipped layers, such as depthwise ones. Raises InputError for a kernel with
    NaN or Inf, a pattern that matches nothing, images of another form or that the model fails on, and feature maps with
    NaN or Inf, as images with such values have.

    A record contains `name`, `shape`, `groups` and figures, among them `fm_corr`, the mean |correlation| of two feature
    maps; `fm_corr_random`, the same for random kernels; `fm_rank`, the effective number of independent maps; `cs`, Eq.
    10; `ncs`, Eq. 10 of filters of norm 1 per pair; and `dead`, the number of dead filters.

    >>> from torch import nn
    >>> record = measure(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 32, 32))[0]
    >>> record["name"], record["shape"], record["dead"]
    ('0.weight', [8, 3, 3, 3], 0)
    """
    model = unwrapped(model)
    if not (is_number(threshold) and 0 < threshold <= 1):
        raise InputError(f"`threshold` {threshold!r}: expected a number in (0, 1]")
    if not (is_number(seed, whole=True) and 0 <= seed < 1 << 63):
        raise InputError(f"`seed` {seed!r}: expected a whole number from 0 to 2^63 − 1")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError(
            "`model` is sharded (FullyShardedDataParallel); measure it before it is wrapped, or a copy of it"
        )
    selection = module_kernels(model, Patterns(include, exclude), parametrized=True)
    warn_of_unsupported(selection)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with side_effect_free(model):  # computed weights are read as in evaluation mode
        weights = [weight_of(model, kernel).detach() for kernel in selection.kernels]
        check_finite(list(zip(selection.kernels, weights, strict=True)))
        chosen = choose_statistics(model, bn_statistics)
        if chosen == INPUTS and isinstance(images, Iterator):
            images = list(images)  # to be taken twice
        batches = Batches(images, device)
        try:
            maps = record_feature_maps(model, selection.kernels, batches, bn_statistics=chosen, seed=seed)
        except Exception as error:  # whatever a model's own code raises
            if isinstance(error, ConvsimError) or is_out_of_memory(error) or not batches.running:
                raise
            raise model_failed(batches.running, error) from error
    layers = zip(selection.kernels, weights, strict=True)
    return [measure_layer(kernel, weight, maps[kernel.name], threshold) for kernel, weight in layers]


def fm_corr_by_layer(model: nn.Module, images: Tensor, kernels_changed: bool = False) -> dict[str, float | None]:
    """Return `fm_corr` of every convolution on one batch, on the model's device: a fraction of the cost of `measure`.

    kernels_changed: whether the kernels were changed after the batch-norm statistics were stored.
    """
    kernels = module_kernels(model, parametrized=True).kernels
    statistics = choose_statistics(model, kernels_changed=kernels_changed)
    maps = record_feature_maps(model, kernels, [images], bn_statistics=statistics, chance=False, paper=False)
    return {name: layer.fm_corr() for name, layer in maps.items()}


def record_feature_maps(
    model: nn.Module,
    kernels: Iterable[Kernel],
    batches: Iterable[Tensor],
    names: Mapping[str, str] | None = None,
    *,
    bn_statistics: str | None = None,
    seed: int = 0,
    chance: bool = True,
    paper: bool = True,
) -> dict[str, LayerMaps]:
    """Run batches through a network and return what is recorded of each kernel's maps, by the kernel's name.

    batches: on the model's device. names: the model's name of a tensor → the kernel's, where they differ.
    bn_statistics: `inputs` to re-estimate batch-norm statistics on the batches first, which are then taken twice.
    chance: take the maps of random kernels too. paper: take the paper's figures too. The network is left as it was,
    parameters included. One layer's maps are held at a time.
    """
    maps: dict[str, LayerMaps] = {}
    model = unwrapped(model)
    with side_effect_free(model), _own_parameters(model), ExitStack() as hooks:
        normalized = batch_norm_layers(model) if bn_statistics == INPUTS else []
        if normalized:
            with full_precision(normalized[0].get_buffer("running_mean").device):
                reestimate_statistics(model, batches, normalized)
        for kernel, layer in layers_of(model, kernels, names):
            if kernel.name not in maps:
                weight = effective_weight(layer)
                assert weight is not None  # a layer without one is not selected
                maps[kernel.name] = LayerMaps(kernel, weight.detach(), seed=seed, chance=chance, paper=paper)
            hook = partial(_record, kernel, maps[kernel.name])
            if overrides_forward(layer):  # it may write to what it is called with, or to itself
                hooks.enter_context(layer.register_forward_pre_hook(partial(_record_before, hook), with_kwargs=True))
            else:  # other hooks may replace the output
                hooks.enter_context(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for images in batches:
            with full_precision(images.device):
                model(images.clone())  # which the model may change
    return maps


@contextmanager
def _own_parameters(model: nn.Module) -> Iterator[None]:
    """Put back the parameters that a `forward` writes to, as a user's does that masks its weight."""
    own = [
        module
        for module in model.modules()
        if not type(module).__module__.startswith("torch.") or getattr(module, "max_norm", None) is not None
    ]
    kept = [
        (p, p.data, p.detach().clone()) for module in own for p in dict(module.named_parameters(recurse=False)).values()
    ]
    try:
        yield
    finally:
        for parameter, data, was in kept:
            if parameter.data_ptr() != data.data_ptr() or not torch.equal(parameter, was):
                parameter.data = data.copy_(was)  # no new version: a graph may hold the parameter


def _record_before(record: Callable[..., None], layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Record a call that is to come, on copies of its inputs."""
    inputs, options = tree_map_only(Tensor, torch.clone, (inputs, options))
    record(layer, inputs, options, None)


def _record(
    kernel: Kernel, maps: LayerMaps, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor | None
) -> None:
    """Add the feature maps of one call of a layer, and those that random kernels give in its place."""
    if is_empty_call(inputs, options):
        return
    maps.calls += 1
    call = find_convolution(layer, kernel.shape, inputs, options)
    own = output is not None and layer.bias is None  # the layer's output is the convolution's
    if output is not None and own:
        output = output if output.ndim == len(kernel.shape) else output.unsqueeze(0)
        maps.update(output)
    else:
        output = call._replace(images=call.images[:1]).convolve(call.weight)
    filters = kernel.filters if maps.chance is None else maps.chance.filters
    for part in call.images.split(inputs_at_once(filters, kernel.groups, prod(output.shape[2:]))):
        some = call._replace(images=part)
        if not own:  # subtracting the bias would leave rounding in maps that are small beside it
            maps.update(some.convolve(call.weight))
        if maps.chance is not None:
            maps.chance.update([some.convolve(drawn) for drawn in maps.chance.weights(call.weight)])


class Batches:
    """The images of batches of any form, moved to a device. Raises InputError for another form, or none.

    images: as `measure` takes them. advance: takes the number of images that have run since the last call. running: the
    type and shape of the batch that is in use, empty between batches.
    """

    def __init__(self, images: Tensor | Iterable[Any], device: torch.device, advance: Advance | None = None) -> None:
        if not (isinstance(images, Iterable) or hasattr(images, "__getitem__")):
            raise InputError(f"`images` is {kind_of(images)}; expected a batch [B, C, …] or several")
        self._batches = [images] if isinstance(images, Tensor | Mapping) else images
        self.running = ""
        self._device, self._advance = device, advance

    def __iter__(self) -> Iterator[Tensor]:
        number = 0
        for number, batch in enumerate(self._batches, 1):
            images = _images(batch, number).to(self._device)
            self.running = describe_tensor(images)
            yield images
            self.running = ""
            if self._advance:
                self._advance(len(images))
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
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.is_meta:
        found = describe_tensor(images) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"batch {number}: got {found}; expected floating images [B, C, …], (images, labels) "
            f"or a dictionary with {PIXELS!r}" + "; for one batch (images, labels), pass [batch]" * (number == 2)
        )
    if not images.numel():
        raise InputError(f"batch {number} is empty: {list(images.shape)}")
    return images
