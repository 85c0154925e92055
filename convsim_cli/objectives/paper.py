"""What the paper compares Eq. 10 with: the sum of the authors' public code, and inner products of kernels.

Every value comes with a tensor that its gradient shares with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_cli.similarity import Taps, channel_autocorrelations, convolve, inner_product


def neighbours(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return Σ_i Σ_c ‖K_i[c] ⋆ K_{i+1}[c]‖² = Σ_i Σ_c ⟨A_i[c], A_{i+1}[c]⟩, A_i[c] = K_i[c] ⋆ K_i[c]; and A."""
    lags = channel_autocorrelations(filters, taps)
    return inner_product(lags[:, :-1], lags[:, 1:]), lags


def neighbours_gradient(filters: Tensor, lags: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return the gradient: as for Eq. 10, with A_{i−1}[c] + A_{i+1}[c], of each channel by itself, in place of R_i."""
    none = torch.zeros_like(lags[:, :1])
    beside = torch.cat([none, lags[:, :-1]], dim=1) + torch.cat([lags[:, 1:], none], dim=1)
    return convolve(filters, beside, taps, out)


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
