"""Synthetic inputs (white noise, uniform noise, 1/f noise as in natural images), and a layer's maps on them alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.kernels import Kernel
from convsim_cli.measurement.feature_maps import MOST_FILTERS, LayerMaps, RandomKernels, inputs_at_once
from convsim_cli.precision import full_precision

ProbeName = Literal["white", "uniform", "natural"]
PROBES: tuple[str, ...] = get_args(ProbeName)
FEATURES = "features"  # what a layer inside a network sees: of a file alone, layer by layer
LAYER_PROBES = (*PROBES, FEATURES)
IMAGE_CHANNELS = (1, 3)  # of a network's first layers
IMAGE_CORRELATION = 0.85  # of the channels of photographs; those of CIFAR-10: 0.79 to 0.91
SIDE = {1: 1024, 2: 32, 3: 16}  # pixels along each axis of a synthetic input, by its number of axes
CPU = torch.device("cpu")
_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": CPU}  # whatever torch's defaults are
_CONVOLUTIONS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
_KEPT = 1 << 26  # values of all inputs of a layer; of more, parts are made anew each time
_MADE_AT_ONCE = 1 << 24  # values of such a part, unless one input has more: torch draws multiples of 16 as a whole
_LARGEST = 1 << 28  # values of one input, and of its maps
_FILTERED_AT_ONCE = 1 << 21  # values; spectra take twice the memory of what is filtered


def make_inputs(
    probe: str,
    samples: int,
    channels: int,
    space: tuple[int, ...],
    seed: int | torch.Generator = 0,
    device: torch.device = CPU,
) -> Tensor:
    """Return synthetic inputs `[samples, channels, *space]` in float32 on a device.

    probe: `white` N(0, 1); `uniform` U(0, 1), as in the paper; `natural`: independent channels of random phase whose
    amplitude falls as 1/f, each of zero mean and unit variance. The noise is drawn on the CPU, so a seed gives the same
    inputs on every device; the 1/f filter runs on the device. seed: a number, or a generator on
    the CPU to draw from. Raises InputError for another name.
    """
    if probe not in PROBES:
        raise InputError(f"unknown input {probe!r}: {did_you_mean(probe, PROBES)}")
    draw = torch.rand if probe == "uniform" else torch.randn
    generator = torch.Generator(CPU).manual_seed(seed) if isinstance(seed, int) else seed
    noise = draw((samples, channels, *space), generator=generator, **_FLOAT32).to(device)
    if probe == "natural":
        amplitude, axes = _amplitude(space).to(device), tuple(range(2, noise.ndim))
        for part in noise.split(max(1, _FILTERED_AT_ONCE // (channels * prod(space)))):
            spectrum = torch.fft.rfftn(part, dim=axes)
            spectrum.mul_(amplitude / spectrum.abs().clamp_min_(1e-12))  # at its own random phases
            part.copy_(torch.fft.irfftn(spectrum, s=space, dim=axes))
    return noise


def _amplitude(space: tuple[int, ...]) -> Tensor:
    """1/f over the half spectrum of real images, scaled so that images of this amplitude have unit variance."""
    frequency = torch.zeros((), **_FLOAT32)
    for axis, side in enumerate(space):
        steps = (torch.fft.rfftfreq if axis == len(space) - 1 else torch.fft.fftfreq)(side, **_FLOAT32)
        frequency = frequency.unsqueeze(-1) + steps.square()
    amplitude = frequency.sqrt().reciprocal()
    amplitude[(0,) * len(space)] = 0  # zero mean
    both_halves = torch.full((space[-1] // 2 + 1,), 2.0, **_FLOAT32)
    both_halves[0] = 1
    if space[-1] % 2 == 0:
        both_halves[-1] = 1
    variance = (amplitude.square() * both_halves).sum() / prod(space) ** 2  # Parseval
    return amplitude / variance.sqrt() if variance > 0 else amplitude


BatchNormBefore = tuple[Tensor, Tensor]  # γ and β


class LayerProbe:
    """Synthetic inputs of a layer's own channels, run through its kernels at stride 1 under full padding.

    name: one of `LAYER_PROBES`. `features` resembles what a layer sees: 1/f noise with the correlated channels of
    photographs for layers of 1 or 3 channels, else relu(β + γ·noise) with β and γ of the batch norm before the layer,
    relu(noise) without one; under padding that keeps the size, since full padding of positive inputs makes the border a
    signal that all maps share. samples: number of inputs; side: pixels along each axis, 32 for 2-D kernels
    unless given; seed: of the inputs, and of the random kernels that chance is measured with. Inputs are kept until a
    layer needs others, so that measuring a layer again, or the next one like it, takes the same ones, and the same
    chance. If they take more than 256 MB together, parts of them are generated again each time, with the same values.
    Raises InputError if one input of a layer, or its maps, would take more than 1 GB.
    """

    def __init__(self, name: str = "white", samples: int = 16, side: int | None = None, seed: int = 0) -> None:
        if name not in LAYER_PROBES:
            raise InputError(f"unknown input {name!r}: {did_you_mean(name, LAYER_PROBES)}")
        self.name, self.samples, self.side, self.seed = name, samples, side, seed
        self._kept: tuple[object, Tensor] | None = None
        self._chances: dict[object, RandomKernels] = {}  # on the inputs that are kept

    def look(
        self, kernel: Kernel, weight: Tensor, norm: BatchNormBefore | None = None, *, paper: bool = True
    ) -> LayerMaps:
        """Return a layer's maps, chance included.

        weight: as stored, on the device to compute on. norm: γ and β of the batch norm before it, for `features`.
        paper: take the paper's figures too.
        """
        maps = self._run(kernel, weight, norm, chance=True, paper=paper)
        assert maps.chance is not None
        key = kernel.shape, kernel.groups, kernel.transposed
        if norm is None and key in self._chances:  # as for thousands of layers of one shape
            maps.chance = self._chances[key]
            return maps
        drawn = [kernel.to_convolution(weight) for weight in maps.chance.weights(weight.float())]
        if maps.sample is not None:  # of very many filters, only those whose maps are kept are run
            drawn = [filters.unflatten(0, (kernel.groups, -1))[:, :MOST_FILTERS].flatten(0, 1) for filters in drawn]
        at_once = drawn if kernel.groups > 1 else [torch.cat(drawn)]
        for images in self._batches(kernel, weight.device, maps.chance.filters, norm):
            found = [self._convolve(kernel, images, filters) for filters in at_once]
            maps.chance.update(found if kernel.groups > 1 else found[0].chunk(len(drawn), 1))
        if maps.sample is None and norm is None:
            self._chances[key] = maps.chance
        return maps

    def fm_corr(self, kernel: Kernel, weight: Tensor, living: Tensor | None = None) -> float | None:
        """Return the mean |correlation| of a layer's maps alone.

        living: which filters take part, by their norms for None.
        """
        maps = self._run(kernel, weight, None, chance=False, paper=False)
        maps.living = maps.living if living is None else living
        return maps.fm_corr()

    def _run(
        self, kernel: Kernel, weight: Tensor, norm: BatchNormBefore | None, *, chance: bool, paper: bool
    ) -> LayerMaps:
        """Return the maps of a layer's own filters."""
        scale = weight.abs().amax().double().item() or 1.0  # other maps could leave the range of float32
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # half precision would round the quotient
        filters = (kernel.to_convolution(wide) / scale).float()
        maps = LayerMaps(kernel, weight, scale=scale, seed=self.seed, chance=chance, paper=paper)
        for images in self._batches(kernel, weight.device, kernel.filters, norm):
            maps.update(self._convolve(kernel, images, filters))
        return maps

    def _batches(
        self, kernel: Kernel, device: torch.device, filters: int, norm: BatchNormBefore | None
    ) -> Iterator[Tensor]:
        """The inputs, so many at a time that the maps of `filters` filters take bounded memory."""
        axes = len(kernel.taps)
        space = (self.side or SIDE[axes],) * axes
        positions = prod(side + k - 1 for side, k in zip(space, kernel.taps, strict=True))
        largest = max(kernel.channels, kernel.filters) * positions
        if largest > _LARGEST:
            raise InputError(
                f"{kernel.name} {list(kernel.shape)}: one input and its maps would take {4e-9 * largest:.1f} GB; lower "
                "`input_size`, or `exclude` this layer"
            )
        at_once = inputs_at_once(filters, kernel.groups, positions)
        parts = self._parts(kernel.channels, space, device)
        for images in chain.from_iterable(part.split(at_once) for part in parts):
            if self.name != FEATURES or kernel.channels in IMAGE_CHANNELS:
                yield images
            elif norm is None:
                yield images.relu()
            else:
                gain, shift = (values.reshape(-1, *(1,) * axes) for values in norm)
                yield (images * gain).add_(shift).relu_()

    def _parts(self, channels: int, space: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
        """The inputs, all together if they can be kept, and in parts otherwise."""
        each, key = channels * prod(space), (channels, space, device)
        if self._kept is None or self._kept[0] != key:
            self._kept, self._chances = None, {}  # before others are made: one layer's inputs at a time
        if self._kept is not None:
            yield self._kept[1]
        elif self.samples * each <= _KEPT:
            self._kept = key, self._make_inputs(self.samples, channels, space, self.seed, device)
            yield self._kept[1]
        else:
            generator, at_once = torch.Generator(CPU).manual_seed(self.seed), max(1, _MADE_AT_ONCE // each)
            for start in range(0, self.samples, at_once):
                count = min(at_once, self.samples - start)
                yield self._make_inputs(count, channels, space, generator, device)

    def _make_inputs(
        self, samples: int, channels: int, space: tuple[int, ...], seed: int | torch.Generator, device: torch.device
    ) -> Tensor:
        if self.name != FEATURES:
            return make_inputs(self.name, samples, channels, space, seed, device)
        if channels not in IMAGE_CHANNELS:
            return make_inputs("natural", samples, channels, space, seed, device)
        shared, own = make_inputs("natural", samples, channels + 1, space, seed, device).split((1, channels), 1)
        return shared * IMAGE_CORRELATION**0.5 + own * (1 - IMAGE_CORRELATION) ** 0.5

    def _convolve(self, kernel: Kernel, images: Tensor, filters: Tensor) -> Tensor:
        padding = tuple(k - 1 for k in kernel.taps)
        if self.name == FEATURES:  # as padding="same", of which torch warns where kernels are even
            padding = tuple(side // 2 for side in padding)
            ends = [extra for k in reversed(kernel.taps) for extra in (0, 1 - k % 2)]
            images = torch.nn.functional.pad(images, ends) if any(ends) else images
        convolution: Any = _CONVOLUTIONS[len(kernel.taps) - 1]
        with full_precision(images.device), torch.inference_mode():
            found: Tensor = convolution(images, filters, padding=padding, groups=kernel.groups)
        return found
