"""Convolutional Similarity: value, gradient and normalized form, exact, in time linear in the channels.

Eq. 10 of the paper: L_CS = Σ_{i<j} Σ_{c1,c2} ‖K_i[c1] ⋆ K_j[c2]‖², over all pairs of filters that see the same input.
Since ‖a ⋆ b‖² = ⟨a ⋆ a, b ⋆ b⟩, with A_i = Σ_c K_i[c] ⋆ K_i[c] (one small array of lags per filter) and
R_i = Σ_{j≠i} A_j within the group:

    L_CS = ½ Σ_i ⟨A_i, R_i⟩                 ∂L_CS/∂K_i[c][n] = 2 Σ_m K_i[c][m] · R_i[m − n]

Cost: two batched matrix products of N·N·C per filter (N taps, C channels) and S·N² of extra memory; or FFTs of the
2k − 1 lags of each axis, where those are cheaper. 1×1 kernels need no case of their own: L_CS = Σ_{i<j} ‖K_i‖²‖K_j‖².
Stride, dilation and padding do not enter. Where Eq. 10 is exact for feature maps: stride 1, full padding (Eq. 3).

Lags are kept in FFT order: entry d of an axis is lag d for d < k and lag d − (2k − 1) above.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2, prod

import torch
from torch import Tensor

from convsim_cli.machine.differentiation import Differentiable
from convsim_cli.machine.differentiation import Taps as Taps
from convsim_cli.machine.modes import constant

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FEW_FILTERS = 128  # up to which everyone else's sum is one product with a matrix
_FEW_TAPS = 25  # up to which taps are folded onto lags by a product with a matrix


def convolutional_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the Convolutional Similarity L_CS of a layer's kernels, differentiable to any order.

    weight: `[S, C, *taps]` with 1 to 3 axes of taps, floating; S filters in `groups` consecutive groups, pairs counted
    within each. Half types are computed in float32. Returns a scalar ≥ 0 (float32, or float64 for a float64 weight),
    inf where L_CS exceeds its type; on CUDA, float32 weights beyond 1e17 may give NaN instead. Raises ValueError for
    another shape, type or number of groups. Source: Eq. 10, by the identity in this module's head.

    >>> convolutional_similarity(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])).item()  # ‖(1, 2) ⋆ (3, 0)‖² = 3² + 6²
    45.0
    """
    return similarity(*to_filters(weight, groups))


def normalized_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Return L_CS free of scale: the mean over pairs of ⟨A_i, A_j⟩ / (‖K_i‖²‖K_j‖²).

    weight, errors: as `convolutional_similarity`. Filters that are zero form no pairs; without any pair the result is
    NaN. Below 1 the filters share the spectrum out, above 1 they crowd the same frequencies; kernels of one tap give
    1.
    """
    filters, taps = to_filters(weight, groups)
    largest = filters.detach().abs().amax(dim=(-2, -1), keepdim=True)  # the result does not depend on it; squares do
    live = largest > 0
    directions = filters / torch.where(live, largest, 1)
    norms = torch.linalg.vector_norm(directions, dim=(-2, -1), keepdim=True)
    count = live.sum(dim=1).flatten()
    return similarity(directions / torch.where(live, norms, 1), taps) / (count * (count - 1) / 2).sum()


def to_filters(weight: Tensor, groups: int = 1) -> tuple[Tensor, Taps]:
    """Lay a weight `[S, C, *taps]` out as filters `[groups, S / groups, N, C]`, contiguous, and return its taps.

    This is the layout that the batched products like (and no copy of a channels_last weight). Half types become
    float32.
    """
    if weight.dtype not in _TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        raise ValueError(f"expected a weight in {known}, got {weight.dtype} {list(weight.shape)}; convert it first")
    if not 3 <= weight.ndim <= 5 or 0 in weight.shape:
        raise ValueError(
            "expected a convolution weight [S, C, taps…] of 3 to 5 axes, none of them empty, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{groups} groups do not divide the {weight.shape[0]} filters of a weight {list(weight.shape)}"
        )
    taps = tuple(weight.shape[2:])
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    filters = weight.movedim(1, -1).reshape(groups, weight.shape[0] // groups, prod(taps), weight.shape[1])
    return filters.contiguous(), taps


def to_weight(filters: Tensor, taps: Taps) -> Tensor:
    """Undo `to_filters`: a view `[S, C, *taps]` of filters `[groups, S / groups, N, C]`."""
    return filters.reshape(-1, *taps, filters.shape[-1]).movedim(-1, 1)


def similarity(filters: Tensor, taps: Taps) -> Tensor:
    """Return L_CS of filters in the layout of `to_filters`, differentiable to any order, in full precision."""
    return _SIMILARITY(filters, taps)


def similarity_gradient(filters: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return ∂L_CS/∂filters, in the layout of `to_filters`. The value itself is not needed for it.

    out: a contiguous tensor like filters to write to, outside of any graph: a loop then takes no memory.
    """
    return _gradient(filters, sum_of_others(autocorrelation(filters, taps)), taps, out)


def tangent_gradient(filters: Tensor, taps: Taps, norms: Tensor, out: Tensor | None = None) -> Tensor:
    """Scale filters, in place, to their L2 norms and return ∂L_CS/∂filters without its parts along the filters.

    norms: `[groups, S / groups, 1, 1]`. A filter whose square underflows stays as it is, with a zero gradient. Since
    ⟨∂L_CS/∂K_i, K_i⟩ = 2⟨A_i, R_i⟩ and K_i convolved with a single lag 0 is K_i itself, the part along K_i leaves by
    one change of R_i at lag 0; since A_i at lag 0 is ‖K_i‖², the scaling needs no other norm. Both cost next to
    nothing.
    """
    autocorrelations = autocorrelation(filters, taps)
    least = torch.finfo(filters.dtype).tiny
    squares = autocorrelations[..., :1]
    scale = torch.where(squares > least, norms.squeeze(-1) * squares.clamp_min(least).rsqrt(), 1)
    filters.mul_(scale.unsqueeze(-1))
    autocorrelations *= scale.square()
    others = sum_of_others(autocorrelations)
    along = (autocorrelations * others).sum(-1, keepdim=True)
    others[..., :1] -= along / autocorrelations[..., :1].clamp_min(least)
    return _gradient(filters, others, taps, out)


def normalized_gradient(filters: Tensor, taps: Taps, vanished: float) -> Tensor:
    """Return ∂/∂filters of L_CS(K̂), K̂_i = K_i / ‖K_i‖: of the normalized similarity, but for the number of pairs.

    vanished: filters whose norm is below this share of the largest do not count, and have a zero gradient. The norms
    enter through the lags alone, A_i / ‖K_i‖² and R_i / ‖K_i‖², so that it costs what the gradient of L_CS does.
    """
    autocorrelations = autocorrelation(filters, taps)
    squares = autocorrelations[..., :1]
    living = squares >= (vanished**2 * squares.amax()).clamp_min(torch.finfo(filters.dtype).tiny)
    inverse = torch.where(living, 1 / torch.where(living, squares, 1), 0)
    autocorrelations = autocorrelations * inverse
    others = sum_of_others(autocorrelations)
    others[..., :1] -= (autocorrelations * others).sum(-1, keepdim=True)  # the part along K_i, as in `tangent_gradient`
    return _gradient(filters, others * inverse, taps)


def autocorrelation(filters: Tensor, taps: Taps) -> Tensor:
    """Return A_i = Σ_c K_i[c] ⋆ K_i[c] for each filter: `[groups, S / groups, lags]`."""
    groups, count, size, _ = filters.shape
    if _fft_is_cheaper(filters.shape[-1], taps, filters.device.type):
        return _to_lags(_power(filters, taps).sum(-1, keepdim=True), taps).squeeze(-1)
    gram = (filters @ filters.mT).reshape(groups, count, size * size)
    if _folds_by_matrix(taps, filters.device):
        return gram @ _lag_matrix(filters, taps)
    return gram.new_zeros(groups, count, prod(_lag_shape(taps))).index_add(-1, _lag_index(filters, taps), gram)


def channel_autocorrelations(filters: Tensor, taps: Taps) -> Tensor:
    """Return K_i[c] ⋆ K_i[c] for each channel of each filter: `[groups, S / groups, lags, C]`."""
    return _to_lags(_power(filters, taps), taps)


def sum_of_others(autocorrelations: Tensor) -> Tensor:
    """Return R_i = Σ_{j≠i} A_j within each group, of the same shape.

    Total − A_i would cancel where one filter dominates. A few filters are summed by a matrix that has zeros on its
    diagonal, which is one product; many as exclusive prefix plus exclusive suffix, which is linear in their number.
    """
    count = autocorrelations.shape[1]
    if count <= _FEW_FILTERS:
        return _all_but_one(autocorrelations, count) @ autocorrelations
    zero = torch.zeros_like(autocorrelations[:, :1])
    before = torch.cat([zero, autocorrelations[:, :-1]], dim=1).cumsum(1)
    after = torch.cat([autocorrelations[:, 1:], zero], dim=1).flip(1).cumsum(1).flip(1)
    return before + after


def _gradient(filters: Tensor, others: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """2 Σ_m K_i[c][m] · R_i[m − n]: each filter times the symmetric Toeplitz matrix of its R_i."""
    size = filters.shape[2]
    if size == 1:
        return torch.mul(2 * others.unsqueeze(-1), filters, out=out)
    if _fft_is_cheaper(filters.shape[-1], taps, filters.device.type):
        return convolve(filters, others.unsqueeze(-1), taps, out)
    if _folds_by_matrix(taps, filters.device):
        toeplitz = others @ _lag_matrix(filters, taps, 2.0).mT
    else:
        toeplitz = (2 * others).index_select(-1, _lag_index(filters, taps))
    flat = None if out is None else out.flatten(0, 1)
    return torch.bmm(toeplitz.reshape(-1, size, size), filters.flatten(0, 1), out=flat).view(filters.shape)


def convolve(filters: Tensor, lags: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return 2 Σ_m K_i[c][m] · R_i[c][m − n] by FFT, in the layout of filters.

    lags: R, symmetric, `[groups, S / groups, lags, C]`, or with one channel for all.
    """
    axes, lag_shape = _tap_axes(taps), _lag_shape(taps)
    weights = torch.fft.rfftn(lags.reshape(*lags.shape[:2], *lag_shape, lags.shape[-1]), dim=axes).real
    full = torch.fft.irfftn(2 * weights * _spectrum(filters, taps), s=lag_shape, dim=axes)
    inner = full[(..., *(slice(k) for k in taps), slice(None))].reshape(filters.shape)
    return inner if out is None else out.copy_(inner)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a, b⟩, on accelerators in float64, so that products that leave float32 do not add up to ∞ − ∞ = NaN.

    On the CPU, `Differentiable` looks at the value and, if need be, computes all of it in float64; on an accelerator it
    would have to wait. mps has no float64.
    """
    return (a * (b if a.device.type in ("cpu", "mps") else b.double())).sum()


def _folds_by_matrix(taps: Taps, device: torch.device) -> bool:
    """Say whether pairs of taps meet their lags by a product with zeros and ones.

    It is fast while that matrix is small. Off the CPU it is the way in any case: index_add is not deterministic there.
    """
    return device.type != "cpu" or prod(taps) <= _FEW_TAPS


def _value(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """½ Σ_i ⟨A_i, R_i⟩, and R_i, which the gradient needs as well."""
    autocorrelations = autocorrelation(filters, taps)
    others = sum_of_others(autocorrelations)
    return inner_product(autocorrelations, others) / 2, others


_SIMILARITY = Differentiable("cs", _value, _gradient)


def _lag_shape(taps: Taps) -> Taps:
    return tuple(2 * k - 1 for k in taps)


def _tap_axes(taps: Taps) -> Taps:
    return tuple(range(2, 2 + len(taps)))


def _spectrum(filters: Tensor, taps: Taps) -> Tensor:
    groups, count, _, channels = filters.shape
    return torch.fft.rfftn(filters.reshape(groups, count, *taps, channels), s=_lag_shape(taps), dim=_tap_axes(taps))


def _power(filters: Tensor, taps: Taps) -> Tensor:
    """The power spectrum of each channel of each filter."""
    spectrum = _spectrum(filters, taps)
    return spectrum.real.square() + spectrum.imag.square()


def _to_lags(power: Tensor, taps: Taps) -> Tensor:
    """Autocorrelations `[groups, S / groups, lags, C]` from power spectra."""
    lags = torch.fft.irfftn(power, s=_lag_shape(taps), dim=_tap_axes(taps))
    return lags.flatten(2, -2)


@lru_cache(maxsize=64)
def _fft_is_cheaper(channels: int, taps: Taps, device: str) -> bool:
    """Nanoseconds per filter of either route, fitted on two CPU cores (kernels from 3×3 to 31×31, 3 to 64 channels)."""
    size, lags = prod(taps), prod(_lag_shape(taps))
    if device != "cpu" and size * size * lags > 1 << 20:  # the matrix that folds the Gram product onto lags
        return True
    return 1.8 * channels * lags * log2(2 * lags) < size * size * (4 + 0.023 * channels)


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
def _lag_matrix(like: Tensor, taps: Taps, value: float = 1.0) -> Tensor:
    """`[N², lags]`, `value` where the pair of taps has the lag: folds a Gram product onto lags."""
    lags = torch.arange(prod(_lag_shape(taps)), device=like.device)
    return value * (_lag_index(like, taps)[:, None] == lags).to(like.dtype)


@constant
def _all_but_one(like: Tensor, count: int) -> Tensor:
    """`[count, count]`, one everywhere but on the diagonal."""
    return 1 - torch.eye(count, device=like.device, dtype=like.dtype)
