"""Batch normalization: re-estimate running statistics from inputs, or normalize by each batch instead.

Running statistics are averages over past batches, so they lag behind kernels that change: after a few hundred steps by
up to 0.4 standard deviations. `torch.optim.swa_utils.update_bn` re-estimates them too, but it puts the whole network in
training mode: dropout then draws random numbers and frozen layers thaw, and an exception leaves the network so.

Which batch-norm statistics a network is measured with: its own, or those of the inputs.

In evaluation mode batch normalization divides by stored standard deviations. Where these do not belong to the kernels,
scaling a layer scales what later layers see, and figures move that no scale may move. Statistics of the inputs
themselves cancel every scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.precision import as_written, full_precision


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers of a network that keep running statistics."""
    layers = (layer for layer in model.modules() if isinstance(layer, _BatchNorm))
    return [layer for layer in layers if layer.track_running_stats and layer.running_mean is not None]


def reestimate_statistics(
    model: nn.Module, batches: Iterable[Tensor], layers: Sequence[_BatchNorm] | None = None
) -> None:
    """Replace the running statistics of a network's batch-norm layers, in place, by those of the given batches.

    batches: inputs of the network `[B, C, …]`, on its device. Each layer's mean and unbiased variance become the plain
    averages over batches (cumulative averages), so batches should be of equal size. layers: the layers to re-estimate,
    all that keep statistics for None. Without such layers no batch is taken.

    Everything else is in evaluation mode, so nothing draws random numbers, and nothing else in the network changes:
    `num_batches_tracked` keeps counting training batches. A layer that sees a single value per channel, or is never
    called, keeps its statistics. Modes and momentum are restored on every exit; after an exception the former
    statistics are back as well. Precision and autocast are those of the caller.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> images = torch.randn(64, 3, 8, 8)
    >>> reestimate_statistics(model, images.split(16))
    >>> torch.allclose(model[1].running_mean, model[0](images).mean((0, 2, 3)), atol=1e-5)
    True
    """
    layers = batch_norm_layers(model) if layers is None else layers
    if not layers:
        return
    with torch.no_grad(), as_written(), evaluation_mode(model), _averaging(layers):
        for images in batches:
            model(images)


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


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and every module back in its own mode on leaving."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _averaging(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let layers average the statistics of whatever they are called with. On an exception they take the former ones."""
    averages = [_Average(layer) for layer in layers]
    try:
        yield
    except BaseException:
        for average in averages:
            average.undo()
        raise
    finally:
        for average in averages:
            average.end()


class _Average:
    """The cumulative average of one layer's statistics: momentum 1/k at the k-th call, so no device is waited for.

    torch's own (`momentum=None`) reads the number of batches back from the device at every call.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self._layer, self._calls, self._momentum = layer, 0, layer.momentum
        self._former = {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
        self._hook = layer.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def _before_call(self, layer: _BatchNorm, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        images: Tensor = (*inputs, *options.values())[0]
        layer.training = images.numel() > images.shape[1]  # of one value per channel there is no variance
        if not layer.training:
            return
        if not self._calls:
            layer.reset_running_stats()  # a NaN would outlive a factor of 0
        self._calls += 1
        layer.momentum = 1 / self._calls

    def undo(self) -> None:
        for name, former in self._former.items():
            self._layer.get_buffer(name).copy_(former)

    def end(self) -> None:
        self._hook.remove()
        self._layer.momentum = self._momentum
        if self._layer.num_batches_tracked is not None:
            self._layer.num_batches_tracked.copy_(self._former["num_batches_tracked"])


Wanted = Literal["auto", "stored", "inputs"]
CHOICES: tuple[str, ...] = get_args(Wanted)
STORED, INPUTS = "stored", "inputs"


def choose_statistics(model: nn.Module, wanted: str = "auto", kernels_changed: bool = False) -> str | None:
    """Return `stored` or `inputs`, None for a network without batch-norm statistics.

    wanted: `auto` takes those of the inputs where the stored ones do not belong to the kernels: they are a fresh
    network's, or the kernels were changed after training. Raises InputError for another name.
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


@contextmanager
def input_statistics(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Let a network normalize by the statistics of batches, its own being set aside untouched meanwhile.

    A layer that sees one value per channel keeps its own. Batches should be of equal size.
    """
    layers = batch_norm_layers(model)
    with _copied_buffers(layers):
        if layers:
            with full_precision(layers[0].running_mean.device):  # type: ignore[union-attr]
                reestimate_statistics(model, batches, layers)
        yield


@contextmanager
def _copied_buffers(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Give layers copies of their buffers; on leaving they have their own back."""
    own = [dict(layer._buffers) for layer in layers]
    try:
        for layer in layers:
            layer._buffers.update(
                {name: tensor.clone() for name, tensor in layer._buffers.items() if tensor is not None}
            )
        yield
    finally:
        for layer, buffers in zip(layers, own, strict=True):
            layer._buffers.update(buffers)
