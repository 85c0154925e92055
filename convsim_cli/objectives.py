"""Every objective that convsim can minimize, by name: its value and its gradient.

An objective is a function of the filters of one layer, in the layout of `similarity.to_filters`, and sums over groups.
To add one, add one entry to `OBJECTIVES`: Algorithm 1, the penalty, training and the command line all read that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.machine.differentiation import Differentiable
from convsim_cli.similarity import (
    Taps,
    channel_autocorrelations,
    convolve,
    inner_product,
    similarity,
    similarity_gradient,
    tangent_gradient,
)

Value = Callable[[Tensor, Taps], Tensor]
Gradient = Callable[[Tensor, Taps, Tensor | None], Tensor]
Tangent = Callable[[Tensor, Taps, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """A function of a layer's filters to minimize.

    name: what users type; meaning: one line for help texts, with its source.
    value(filters, taps): filters `[groups, S / groups, N, C]` → a scalar, differentiable; it enters `full_precision`
    by itself.
    gradient(filters, taps, out): ∂value/∂filters without a graph, written to `out` (contiguous, shaped like filters)
    unless it is None; call it inside `full_precision`, which a loop enters once.
    norm_only_pointwise: whether the value of 1×1 kernels depends on the filters' norms alone, so that there is nothing
    to minimize while norms are preserved.
    tangent(filters, taps, norms, out): what `tangent_gradient` does, where the objective has a shorter way.
    """

    name: str
    meaning: str
    value: Value
    gradient: Gradient
    norm_only_pointwise: bool
    tangent: Tangent | None = None

    def tangent_gradient(self, filters: Tensor, taps: Taps, norms: Tensor, out: Tensor) -> None:
        """Scale filters, in place, to their L2 norms `[groups, S / groups, 1, 1]`, and write to `out` their gradient,
        projected onto the tangent space of each filter's sphere.
        """
        if self.tangent:
            self.tangent(filters, taps, norms, out)
        else:
            rescale_(filters, norms)
            self.gradient(filters, taps, out)
            project_(out, filters, norms)


def find_objective(name: str) -> Objective:
    """Return the objective of that name. Raises InputError with the closest name for an unknown one."""
    if name not in OBJECTIVES:
        raise InputError(f"unknown `objective` {name!r}; {did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def project_(gradient: Tensor, filters: Tensor, norms: Tensor) -> None:
    """Project a gradient, in place, onto the tangent space of each filter's sphere: g −= ⟨g, K_i⟩ K_i / ‖K_i‖².

    gradient, filters: `[groups, S / groups, N, C]`; norms: the filters' L2 norms `[groups, S / groups, 1, 1]`.
    """
    inner = gradient.flatten(2).unsqueeze(-2) @ filters.flatten(2).unsqueeze(-1)  # as products: no copy is made
    squares = norms.square()
    along = inner / torch.where(squares > 0, squares, 1)  # the square of a vanished norm is 0
    gradient.addcmul_(along, filters, value=-1)


def rescale_(filters: Tensor, norms: Tensor) -> None:
    """Scale each filter, in place, to its L2 norm in `norms` (shapes as in `project_`); a zero filter stays zero."""
    present = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    filters.mul_(torch.where(present > 0, norms / present, 1))


def _neighbours(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Σ_i Σ_c ‖K_i[c] ⋆ K_{i+1}[c]‖² = Σ_i Σ_c ⟨A_i[c], A_{i+1}[c]⟩, A_i[c] = K_i[c] ⋆ K_i[c]; and A."""
    lags = channel_autocorrelations(filters, taps)
    return inner_product(lags[:, :-1], lags[:, 1:]), lags


def _neighbours_gradient(filters: Tensor, lags: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """As for Eq. 10, with A_{i−1}[c] + A_{i+1}[c], of each channel by itself, in place of R_i."""
    none = torch.zeros_like(lags[:, :1])
    beside = torch.cat([none, lags[:, :-1]], dim=1) + torch.cat([lags[:, 1:], none], dim=1)
    return convolve(filters, beside, taps, out)


def _kernel(filters: Tensor, _: Taps) -> tuple[Tensor, Tensor]:
    """Σ_{i<j} ⟨K_i, K_j⟩²; and ⟨K_i, K_j⟩."""
    products = _inner_products(filters)
    return products.square().sum() / 2, products


def _kernel_gradient(filters: Tensor, products: Tensor, _: Taps, out: Tensor | None = None) -> Tensor:
    flat = None if out is None else out.flatten(2)
    return torch.bmm(2 * products, filters.flatten(2), out=flat).view(filters.shape)


def _inner_products(filters: Tensor) -> Tensor:
    """⟨K_i, K_j⟩ for i ≠ j and 0 for i = j: `[groups, S / groups, S / groups]`."""
    flat = filters.flatten(2)
    products = flat @ flat.mT
    return products.masked_fill(torch.eye(products.shape[-1], dtype=torch.bool, device=products.device), 0)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "cs",
            "Eq. 10 of the paper: all pairs of filters, all pairs of their channels",
            similarity,
            similarity_gradient,
            norm_only_pointwise=True,
            tangent=tangent_gradient,
        ),
        Objective(
            "neighbours",
            "the authors' public code: each filter and the next, channel by channel",
            Differentiable("neighbours", _neighbours, _neighbours_gradient),
            lambda filters, taps, out: _neighbours_gradient(
                filters, channel_autocorrelations(filters, taps), taps, out
            ),
            norm_only_pointwise=False,
        ),
        Objective(
            "kernel",
            "kernel orthogonality (section 3.1 of the paper): squared inner products of all pairs of filters",
            Differentiable("kernel", _kernel, _kernel_gradient),
            lambda filters, taps, out: _kernel_gradient(filters, _inner_products(filters), taps, out),
            norm_only_pointwise=False,
        ),
    )
}
