"""Every objective that convsim can minimize, by name.

To add one, add one entry: Algorithm 1, the penalty, training and the command line all read this table.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.machine.differentiation import Differentiable
from convsim_cli.objectives import orthogonality, paper
from convsim_cli.objectives.objective import Gradient, Objective
from convsim_cli.similarity import Taps, similarity, similarity_gradient, tangent_gradient

Shared = Callable[[Tensor, Taps], tuple[Tensor, Tensor]]  # a value, and what its gradient shares with it
SharedGradient = Callable[..., Tensor]  # (filters, what is shared, taps, out=None)


def find_objective(name: str) -> Objective:
    """Return the objective of that name. Raises InputError with the closest name for an unknown one."""
    if name not in OBJECTIVES:
        raise InputError(f"unknown `objective` {name!r}; {did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def _objective(
    name: str,
    meaning: str,
    value: Shared,
    gradient: SharedGradient,
    alone: Gradient | None = None,
    vanishes_with_filters: bool = True,
) -> Objective:
    """alone: the gradient without a value, where that has a shorter way."""
    differentiable = Differentiable(name, value, gradient)

    def without_graph(filters: Tensor, taps: Taps, out: Tensor | None) -> Tensor:
        return gradient(filters, value(filters, taps)[1], taps, out)

    return Objective(
        name,
        meaning,
        differentiable,
        alone or without_graph,
        norm_only_pointwise=False,
        vanishes_with_filters=vanishes_with_filters,
    )


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
        _objective(
            "neighbours",
            "the authors' public code: each filter and the next, channel by channel",
            paper.neighbours,
            paper.neighbours_gradient,
            paper.neighbours_gradient_alone,
        ),
        _objective(
            "kernel",
            "kernel orthogonality (section 3.1 of the paper): squared inner products of all pairs of filters",
            paper.kernel,
            paper.kernel_gradient,
        ),
        _objective(
            "ocnn",
            "orthogonality of the convolution (Wang et al. 2020): all pairs, all lags, and filters of norm 1",
            orthogonality.ocnn,
            orthogonality.ocnn_gradient,
        ),
        _objective(
            "srip",
            "spectral norm of K Kᵀ − I by two power iterations (Bansal et al. 2018)",
            orthogonality.srip,
            orthogonality.srip_gradient,
            vanishes_with_filters=False,
        ),
        _objective(
            "orthoreg",
            "cosines of all pairs of filters, alike ones most (Rodríguez et al. 2017)",
            orthogonality.orthoreg,
            orthogonality.orthoreg_gradient,
            vanishes_with_filters=False,
        ),
    )
}
