"""Every objective that convsim can minimize, by name: its value and its gradient.

An objective is a function of the filters of one layer, in the layout of `similarity.to_filters`, and sums over groups.
To add one, add an entry to `OBJECTIVES`, and one of the same name to `methods.METHODS`, which the commands read.
Every value here comes with a tensor that its gradient shares with it, so that a training step computes it once.

Beside Eq. 10 (`similarity`) stand what the paper compares it with, the sum of the authors' public code and inner
products of kernels, and kernel orthogonality as others define it. The filters of a group are the rows of K:

- Expected: the mean of ⟨F_i, F_j⟩² over white inputs of P positions is P² ⟨K_i, K_j⟩² + P · (the pair's part of Eq. 10
  and a term of about 1/(C·N) of it). Over P and summed over pairs: P · Σ_{i<j} ⟨K_i, K_j⟩² + Eq. 10, with P = 100.
- OCNN (Wang et al. 2020): the convolution as a whole is orthogonal, ‖Σ_c K_i[c] ⋆ K_j[c] − δ_ij δ_0‖² over all lags
  and ordered pairs (stride 1, target norm 1). By Fourier transform this is the mean over frequencies ω of
  ‖A Aᴴ − I‖², where A(ω) is S×C: the spectrum of each channel of each filter at ω. The smaller of A Aᴴ and Aᴴ A serves,
  since ‖A Aᴴ − I_S‖² = ‖Aᴴ A − I_C‖² + S − C. ∂/∂K = 4 · the inverse transform of (A Aᴴ − I) A.
- SRIP (Bansal et al. 2018): the spectral norm of M = K Kᵀ − I (of Kᵀ K − I where S > C·N), by the paper's power method:
  twice u = M v, v = M u; then ‖v‖ / ‖u‖. M itself is never formed. v starts from the same fixed numbers everywhere.
- OrthoReg (Rodríguez et al. 2017): Σ_{i≠j} log(1 + exp(10 (cos(K_i, K_j) − 1))), which separates filters that are alike
  and leaves opposite ones alone.

OCNN and SRIP pull filters to norm 1. While norms are held, they are functions of the directions K_i / ‖K_i‖ instead:
of filters of another norm they would ask for what no direction can give.

A filter of zeros has a zero gradient: OCNN counts its norm's distance from 1, which is constant to first order, and in
SRIP and OrthoReg it takes no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from random import Random

import torch
from torch import Tensor

from convsim_cli.errors import InputError, describe_tensor, did_you_mean, kind_of
from convsim_cli.precision import Differentiable, Taps, constant, full_precision
from convsim_cli.similarity import (
    convolve,
    gradient_from_others,
    inner_product,
    lag_shape,
    power_spectra,
    similarity_and_others,
    similarity_gradient,
    similarity_of_filters,
    spectra,
    tangent_gradient,
)

POSITIONS = 100.0  # P of the expected similarity, > 0: larger ones weigh the kernels' inner products more
POWER_ITERATIONS = 2  # of SRIP, each with two products by M
STEEPNESS = 10.0  # λ of OrthoReg

Value = Callable[[Tensor, Taps], Tensor]
Gradient = Callable[[Tensor, Taps, Tensor | None], Tensor]
Tangent = Callable[[Tensor, Taps, Tensor | None, Tensor | None], Tensor]
Shared = Callable[[Tensor, Taps], tuple[Tensor, Tensor]]  # a value, and what its gradient shares with it
SharedGradient = Callable[..., Tensor]  # (filters, what is shared, taps, out=None)


@dataclass(frozen=True)
class Objective:
    """A function of a layer's filters to minimize.

    name: what users type; `methods.METHODS` explains it.
    value(filters, taps): filters `[groups, S / groups, N, C]` → a scalar, differentiable; it enters `full_precision`
    by itself.
    gradient(filters, taps, out): ∂value/∂filters without a graph, written to `out` (contiguous, shaped like filters)
    unless it is None; call it inside `full_precision`, which a loop enters once.
    norm_only_pointwise: whether the value of 1×1 kernels depends on the filters' norms alone, so that there is nothing
    to minimize while norms are preserved.
    tangent(filters, taps, norms, out): what `tangent_gradient` does, where the objective has a shorter way, or is one
    of the filters' directions while their norms are held.
    vanishes_with_filters: whether the gradient of a filter that vanishes does too, also on its sphere. Where it does
    not, set dead filters to zero first: a filter of zeros takes no part in any objective's pairs, and its gradient is
    zero.
    made_of: the user's function (`make_objective`).
    """

    name: str
    value: Value
    gradient: Gradient
    norm_only_pointwise: bool
    tangent: Tangent | None = None
    vanishes_with_filters: bool = True
    made_of: Value | None = None

    def __reduce__(self) -> tuple[Callable[..., Objective], tuple[object]]:
        """Pickle what to make it of, since functions made here have no name to be found by."""
        return (make_objective, (self.made_of,)) if self.made_of else (find_objective, (self.name,))

    def tangent_gradient(self, filters: Tensor, taps: Taps, norms: Tensor | None, out: Tensor | None) -> Tensor:
        """Return the gradient while norms are held, written to `out` if given: tangent to each filter's sphere.

        It is the projected gradient or, for `ocnn` and `srip`, that of the value at K_i / ‖K_i‖. norms: the L2 norms
        `[groups, S / groups, 1, 1]` to scale the filters to first, in place; None leaves them.
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


def find_objective(name: str) -> Objective:
    """Return the objective of that name. Raises InputError with the closest name for an unknown one."""
    if not isinstance(name, str):
        raise InputError(f"`objective` is {kind_of(name)}; expected a name: {', '.join(OBJECTIVES)}")
    if name not in OBJECTIVES:
        raise InputError(f"unknown `objective` {name!r}; {did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def make_objective(function: Value) -> Objective:
    """Return the objective whose value is function(filters, taps), with the gradient that autograd gives it.

    function: takes filters `[groups, S / groups, N, C]` and the kernel's size, and returns a differentiable scalar.
    Raises InputError if it is not callable.
    """
    if not callable(function):
        raise InputError(f"`objective` is {kind_of(function)}; expected a name or a function")

    def gradient(filters: Tensor, taps: Taps, out: Tensor | None) -> Tensor:
        with torch.enable_grad():
            leaf = filters.detach().requires_grad_()
            (found,) = torch.autograd.grad(value(leaf, taps), leaf)
        return found if out is None else out.copy_(found)

    def value(filters: Tensor, taps: Taps) -> Tensor:
        with full_precision(filters.device):
            found = function(filters, taps)
        if not isinstance(found, Tensor) or found.ndim or not found.is_floating_point():
            kind = describe_tensor(found) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"`objective` {name}: returned {kind}; expected a real scalar tensor")
        if filters.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
            raise InputError(f"`objective` {name}: its value does not depend on the filters differentiably")
        return found

    name = getattr(function, "__name__", type(function).__name__)
    return Objective(name, value, gradient, norm_only_pointwise=False, vanishes_with_filters=False, made_of=function)


def project_(gradient: Tensor, filters: Tensor, norms: Tensor) -> None:
    """Project a gradient, in place, onto the tangent space of each filter's sphere: g −= ⟨g, K_i⟩ K_i / ‖K_i‖².

    gradient, filters: `[groups, S / groups, N, C]`; norms: the filters' L2 norms `[groups, S / groups, 1, 1]`.
    """
    inner = gradient.flatten(2).unsqueeze(-2) @ filters.flatten(2).unsqueeze(-1)  # as products: no copy is made
    squares = norms.square()
    along = inner / torch.where(squares > 0, squares, 1)  # the square of a vanished norm is 0
    gradient.addcmul_(along, filters, value=-1)


def rescale_(filters: Tensor, norms: Tensor) -> None:
    """Scale each filter, in place, to its L2 norm in `norms` (shapes as in `project_`); a zero filter stays zero.

    A filter whose norm overflows becomes NaN, and its loss with it: 1 / ∞ would turn it into zeros.
    """
    present = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    scale = torch.where(present > 0, norms / present, 1)
    filters.mul_(scale.masked_fill_(present.isinf(), torch.nan))


def neighbour_similarity(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return Σ_i Σ_c ‖K_i[c] ⋆ K_{i+1}[c]‖² = Σ_i Σ_c ⟨A_i[c], A_{i+1}[c]⟩ with A_i[c] = K_i[c] ⋆ K_i[c]; and A."""
    power = power_spectra(spectra(filters, taps), taps)
    return inner_product(power[:, :-1], power[:, 1:]), power


def neighbours_gradient(filters: Tensor, power: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return the gradient: as for Eq. 10, with A_{i−1}[c] + A_{i+1}[c], of each channel by itself, in place of R_i."""
    return convolve(spectra(filters, taps), _beside(power), taps, out, 2.0)


def neighbours_gradient_alone(filters: Tensor, taps: Taps, out: Tensor | None) -> Tensor:
    """Return the gradient without a value: one spectrum serves both of its uses."""
    spectrum = spectra(filters, taps)
    return convolve(spectrum, _beside(power_spectra(spectrum, taps)), taps, out, 2.0)


def _beside(power: Tensor) -> Tensor:
    none = torch.zeros_like(power[:, :1])
    return torch.cat([none, power[:, :-1]], dim=1) + torch.cat([power[:, 1:], none], dim=1)


def kernel_orthogonality(filters: Tensor, _: Taps) -> tuple[Tensor, Tensor]:
    """Return Σ_{i<j} ⟨K_i, K_j⟩²; and `[groups, S / groups, S / groups]` ⟨K_i, K_j⟩, 0 for i = j."""
    flat = filters.flatten(2)
    products = flat @ flat.mT
    products = products.masked_fill(torch.eye(products.shape[-1], dtype=torch.bool, device=products.device), 0)
    return products.square().sum() / 2, products


def kernel_orthogonality_gradient(filters: Tensor, products: Tensor, _: Taps, out: Tensor | None = None) -> Tensor:
    """Return the gradient: 2 Σ_{j≠i} ⟨K_i, K_j⟩ K_j."""
    flat = None if out is None else out.flatten(2)
    return torch.bmm(2 * products, filters.flatten(2), out=flat).view(filters.shape)


def expected(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return P Σ_{i<j} ⟨K_i, K_j⟩² + L_CS; and along the last axis ⟨K_i, K_j⟩ (0 for i = j) beside 2 R_i."""
    orthogonality, products = kernel_orthogonality(filters, taps)
    similarity, others = similarity_and_others(filters, taps)
    return POSITIONS * orthogonality + similarity, torch.cat([products, others], -1)


def expected_gradient(filters: Tensor, shared: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return the gradient: that of L_CS + 2P Σ_{j≠i} ⟨K_i, K_j⟩ K_j. shared: what `expected` returned."""
    products, others = shared.tensor_split([filters.shape[1]], -1)
    return _plus_products(gradient_from_others(filters, others, taps, out), products, filters, out)


def expected_gradient_alone(filters: Tensor, taps: Taps, out: Tensor | None) -> Tensor:
    """Return the gradient without a value."""
    _, products = kernel_orthogonality(filters, taps)
    return _plus_products(similarity_gradient(filters, taps, out), products, filters, out)


def expected_tangent(filters: Tensor, taps: Taps, norms: Tensor | None, out: Tensor | None) -> Tensor:
    """Return the tangent gradient. The part of Σ_{j≠i} ⟨K_i, K_j⟩ K_j along K_i leaves by a factor for j = i."""
    gradient = tangent_gradient(filters, taps, norms, out)  # which scales the filters
    flat = filters.flatten(2)
    products = flat @ flat.mT
    own = torch.eye(products.shape[-1], dtype=torch.bool, device=products.device)
    squares = products.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(products.dtype).tiny)
    others = products.masked_fill(own, 0)
    along = others.square().sum(-1) / squares
    return _plus_products(gradient, torch.where(own, -along.unsqueeze(-1), others), filters, out)


def _plus_products(gradient: Tensor, products: Tensor, filters: Tensor, out: Tensor | None) -> Tensor:
    """The gradient + 2P · products · K, in `out` where that is given, as the gradient is."""
    flat = None if out is None else out.flatten(2)
    total = torch.baddbmm(gradient.flatten(2), products, filters.flatten(2), alpha=2 * POSITIONS, out=flat)
    return total.view(filters.shape)


def tangent_of_directions(
    gradient: Gradient, filters: Tensor, taps: Taps, norms: Tensor | None, out: Tensor | None
) -> Tensor:
    """Return ∂f(K̂)/∂K with K̂_i = K_i / ‖K_i‖ and f's own gradient g: (g_i − ⟨g_i, K̂_i⟩ K̂_i) / ‖K_i‖.

    norms: as `Objective.tangent_gradient`.
    """
    rows, inverse = _directions(filters)
    directions = rows.view(filters.shape)
    if norms is not None:
        torch.mul(directions, norms, out=filters)
        inverse = torch.where(norms > 0, 1 / norms, 0).squeeze(-1)
    found = gradient(directions, taps, out)
    project_(found, directions, torch.ones_like(inverse).unsqueeze(-1))
    return found.mul_(inverse.unsqueeze(-1))


def ocnn(filters: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return OCNN's value, and A Aᴴ − I or Aᴴ A − I, the smaller, at each frequency, real and imaginary parts last."""
    blocks = _spectra(filters, taps)
    count, channels = blocks.shape[-2:]
    excess = blocks @ blocks.mH if count <= channels else blocks.mH @ blocks
    excess = excess - _identity(excess, excess.shape[-1])
    excess = torch.view_as_real(excess) if excess.is_complex() else excess.unsqueeze(-1)
    value = _mean_over_frequencies(excess.square().sum((-3, -2, -1)), taps)
    return value + filters.shape[0] * max(0, count - channels), excess


def ocnn_gradient(filters: Tensor, excess: Tensor, taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return OCNN's gradient. excess: what `ocnn` returned."""
    blocks = _spectra(filters, taps)
    count, channels = blocks.shape[-2:]
    excess = torch.view_as_complex(excess) if blocks.is_complex() else excess.squeeze(-1)
    return torch.mul(_at_taps(excess @ blocks if count <= channels else blocks @ excess, taps), 4, out=out)


def srip(filters: Tensor, _taps: Taps) -> tuple[Tensor, Tensor]:
    """Return SRIP's value, summed over groups, and the product by M of each step of the power method, as columns."""
    rows = _shorter_side(filters)
    vector, products = _start(rows, filters), []
    for _ in range(2 * POWER_ITERATIONS):
        products.append(_times_excess(rows, vector))
        vector = products[-1] / _lengths(products[-1])
    return torch.linalg.vector_norm(products[-1], dim=-2).sum(), torch.cat(products, -1)


def srip_gradient(filters: Tensor, products: Tensor, _taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return SRIP's gradient, back through every step of the power method. products: what `srip` returned."""
    rows = _shorter_side(filters)
    lengths = _lengths(products)
    units = products / lengths
    vectors = torch.cat([_start(rows, filters), units[..., :-1]], -1)
    adjoints = [units[..., -1:]]  # of the products, last one first
    for step in reversed(range(products.shape[-1] - 1)):
        adjoint = _times_excess(rows, adjoints[-1])
        if len(adjoints) == 1:  # the value is ‖M v‖ / ‖v‖, and v is of length 1
            adjoint = adjoint - lengths[..., -1:] * vectors[..., -1:]
        adjoints.append(adjoint / lengths[..., step : step + 1])
    backward = torch.cat(adjoints[::-1], -1)  # ∂value/∂M = backward · vectorsᵀ
    both, swapped = torch.cat([vectors, backward], -1), torch.cat([backward, vectors], -1)
    gradient = swapped @ (both.mT @ rows)  # (∂M + ∂Mᵀ) K
    if rows.shape[-2] != filters.shape[1]:
        gradient = gradient.mT
    gradient = gradient.reshape(filters.shape)
    return gradient if out is None else out.copy_(gradient)


def orthoreg(filters: Tensor, _taps: Taps) -> tuple[Tensor, Tensor]:
    """Return OrthoReg's value, and the exponents 10 (cos − 1), −∞ where there is no pair."""
    directions, _ = _directions(filters)
    alive = _present(filters)
    pairs = alive & alive.mT & ~torch.eye(filters.shape[1], dtype=torch.bool, device=filters.device)
    exponents = (STEEPNESS * (directions @ directions.mT - 1)).masked_fill(~pairs, -torch.inf)
    return torch.nn.functional.softplus(exponents).sum(), exponents


def orthoreg_gradient(filters: Tensor, exponents: Tensor, _taps: Taps, out: Tensor | None = None) -> Tensor:
    """Return OrthoReg's gradient, 0 for filters of zeros. exponents: what `orthoreg` returned."""
    directions, inverse = _directions(filters)
    pull = (2 * STEEPNESS * exponents.sigmoid()) @ directions
    along = (pull * directions).sum(-1, keepdim=True)
    gradient = (pull - along * directions) * inverse
    return gradient.view(filters.shape) if out is None else out.copy_(gradient.view(filters.shape))


def _spectra(filters: Tensor, taps: Taps) -> Tensor:
    """A(ω): `[groups, frequencies, S / groups, C]`; of a single tap, which is its own spectrum, real."""
    if filters.shape[2] == 1:
        return filters.transpose(1, 2)
    groups, count, _, channels = filters.shape
    axes = tuple(range(2, 2 + len(taps)))
    spectrum = torch.fft.rfftn(filters.reshape(groups, count, *taps, channels), s=lag_shape(taps), dim=axes)
    return spectrum.flatten(2, -2).transpose(1, 2)


def _at_taps(spectra: Tensor, taps: Taps) -> Tensor:
    """Undo `_spectra`, of lags those that are taps: filters `[groups, S / groups, N, C]`."""
    if not spectra.is_complex():
        return spectra.transpose(1, 2)
    lags = lag_shape(taps)
    spectrum = spectra.transpose(1, 2).contiguous()  # the FFT of a view rounds in another way in a stack of layers
    spectrum = spectrum.unflatten(2, (*lags[:-1], lags[-1] // 2 + 1))
    full = torch.fft.irfftn(spectrum, s=lags, dim=tuple(range(2, 2 + len(taps))))
    return full[(..., *(slice(k) for k in taps), slice(None))].flatten(2, -2)


def _mean_over_frequencies(powers: Tensor, taps: Taps) -> Tensor:
    """Sum over groups of the mean over frequencies of `[groups, frequencies]`.

    All of them but frequency 0 of the last axis stand for two.
    """
    lags = lag_shape(taps)
    powers = powers.unflatten(-1, (-1, lags[-1] // 2 + 1))
    return (2 * powers.sum() - powers[..., 0].sum()) / prod(lags)


def _shorter_side(filters: Tensor) -> Tensor:
    """K `[groups, S / groups, C·N]`, or Kᵀ where there are more filters than values in one."""
    rows = filters.flatten(2)
    return rows if rows.shape[-2] <= rows.shape[-1] else rows.mT


def _times_excess(rows: Tensor, vector: Tensor) -> Tensor:
    """M v, as two columns that are alike: a single one is multiplied in another way as soon as layers are stacked."""
    twice = vector.expand(-1, -1, 2)
    return (rows @ (rows.mT @ twice) - twice)[..., :1]


def _lengths(vectors: Tensor) -> Tensor:
    """The length of each column, 1 for zero: in two steps, since the squares of 1e20 leave float32."""
    largest = vectors.detach().abs().amax(-2, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    return torch.where(largest == 0, 1, scale * torch.linalg.vector_norm(vectors / scale, dim=-2, keepdim=True))


def _directions(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Filters as rows of length 1, and 1 / ‖K_i‖ `[groups, S / groups, 1]`; both 0 for filters of zeros."""
    rows = filters.flatten(2)
    wide = None if filters.device.type == "mps" else torch.float64  # the squares of 1e±20 leave float32
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide).to(rows.dtype)
    present = _present(filters)
    inverse = torch.where(present, 1 / torch.where(present, norms, 1), 0)
    return rows * inverse, inverse


def _start(rows: Tensor, filters: Tensor) -> Tensor:
    """What the power method starts from, `[groups, rows, 1]`: fixed numbers, which filters of zeros do not take up."""
    start = _numbers(rows, rows.shape[-2])
    if rows.shape[-2] != filters.shape[1]:
        return start.expand(len(rows), -1, -1)
    present = _present(filters)
    return start[(present.cumsum(1) - 1).clamp_min(0).squeeze(-1)] * present


def _present(filters: Tensor) -> Tensor:
    """Which filters are not all zeros: `[groups, S / groups, 1]`."""
    return (filters != 0).flatten(2).any(-1, keepdim=True)


@constant
def _numbers(like: Tensor, count: int) -> Tensor:
    """The same normally distributed numbers for every layer, device and process: `[count, 1]`."""
    normal = Random(0).gauss
    return torch.tensor([[normal(0, 1)] for _ in range(count)], dtype=like.dtype, device=like.device)


@constant
def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _objective(
    name: str,
    value: Shared,
    gradient: SharedGradient,
    alone: Gradient | None = None,
    tangent: Tangent | None = None,
    vanishes_with_filters: bool = True,
    of_directions: bool = False,
) -> Objective:
    """alone: the gradient without a value, where that has a shorter way. of_directions: while norms are held."""
    differentiable = Differentiable(name, value, gradient)

    def without_graph(filters: Tensor, taps: Taps, out: Tensor | None) -> Tensor:
        return gradient(filters, value(filters, taps)[1], taps, out)

    return Objective(
        name,
        differentiable,
        alone or without_graph,
        norm_only_pointwise=False,
        tangent=partial(tangent_of_directions, without_graph) if of_directions else tangent,
        vanishes_with_filters=vanishes_with_filters,
    )


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "cs",
            similarity_of_filters,
            similarity_gradient,
            norm_only_pointwise=True,
            tangent=tangent_gradient,
        ),
        _objective(
            "neighbours",
            neighbour_similarity,
            neighbours_gradient,
            neighbours_gradient_alone,
        ),
        _objective(
            "kernel",
            kernel_orthogonality,
            kernel_orthogonality_gradient,
        ),
        _objective(
            "expected",
            expected,
            expected_gradient,
            expected_gradient_alone,
            tangent=expected_tangent,
        ),
        _objective(
            "ocnn",
            ocnn,
            ocnn_gradient,
            vanishes_with_filters=False,
            of_directions=True,
        ),
        _objective(
            "srip",
            srip,
            srip_gradient,
            vanishes_with_filters=False,
            of_directions=True,
        ),
        _objective(
            "orthoreg",
            orthoreg,
            orthoreg_gradient,
            vanishes_with_filters=False,
        ),
    )
}
