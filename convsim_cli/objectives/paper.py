"""What the paper compares Eq. 10 with: the sum of the authors' public code, and inner products of kernels.

Every value comes with a tensor that its gradient shares with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_cli.power_spectra import convolve, power_spectra, spectra
from convsim_cli.similarity import Taps, inner_product


def neighbours(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return Σ_i Σ_c ‖K_i[c] ⋆ K_{i+1}[c]‖² = Σ_i Σ_c ⟨A_i[c], A_{i+1}[c]⟩ with A_i[c] = K_i[c] ⋆ K_i[c]; and A."""
    power = power_spectra(spectra(filters, taps), taps)
    return inner_product(power[:, :-1], power[:, 1:]), power


def neighbours_gradient(filters: Tensor, power: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return the gradient: as for Eq. 10, with A_{i−1}[c] + A_{i+1}[c], of each channel by itself, in place of R_i."""
    return convolve(spectra(filters, taps), _beside(power), taps, out)


def neighbours_gradient_alone(filters: Tensor, taps: Taps, out: Tensor | None) -> Tensor:
    """Return the gradient without a value: one spectrum serves both of its uses."""
    spectrum = spectra(filters, taps)
    return convolve(spectrum, _beside(power_spectra(spectrum, taps)), taps, out)


def _beside(power: Tensor) -> Tensor:
    none = torch.zeros_like(power[:, :1])
    return torch.cat([none, power[:, :-1]], dim=1) + torch.cat([power[:, 1:], none], dim=1)


def kernel(filters: Tensor, _: Taps) -> tuple[Tensor, Tensor]:
    """Return Σ_{i<j} ⟨K_i, K_j⟩²; and ⟨K_i, K_j⟩."""
    products = _inner_products(filters)
    return products.square().sum() / 2, products


def kernel_gradient(filters: Tensor, products: Tensor, _: Taps, out: Tensor | None = None) -> Tensor:
    """Return the gradient: 2 Σ_{j≠i} ⟨K_i, K_j⟩ K_j."""
    flat = None if out is None else out.flatten(2)
    return torch.bmm(2 * products, filters.flatten(2), out=flat).view(filters.shape)


def _inner_products(filters: Tensor) -> Tensor:
    """⟨K_i, K_j⟩ for i ≠ j and 0 for i = j: `[groups, S / groups, S / groups]`."""
    flat = filters.flatten(2)
    products = flat @ flat.mT
    return products.masked_fill(torch.eye(products.shape[-1], dtype=torch.bool, device=products.device), 0)
