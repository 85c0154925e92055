"""Uncorrelated feature maps, on a batch of images: K ← D G^(−1/2) diag(s)⁻¹ K, front to back through a network.

K: the filters of a group as rows; s and G: the standard deviations and the correlation matrix of the layer's feature
maps over all images and positions; D restores each filter's norm. This is the smallest change of the kernels that makes
the maps uncorrelated on these images. Stride, dilation and padding need no care, for the maps are the layer's own, and
nor does its bias, which correlation does not see: it stays. Eigenvalues of G below 1e-8 of the largest count as zero. A
filter whose map does not vary on the images stays as it is.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.closed_forms.directions import Advance, Directions, in_float64, norms, record, turned
from convsim_cli.closed_forms.passes import before_calls, maps_of, undisturbed, undone_on_failure
from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Patterns, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.kernels.kernel import VANISHED
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import check_finite, is_finite

SMALLEST_EIGENVALUE = 1e-8  # as a share of the largest
_CHUNK = 1 << 22  # values of feature maps that are held in float64 at once


def decorrelate_(
    model: nn.Module,
    images: Tensor,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    advance: Advance | None = None,
) -> list[Record]:
    """Make the feature maps of every convolution uncorrelated on a batch of images, in place, front to back.

    images: `[B, C, …]`, as the model takes them and on its device; B × positions should be many times the number of a
    layer's filters, or the maps of other images stay correlated. include, exclude, advance and the records, which come
    in the order of execution: as `orthogonalize_`. The formula is in this module's head.

    The model runs in evaluation mode, but batch normalization by the statistics of this batch, in two passes and one
    more for each layer that is called several times (its maps are those of all calls, with the layers before it changed
    already). Only the kernels change: modes, buffers, hooks and the random number generators are left as they were.

    Warns of layers that are left out: parametrized, or never called. Raises InputError for a pattern that matches
    nothing, an empty batch, and NaN or Inf in a kernel or a feature map. After any exception the kernels are as before.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> images = torch.randn(64, 3, 8, 8)
    >>> records = decorrelate_(model, images)
    >>> maps = model(images).transpose(0, 1).flatten(1)
    >>> torch.allclose(maps.corrcoef(), torch.eye(8), atol=1e-4)
    True
    """
    selection = module_kernels(model, Patterns(include, exclude))
    warn_of_unsupported(selection)
    records = decorrelate_kernels_(model, selection.kernels, images, advance)
    called = {record["name"] for record in records}
    if uncalled := [kernel.name for kernel in selection.kernels if kernel.name not in called]:
        warnings.warn(f"layers that the model does not call are left out: {', '.join(uncalled)}", stacklevel=2)
    return records


def decorrelate_kernels_(
    model: nn.Module, kernels: Sequence[Kernel], images: Tensor, advance: Advance | None = None
) -> list[Record]:
    """Do to the given kernels of a model what `decorrelate_` does. Those that are never called have no record."""
    if not len(images):
        raise InputError("`images` is empty; expected a batch of at least one image")
    weights = [weight_of(model, kernel) for kernel in kernels]
    for kernel, weight in zip(kernels, weights, strict=True):
        check_finite(kernel, weight)
    advance = advance or (lambda _: None)
    records: list[Record] = []
    with undisturbed(model, images), undone_on_failure(weights):
        calls: Counter[Kernel] = Counter()  # in the order of first calls
        with before_calls(model, kernels, lambda kernel, *_: calls.update([kernel])):
            model(images)
        waiting = list(calls)
        while waiting:
            found = _Pass(waiting, calls, advance).run(model, images)
            records += found
            waiting = waiting[len(found) :]
    advance(len(kernels) - len(records))
    return records


class _Pass:
    """A pass through the network that changes the first of the layers that are waiting, each just before it is called.

    A layer that is called several times is the last that a pass can change: its earlier calls ran with its former
    kernels.
    """

    def __init__(self, waiting: Sequence[Kernel], calls: Counter[Kernel], advance: Advance) -> None:
        self._waiting, self._calls, self._advance = list(waiting), calls, advance
        self._records: list[Record] = []
        self._moments = _Moments()
        self._seen = 0  # calls of the first layer that is waiting

    def run(self, model: nn.Module, images: Tensor) -> list[Record]:
        """Return the records of the layers that were changed: at least one."""
        with before_calls(model, list(self._waiting), self._look):
            model(images)
        if not self._records:
            kernel = self._waiting[0]
            raise InputError(
                f"{kernel.name}: the model calls this layer {self._calls[kernel]} times, but {self._seen} times once "
                "the layers before it have changed; exclude this layer"
            )
        return self._records

    def _look(self, kernel: Kernel, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._waiting or kernel is not self._waiting[0]:
            return
        self._moments.update(maps_of(layer, inputs, options), kernel.groups)
        self._seen += 1
        if self._seen == self._calls[kernel]:
            self._change(kernel, layer.weight)
            self._waiting = self._waiting[1:] if self._seen == 1 else []
            self._moments, self._seen = _Moments(), 0

    def _change(self, kernel: Kernel, weight: Tensor) -> None:
        before = weight.detach().clone()
        weight.copy_(turned(kernel, before, self._moments.directions(kernel)))
        self._records.append(record(kernel, before, weight))
        self._advance(1)


class _Moments:
    """Mean and covariance of a layer's feature maps over images and positions, per group, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64)

    def update(self, maps: Tensor, groups: int) -> None:
        """Add maps `[images, S, *space]`."""
        for chunk in maps.split(max(1, _CHUNK // maps[0].numel())):
            self._add(in_float64(chunk).unflatten(1, (groups, -1)).flatten(3).permute(1, 2, 0, 3).flatten(2))

    def _add(self, values: Tensor) -> None:
        """Merge `[groups, S / groups, n]` values into the moments (Chan et al. 1979), without cancellation."""
        count, mean = values.shape[-1], values.mean(-1, keepdim=True)
        centered, shift = values - mean, mean - self._mean
        total = self._count + count
        between = shift @ shift.mT * (self._count * count / total)
        self._scatter = self._scatter + centered @ centered.mT + between
        self._mean = self._mean + shift * (count / total)
        self._count = total

    def directions(self, kernel: Kernel) -> Directions:
        """Return G^(−1/2) diag(s)⁻¹ K as a function of K."""
        covariance = self._scatter / self._count
        if not is_finite(covariance):
            raise InputError(f"{kernel.name}: its feature maps on these `images` hold NaN or Inf; check the images")
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        spread, size = variance.sqrt(), (variance + self._mean.squeeze(-1).square()).sqrt()

        def whitened(filters: Tensor, living: Tensor) -> Tensor:
            largest = torch.where(living, size / norms(filters), 0).amax()
            varying = living & (spread > VANISHED * largest * norms(filters))  # less is rounding of a constant map
            inverse = torch.where(varying, 1 / spread, 0)
            root = _inverse_root(inverse.unsqueeze(-1) * covariance * inverse.unsqueeze(-2))
            rows = (root * inverse.unsqueeze(-2)) @ filters.flatten(2)
            return torch.where(varying.unsqueeze(-1), rows, 0)

        return whitened


def _inverse_root(correlation: Tensor) -> Tensor:
    """Return G^(−1/2), in which eigenvalues that count as zero take no part."""
    values, vectors = torch.linalg.eigh(correlation)
    kept = values > SMALLEST_EIGENVALUE * values[..., -1:]
    roots = torch.where(kept, values, 1).rsqrt() * kept
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT
