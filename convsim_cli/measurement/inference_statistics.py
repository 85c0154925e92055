"""Which batch-norm statistics a network is measured with: its own, or those of the inputs.

In evaluation mode batch normalization divides by stored standard deviations. Where these do not belong to the kernels,
scaling a layer scales what later layers see, and figures move that no scale may move. Statistics of the inputs
themselves cancel every scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.batch_norm import batch_norm_layers, reestimate_statistics

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
