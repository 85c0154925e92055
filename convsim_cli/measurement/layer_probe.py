"""Probe a layer by itself: the feature maps that its kernels alone give on synthetic inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity, inputs_at_once
from convsim_cli.measurement.layer import LayerMaps
from convsim_cli.measurement.synthetic_inputs import SIDE, make_inputs

_CONVOLUTIONS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


class LayerProbe:
    """Synthetic inputs of a layer's own channels, run through its kernels at stride 1 under full padding.

    name: `white`, `uniform` or `natural`; samples: number of inputs; side: pixels along each axis, 32 for 2-D kernels
    unless given; seed: of the inputs, and of the random kernels that chance is measured with. Inputs are kept until a
    layer needs others, so that measuring a layer again, or the next one like it, takes the same ones.
    """

    def __init__(self, name: str = "white", samples: int = 16, side: int | None = None, seed: int = 0) -> None:
        self.name, self.samples, self.side, self.seed = name, samples, side, seed
        self._kept: tuple[object, Tensor] | None = None

    def look(self, kernel: Kernel, weight: Tensor) -> LayerMaps:
        """Return what is seen of a layer's maps, chance included. weight: as stored, on the device to compute on."""
        filters, scale = _scaled(kernel, weight)
        seen = LayerMaps(kernel, weight, scale=scale, seed=self.seed)
        assert seen.chance is not None
        for images in self._batches(kernel, weight.device, max(kernel.filters, seen.chance.filters)):
            seen.similarity.update(_convolve(kernel, images, filters))
            seen.chance.update(partial(_convolve_stored, kernel, images), filters)
        return seen

    def fm_cos(self, kernel: Kernel, weight: Tensor, living: Tensor | None = None) -> float | None:
        """Return the mean |cos| of a layer's maps alone. living: which filters take part, by their norms for None."""
        filters, scale = _scaled(kernel, weight)
        living = living_filters(kernel.to_filters(weight)) if living is None else living
        similarity = FeatureMapSimilarity(kernel.groups, scale=scale, living=living, keep_pairs=False)
        for images in self._batches(kernel, weight.device, kernel.filters):
            similarity.update(_convolve(kernel, images, filters))
        return similarity.fm_cos

    def _batches(self, kernel: Kernel, device: torch.device, filters: int) -> Iterator[Tensor]:
        """The inputs, so many at a time that the maps of `filters` filters take bounded memory."""
        axes = len(kernel.taps)
        space = (self.side or SIDE[axes],) * axes
        positions = prod(side + k - 1 for side, k in zip(space, kernel.taps, strict=True))
        inputs = self._inputs(kernel.channels, space, device)
        yield from inputs.split(inputs_at_once(filters, kernel.groups, positions))

    def _inputs(self, channels: int, space: tuple[int, ...], device: torch.device) -> Tensor:
        key = (channels, space, device)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before others are made: one layer's inputs at a time
            self._kept = key, make_inputs(self.name, self.samples, channels, space, self.seed, device)
        return self._kept[1]


def _scaled(kernel: Kernel, weight: Tensor) -> tuple[Tensor, float]:
    """Return the filters divided by their largest value, and that: other maps could leave the range of float32."""
    peak = weight.abs().amax().double().item() or 1.0
    return (kernel.to_convolution(weight) / peak).float(), peak


def _convolve(kernel: Kernel, images: Tensor, filters: Tensor) -> Tensor:
    padding = tuple(k - 1 for k in kernel.taps)
    convolution = _CONVOLUTIONS[len(kernel.taps) - 1]
    with full_precision(images.device), torch.inference_mode():
        return convolution(images, filters, padding=padding, groups=kernel.groups)


def _convolve_stored(kernel: Kernel, images: Tensor, weight: Tensor) -> Tensor:
    return _convolve(kernel, images, kernel.to_convolution(weight))
