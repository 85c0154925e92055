"""Synthetic inputs: white noise, uniform noise, and noise with the 1/f spectrum of natural images."""

from __future__ import annotations

from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean

ProbeName = Literal["white", "uniform", "natural"]
PROBES: tuple[str, ...] = get_args(ProbeName)
SIDE = {1: 1024, 2: 32, 3: 16}  # pixels along each axis of a synthetic input, by its number of axes
CPU = torch.device("cpu")

_FILTERED_AT_ONCE = 1 << 21  # values; spectra take twice the memory of what is filtered


def make_inputs(
    probe: str, samples: int, channels: int, space: tuple[int, ...], seed: int = 0, device: torch.device = CPU
) -> Tensor:
    """Return synthetic inputs `[samples, channels, *space]` in float32 on a device.

    probe: `white` N(0, 1); `uniform` U(0, 1), as in the paper; `natural`: independent channels of random phase whose
    amplitude falls as 1/f, each of zero mean and unit variance. The noise is drawn on the CPU, so a seed gives the same
    inputs on every device; the 1/f filter runs on the device. Raises InputError for another name.
    """
    if probe not in PROBES:
        raise InputError(f"unknown input {probe!r}: {did_you_mean(probe, PROBES)}")
    draw = torch.rand if probe == "uniform" else torch.randn
    noise = draw((samples, channels, *space), generator=torch.Generator().manual_seed(seed)).to(device)
    if probe == "natural":
        amplitude = _amplitude(space).to(device)
        for part in noise.split(max(1, _FILTERED_AT_ONCE // (channels * prod(space)))):
            _filter_(part, amplitude)
    return noise


def _amplitude(space: tuple[int, ...]) -> Tensor:
    """1/f over the half spectrum of real images, scaled so that images of this amplitude have unit variance."""
    frequency = torch.zeros(())
    for axis, side in enumerate(space):
        steps = torch.fft.rfftfreq(side) if axis == len(space) - 1 else torch.fft.fftfreq(side)
        frequency = frequency.unsqueeze(-1) + steps.square()
    amplitude = frequency.sqrt().reciprocal()
    amplitude[(0,) * len(space)] = 0  # zero mean
    both_halves = torch.full((space[-1] // 2 + 1,), 2.0)
    both_halves[0] = 1
    if space[-1] % 2 == 0:
        both_halves[-1] = 1
    variance = (amplitude.square() * both_halves).sum() / prod(space) ** 2  # Parseval
    return amplitude / variance.sqrt() if variance > 0 else amplitude


def _filter_(noise: Tensor, amplitude: Tensor) -> None:
    """Give white noise an amplitude at its own random phases, in place."""
    axes = tuple(range(2, noise.ndim))
    spectrum = torch.fft.rfftn(noise, dim=axes)
    spectrum.mul_(amplitude / spectrum.abs().clamp_min_(1e-12))
    noise.copy_(torch.fft.irfftn(spectrum, s=noise.shape[2:], dim=axes))
