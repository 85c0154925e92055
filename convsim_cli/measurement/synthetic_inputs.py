"""Synthetic inputs: white noise, uniform noise, and noise with the 1/f spectrum of natural images."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean

ProbeName = Literal["white", "uniform", "natural"]
PROBES: tuple[str, ...] = get_args(ProbeName)
SIDE = {1: 1024, 2: 32, 3: 16}  # pixels along each axis of a synthetic input, by its number of axes


def make_inputs(probe: str, samples: int, channels: int, space: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return synthetic inputs `[samples, channels, *space]` in float32, the same for the same seed on every device.

    probe: `white` N(0, 1); `uniform` U(0, 1), the paper's; `natural`: independent channels of random phase whose
    amplitude falls as 1/f, each of zero mean and unit variance. Raises InputError for another name.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, channels, *space)
    if probe == "white":
        return torch.randn(shape, generator=generator)
    if probe == "uniform":
        return torch.rand(shape, generator=generator)
    if probe == "natural":
        return _natural(torch.randn(shape, generator=generator))
    raise InputError(f"unknown input {probe!r}: {did_you_mean(probe, PROBES)}")


def _natural(noise: Tensor) -> Tensor:
    """Give white noise the amplitude 1/f at its own random phases."""
    space = noise.shape[2:]
    axes = tuple(range(2, noise.ndim))
    frequency = torch.zeros(())
    for axis, side in enumerate(space):
        steps = torch.fft.rfftfreq(side) if axis == len(space) - 1 else torch.fft.fftfreq(side)
        frequency = frequency.unsqueeze(-1) + steps.square()
    amplitude = frequency.sqrt().reciprocal()
    amplitude[(0,) * len(space)] = 0  # zero mean
    spectrum = torch.fft.rfftn(noise, dim=axes)
    images = torch.fft.irfftn(spectrum / spectrum.abs().clamp_min(1e-12) * amplitude, s=space, dim=axes)
    spread = images.std(dim=axes, keepdim=True, correction=0)
    return images / torch.where(spread > 0, spread, 1)
