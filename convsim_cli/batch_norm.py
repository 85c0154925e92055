"""Batch normalization: choosing the statistics to measure a network with, and re-estimating them from inputs.

In evaluation mode batch normalization divides by stored standard deviations. If these no longer match the kernels,
scaling a layer scales the inputs of later layers, and scale-invariant figures change. Statistics of the inputs
themselves cancel every scale.

Stored statistics are also averages over past batches, so they lag behind kernels that change: after a few hundred steps
by up to 0.4 standard deviations. `torch.optim.swa_utils.update_bn` re-estimates them too, but it puts the whole network
in training mode: dropout then draws random numbers, frozen layers thaw, and an exception leaves the network in that
mode.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.kernels import is_alphabetical
from convsim_cli.layers import images_of, side_effect_free

Wanted = Literal["auto", "stored", "inputs"]
CHOICES: tuple[str, ...] = get_args(Wanted)
STORED, INPUTS = "stored", "inputs"


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers of a network that keep running statistics."""
    layers = (layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats)
    return [layer for layer in layers if layer.running_mean is not None and not is_lazy(layer.running_mean)]


def choose_statistics(model: nn.Module, wanted: str = "auto", kernels_changed: bool = False) -> str | None:
    """Return `stored` or `inputs`, None for a network without batch-norm statistics.

    wanted: `auto` uses those of the inputs if the stored ones do not match the kernels: they are a fresh network's, or
    the kernels were changed after training. Raises InputError for another name.
    """
    if wanted not in CHOICES:
        raise InputError(f"unknown `bn_statistics` {wanted!r}: {did_you_mean(wanted, CHOICES)}")
    layers = batch_norm_layers(model)
    if not layers:
        return None
    if wanted != "auto":
        return wanted
    return INPUTS if kernels_changed or all(map(is_fresh, layers)) else STORED


def is_fresh(layer: _BatchNorm) -> bool:
    """Return whether a layer has seen no data: a counter of 0 or none, means of 0 and variances of 1."""
    counter, mean, variance = layer.num_batches_tracked, layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None
    return (counter is None or not bool(counter)) and not bool(mean.any()) and bool((variance == 1).all())


def reestimate_statistics(
    model: nn.Module, batches: Iterable[Tensor], layers: Sequence[_BatchNorm] | None = None
) -> None:
    """Replace the running statistics of a network's batch-norm layers, in place, by those of the given batches.

    batches: inputs of the network `[B, C, …]`, on its device. Each layer's mean and unbiased variance become averages
    over batches, weighted by their number of values. layers: the layers to re-estimate; by default, all that keep
    statistics. If there are none, the batches are not read.

    Nothing else in the network changes (`side_effect_free`): `num_batches_tracked` keeps counting training batches. A
    layer that sees a single value per channel, or is never called, keeps its statistics; so do all after an exception.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> images = torch.randn(64, 3, 8, 8)
    >>> reestimate_statistics(model, images.split(16))
    >>> torch.allclose(model[1].running_mean, model[0](images).mean((0, 2, 3)), atol=1e-5)
    True
    """
    layers = batch_norm_layers(model) if layers is None else layers
    if not layers:
        return
    seen: Counter[nn.Module] = Counter()  # values of each channel

    def average(layer: _BatchNorm, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Let a call count by its share of the values. torch's plain average (`momentum=None`) waits for the device."""
        images = images_of(inputs, options)
        assert images is not None  # nothing else can be normalized
        layer.training = images.numel() > images.shape[1]  # of one value per channel there is no variance
        if layer.training:
            if not seen[layer]:
                layer.reset_running_stats()  # a NaN would outlive a factor of 0
            values = images.numel() // images.shape[1]
            seen[layer] += values
            layer.momentum = values / seen[layer]

    momenta = [layer.momentum for layer in layers]
    try:
        with side_effect_free(model), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_pre_hook(average, with_kwargs=True))
                if isinstance(layer, nn.SyncBatchNorm):  # other processes take no part
                    layer.forward = partial(_BatchNorm.forward, layer)  # type: ignore[method-assign]
            for images in batches:
                model(images.clone())  # which the model may change
            found = {layer: dict(layer.named_buffers(recurse=False)) for layer in layers if seen[layer]}
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    with torch.no_grad():
        for layer, buffers in found.items():
            for name in ("running_mean", "running_var"):
                layer.get_buffer(name).copy_(buffers[name])


def batch_norms_before(shapes: Mapping[str, Sequence[int]], channels: Mapping[str, int]) -> dict[str, str]:
    """Return the batch norm before each kernel of a file that has one: the kernel's name → the layer's.

    shapes: of all tensors of the file, in its order. channels: kernel → number of channels that it takes, over all
    groups, in any order, for every tensor that may be a kernel. A kernel's batch norm is the last one of that many
    channels between it and the kernel before it. Alphabetical files, and those of safetensors, have lost the order of
    the layers, and `_layer_order` stands in for it.
    """
    names, found, between = list(shapes), dict[str, str](), dict[int, str]()
    for name in sorted(names, key=_layer_order) if is_alphabetical(names) else names:
        if name in channels:
            if channels[name] in between:
                found[name] = between[channels[name]]
            between = {}
        elif name.endswith(".running_var") and len(shapes[name]) == 1:  # whatever a file calls so
            between[shapes[name][0]] = name.removesuffix(".running_var")
    return found


def _layer_order(name: str) -> list[tuple[float, int, str]]:
    """Sort modules by their numbers, of one number convolutions first: conv1, bn1, layer1, conv2, bn2, downsample."""
    order = []
    for part in name.split("."):
        number = re.search(r"\d+", part)
        kind = 0 if "conv" in part else 1 if re.match("bn|.*norm", part) else 2
        order.append((float(number[0]) if number else math.inf, kind, part))  # int refuses thousands of digits
    return order


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch-norm layers in evaluation mode normalize each batch by its own statistics; the running ones stay.

    A batch with a single value per channel has no variance: torch raises ValueError.
    """
    layers = batch_norm_layers(model)
    kept = [(layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer in layers:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, (mean, variance) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var = mean, variance
