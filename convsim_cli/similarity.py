"""Convolutional Similarity: value and gradient, exact, in time linear in the channels.

Eq. 10 of the paper: L_CS = Σ_{i<j} Σ_{c1,c2} ‖K_i[c1] ⋆ K_j[c2]‖², over all pairs of filters that see the same input.
Since ‖a ⋆ b‖² = ⟨a ⋆ a, b ⋆ b⟩, with A_i = Σ_c K_i[c] ⋆ K_i[c] (one small array of lags per filter) and
R_i = Σ_{j≠i} A_j within the group:

    L_CS = ½ Σ_i ⟨A_i, R_i⟩                 ∂L_CS/∂K_i[c][n] = 2 Σ_m K_i[c][m] · R_i[m − n]

Cost: two batched matrix products of N·N·C per filter (N taps, C channels) and S·N² of extra memory. Where FFTs are
cheaper, A_i is never computed: its power spectrum Σ_c |FFT(K_i[c])|² has the same inner products (Parseval), and one
FFT leads there and one back. For 1×1 kernels, L_CS = Σ_{i<j} ‖K_i‖²‖K_j‖². Stride, dilation and padding have no effect.
Eq. 10 is exact for feature maps at stride 1 and full padding (Eq. 3).

Lags are kept in FFT order: entry d of an axis is lag d for d < k and lag d − (2k − 1) above.

Filters are `[groups, S / groups, N, C]`; their spectrum is complex, `[groups, S / groups, *frequencies, C]`, of which
the last axis of frequencies is halved. An axis of k taps has at least 2k − 1 frequencies, so that no lag meets another.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2, prod
from numbers import Integral

import torch
from torch import Tensor

from convsim_cli.precision import Differentiable, Taps, constant

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FEW_FILTERS = 128  # up to which the sums of others are one product with a matrix
FEW_FILTERS_ELSEWHERE = 2048  # the same off the CPU, where a cumulative sum is a long chain of dependent steps
FEW_TAPS = 25  # up to which taps are folded onto lags by a product with a matrix


def convolutional_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the Convolutional Similarity L_CS of a layer's kernels, differentiable to any order.

    weight: `[S, C, *taps]` with 1 to 3 axes of taps, floating; S filters in `groups` consecutive groups, pairs counted
    within each. Half types are computed in float32. Returns a scalar ≥ 0 (float32, or float64 for a float64 weight),
    inf where L_CS exceeds its type; float64 weights beyond 1e154, and on CUDA float32 ones beyond 1e17, may give NaN.
    Raises ValueError for another shape, type or number of groups. Source: Eq. 10.

    >>> convolutional_similarity(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])).item()  # ‖(1, 2) ⋆ (3, 0)‖² = 3² + 6²
    45.0
    """
    return similarity_of_filters(*to_filters(weight, groups))


def to_filters(weight: Tensor, groups: int = 1) -> tuple[Tensor, Taps]:
    """Lay a weight `[S, C, *taps]` out as filters `[groups, S / groups, N, C]`, and return its taps.

    Contiguous on the CPU: its batched products like this layout, a view of a channels_last weight, best. Elsewhere a
    view of any weight, if there is one: a copy would be a launch. Half types become float32.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"expected a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in _TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        raise ValueError(f"expected a weight in {known}, got {weight.dtype} {list(weight.shape)}; convert it first")
    if weight.layout != torch.strided or weight.is_nested:
        kind = "nested" if weight.is_nested else weight.layout
        raise ValueError(f"expected a dense weight, got a {kind} tensor; convert it first")
    if not 3 <= weight.ndim <= 5 or 0 in weight.shape:
        raise ValueError(
            "expected a convolution weight [S, C, taps…] of 3 to 5 axes, none of them empty, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if not isinstance(groups, Integral) or isinstance(groups, bool):
        raise ValueError(f"`groups` is {groups!r}; expected a whole number")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{groups} groups do not divide the {weight.shape[0]} filters of a weight {list(weight.shape)}"
        )
    taps = tuple(weight.shape[2:])
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    filters = weight.movedim(1, -1).reshape(groups, weight.shape[0] // groups, prod(taps), weight.shape[1])
    return filters.contiguous() if filters.is_cpu else filters, taps


def to_weight(filters: Tensor, taps: Taps) -> Tensor:
    """Undo `to_filters`: a view `[S, C, *taps]` of filters `[groups, S / groups, N, C]`."""
    return filters.reshape(-1, *taps, filters.shape[-1]).movedim(-1, 1)


def similarity_of_filters(filters: Tensor, taps: Taps) -> Tensor:
    """Return L_CS of filters in the layout of `to_filters`, differentiable to any order, in full precision."""
    return _SIMILARITY(filters, taps)


def similarity_gradient(filters: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return ∂L_CS/∂filters, in the layout of `to_filters`. The value itself is not needed for it.

    out: a contiguous tensor like filters to write to, outside of any graph: a loop then takes no memory.
    """
    spectrum = spectrum_if_cheaper(filters, taps)
    return _gradient(filters, twice_the_others(autocorrelation(filters, taps, spectrum)), taps, out, spectrum)


def similarity_and_others(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return L_CS = ½ Σ_i ⟨A_i, R_i⟩, as it is in the precision at hand; and 2 R_i, which its gradient needs too."""
    autocorrelations = autocorrelation(filters, taps, spectrum_if_cheaper(filters, taps))
    others = twice_the_others(autocorrelations)
    return inner_product(autocorrelations, others) / 4, others


def gradient_from_others(filters: Tensor, others: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return ∂L_CS/∂filters from the 2 R_i that `similarity_and_others` returned. out: as `similarity_gradient`."""
    return _gradient(filters, others, taps, out, spectrum_if_cheaper(filters, taps))


def tangent_gradient(filters: Tensor, taps: Taps, norms: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return ∂L_CS/∂filters without its parts along the filters, which are first scaled to their L2 norms, in place.

    norms: `[groups, S / groups, 1, 1]`; None leaves the filters as they are. A filter whose square underflows is not
    scaled, and has a zero gradient. Since ⟨∂L_CS/∂K_i, K_i⟩ = 2⟨A_i, R_i⟩ and K_i convolved with a single lag 0 is K_i
    itself, the part along K_i leaves by one change of R_i at lag 0; since A_i at lag 0 is ‖K_i‖², the scaling needs no
    other norm. Both cost next to nothing.
    """
    spectrum = spectrum_if_cheaper(filters, taps)
    autocorrelations = autocorrelation(filters, taps, spectrum)
    impulse = None if spectrum is None else unit_impulse(filters, taps)
    least = torch.finfo(filters.dtype).tiny
    squares = _at_lag_zero(autocorrelations, impulse).clamp_min(least)
    if norms is not None:
        wanted = norms.squeeze(-1).square().clamp_min_(least)
        quotient = wanted / squares
        scale = quotient.sqrt()
        filters.mul_(scale.unsqueeze(-1))
        if spectrum is not None:
            spectrum.mul_(scale.reshape(*scale.shape[:2], *[1] * (spectrum.ndim - 2)))
        autocorrelations.mul_(quotient)
        squares = wanted
    others = twice_the_others(autocorrelations)
    along = (autocorrelations * others).sum(-1, keepdim=True).div_(squares)
    _subtract_at_lag_zero_(others, along, impulse)
    return _gradient(filters, others, taps, out, spectrum)


def spectrum_if_cheaper(filters: Tensor, taps: Taps) -> Tensor | None:
    """Return the FFT of filters where that is the cheaper route to value and gradient, None elsewhere."""
    return spectra(filters, taps) if fft_is_cheaper(filters.shape[-1], taps, filters.device.type) else None


def autocorrelation(filters: Tensor, taps: Taps, spectrum: Tensor | None = None) -> Tensor:
    """Return A_i = Σ_c K_i[c] ⋆ K_i[c] for each filter: `[groups, S / groups, lags]`; from a spectrum, A_i's spectrum.

    spectrum: what `spectrum_if_cheaper` returns. Either form has the same inner products.
    """
    if spectrum is not None:
        return power_spectra(spectrum, taps).sum(-1)
    groups, each, size, _ = filters.shape
    gram = (filters @ filters.mT).reshape(groups, each, size * size)
    if size == 1:
        return gram
    if _folds_by_matrix(taps, filters.device):
        return gram @ lag_matrix(filters, taps)
    return gram.new_zeros(groups, each, prod(lag_shape(taps))).index_add(-1, _lag_index(filters, taps), gram)


def twice_the_others(autocorrelations: Tensor) -> Tensor:
    """Return 2 R_i, R_i = Σ_{j≠i} A_j within each group, of the same shape: what the gradient multiplies by.

    Total − A_i would cancel where one filter dominates. A few filters are summed by a matrix that has zeros on its
    diagonal, which is one product; many as exclusive prefix plus exclusive suffix, which is linear in their number.
    """
    few = FEW_FILTERS if autocorrelations.is_cpu else FEW_FILTERS_ELSEWHERE
    if autocorrelations.shape[1] <= few:
        return _twos_but_one(autocorrelations, autocorrelations.shape[1]) @ autocorrelations
    zero = torch.zeros_like(autocorrelations[:, :1])
    before = torch.cat([zero, autocorrelations[:, :-1]], dim=1).cumsum(1)
    after = torch.cat([autocorrelations[:, 1:], zero], dim=1).flip(1).cumsum(1).flip(1)
    return 2 * (before + after)


def _gradient(
    filters: Tensor, others: Tensor, taps: Taps, out: Tensor | None = None, spectrum: Tensor | None = None
) -> Tensor:
    """2 Σ_m K_i[c][m] · R_i[m − n] from 2 R_i: each filter times the symmetric Toeplitz matrix of its 2 R_i.

    Laid out as the filters are, so that it can be added to a weight's gradient together with others.
    """
    size = filters.shape[2]
    if spectrum is not None:
        return convolve(spectrum, others.unsqueeze(-1), taps, out)
    if size == 1:
        return torch.mul(others.unsqueeze(-1), filters, out=out)
    if _folds_by_matrix(taps, filters.device):
        toeplitz = others @ lag_matrix(filters, taps).mT
    else:
        index = _lag_index(filters, taps).expand(*others.shape[:2], -1)
        toeplitz = others.gather(-1, index)
    toeplitz, flat = toeplitz.reshape(-1, size, size), filters.flatten(0, 1)
    if out is None and not filters.is_contiguous():  # the view of a contiguous weight: its taps come last
        return torch.bmm(flat.mT, toeplitz.mT).mT.view(filters.shape)
    return torch.bmm(toeplitz, flat, out=None if out is None else out.flatten(0, 1)).view(filters.shape)


def _at_lag_zero(autocorrelations: Tensor, impulse: Tensor | None) -> Tensor:
    """A_i at lag 0, which is ‖K_i‖²: `[groups, S / groups, 1]`. impulse: `unit_impulse` for spectra, None for lags."""
    return autocorrelations[..., :1] if impulse is None else autocorrelations @ impulse.unsqueeze(-1)


def _subtract_at_lag_zero_(others: Tensor, along: Tensor, impulse: Tensor | None) -> None:
    if impulse is None:
        others[..., :1].sub_(along)
    else:
        others.addcmul_(along, impulse, value=-1)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩, on accelerators in float64, so that products that leave float32 do not add up to ∞ − ∞ = NaN.

    On the CPU, `Differentiable` looks at the value and, if need be, computes all of it in float64; on an accelerator it
    would have to wait. mps has no float64.
    """
    return (a * (b if a.device.type in ("cpu", "mps") else b.double())).sum()


def _folds_by_matrix(taps: Taps, device: torch.device) -> bool:
    """Return whether to fold taps onto lags by a product with zeros and ones.

    It is fast while that matrix is small. Off the CPU it is the way in any case: index_add is not deterministic there.
    """
    return device.type != "cpu" or prod(taps) <= FEW_TAPS


_SIMILARITY = Differentiable("cs", similarity_and_others, gradient_from_others)


def lag_shape(taps: Taps) -> Taps:
    """Return the number of lags along each axis at which kernels of these taps overlap, 2k − 1."""
    return tuple(2 * k - 1 for k in taps)


@lru_cache(maxsize=64)
def fft_is_cheaper(channels: int, taps: Taps, device: str) -> bool:
    """Return whether FFTs take less time than Gram products.

    The nanoseconds per filter of each were fitted on a CPU core (kernels from 3×3 to 31×31, 1 to 64 channels).
    """
    size, points = prod(taps), prod(fft_shape(taps))
    if device != "cpu":  # the fewest launches, while the matrix that folds the Gram product onto lags is below 4 MB
        return size * size * prod(lag_shape(taps)) > 1 << 20
    return channels * (2.2 * points * log2(points) + 600) < size * size * (5 + 0.07 * channels)


@constant
def _lag_index(like: Tensor, taps: Taps) -> Tensor:
    """For each pair of taps (m, n), row by row, the position of the lag m − n."""
    position = torch.zeros(1, 1, dtype=torch.long, device=like.device)
    for k in taps:
        tap = torch.arange(k, device=like.device)
        lag = (tap[:, None] - tap[None, :]) % (2 * k - 1)
        rows, columns = position.shape[0] * k, position.shape[1] * k
        position = (position[:, None, :, None] * (2 * k - 1) + lag[None, :, None, :]).reshape(rows, columns)
    return position.flatten()


@constant
def lag_matrix(like: Tensor, taps: Taps) -> Tensor:
    """Return `[N², lags]`, 1 where the pair of taps has the lag: it folds a Gram product onto lags."""
    lags = torch.arange(prod(lag_shape(taps)), device=like.device)
    return (_lag_index(like, taps)[:, None] == lags).to(like.dtype)


@constant
def _twos_but_one(like: Tensor, count: int) -> Tensor:
    """`[count, count]`, 2 everywhere but on the diagonal."""
    return 2 - 2 * torch.eye(count, device=like.device, dtype=like.dtype)


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


def convolve(spectrum: Tensor, power: Tensor, taps: Taps, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Return scale · Σ_m K_i[c][m] · R_i[c][m − n], in the layout of filters.

    spectrum: that of K; power: that of R, scaled as `power_spectra`, with C channels or with one for all.
    """
    weights = power * (scale / unit_impulse(power, taps)).unsqueeze(-1)
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
