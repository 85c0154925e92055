"""Autocorrelations and convolutions of filters by FFT, which is cheaper than products where kernels are large.

Filters are `[groups, S / groups, N, C]`; their spectrum is complex, `[groups, S / groups, *frequencies, C]`, of which
the last axis of frequencies is halved. An axis of k taps has at least 2k − 1 frequencies, so that no lag meets another.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from convsim_cli.machine.differentiation import Taps
from convsim_cli.machine.modes import constant


@lru_cache(maxsize=64)
def fft_shape(taps: Taps) -> Taps:
    """Return for each axis the smallest length ≥ 2k − 1 without a prime factor above 5: FFTs are slow on others."""
    return tuple(next(length for length in range(2 * k - 1, 4 * k) if 30**length % length == 0) for k in taps)


def spectra(filters: Tensor, taps: Taps) -> Tensor:
    """Return the spectrum of each channel of each filter."""
    shaped = filters.reshape(*filters.shape[:2], *taps, filters.shape[-1])
    return torch.fft.rfftn(shaped, s=fft_shape(taps), dim=_tap_axes(taps))


def power_spectra(spectrum: Tensor, taps: Taps) -> Tensor:
    """Return the spectrum of K_i[c] ⋆ K_i[c] for each channel: `[groups, S / groups, frequencies, C]`, real.

    It is scaled so that inner products of two of them are those of the autocorrelations (Parseval's theorem).
    """
    power = torch.view_as_real(spectrum).square().sum(-1).flatten(2, -2)
    return power * unit_impulse(power, taps).unsqueeze(-1)


def convolve(spectrum: Tensor, power: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return 2 Σ_m K_i[c][m] · R_i[c][m − n], in the layout of filters.

    spectrum: that of K; power: that of R, scaled as `power_spectra`, with C channels or with one for all.
    """
    weights = power * (2 / unit_impulse(power, taps)).unsqueeze(-1)
    product = weights.reshape(*spectrum.shape[:-1], -1) * spectrum
    full = torch.fft.irfftn(product, s=fft_shape(taps), dim=_tap_axes(taps))
    inner = full[(..., *(slice(k) for k in taps), slice(None))].flatten(2, -2)
    return inner if out is None else out.copy_(inner)


@constant
def unit_impulse(like: Tensor, taps: Taps) -> Tensor:
    """Return the spectrum, scaled as `power_spectra`, that is 1 at lag 0 and 0 at all others: `[frequencies]`.

    √(1/points), or √(2/points) for a frequency that stands for its mirror image as well.
    """
    shape = fft_shape(taps)
    last = torch.arange(shape[-1] // 2 + 1, device=like.device)
    alone = (2 * last) % shape[-1] == 0
    scale = ((2 - alone.to(like.dtype)) / prod(shape)).sqrt()
    return scale.expand(*shape[:-1], -1).flatten()


def _tap_axes(taps: Taps) -> Taps:
    return tuple(range(2, 2 + len(taps)))
