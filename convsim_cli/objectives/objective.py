"""What an objective is, and how its gradient is kept tangent to each filter's sphere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convsim_cli.similarity import Taps

Value = Callable[[Tensor, Taps], Tensor]
Gradient = Callable[[Tensor, Taps, Tensor | None], Tensor]
Tangent = Callable[[Tensor, Taps, Tensor | None, Tensor | None], Tensor]


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
    vanishes_with_filters: whether the gradient of a filter that vanishes does too. Where it does not, set dead filters
    to zero first: a filter of zeros takes no part in any objective's pairs, and its gradient is zero.
    """

    name: str
    meaning: str
    value: Value
    gradient: Gradient
    norm_only_pointwise: bool
    tangent: Tangent | None = None
    vanishes_with_filters: bool = True

    def tangent_gradient(self, filters: Tensor, taps: Taps, norms: Tensor | None, out: Tensor | None) -> Tensor:
        """Return the gradient, written to `out` if given, projected onto the tangent space of each filter's sphere.

        norms: the L2 norms `[groups, S / groups, 1, 1]` to scale the filters to first, in place; None leaves them.
        """
        if self.tangent:
            return self.tangent(filters, taps, norms, out)
        if norms is None:
            norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
        else:
            rescale_(filters, norms)
        gradient = self.gradient(filters, taps, out)
        project_(gradient, filters, norms)
        return gradient


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
