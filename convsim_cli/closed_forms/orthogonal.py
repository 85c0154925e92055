"""Orthogonal filters: U Vᵀ of the singular value decomposition U Σ Vᵀ of K.

K: the filters of a group as rows, each the taps of all its channels, after each filter's mean per channel is
subtracted, which takes its response to frequency zero (filters of one tap keep it: nothing else would be left).
Singular values below 1e-6 of the largest count as zero. A filter that is constant in every channel stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convsim_cli.closed_forms.directions import Advance, norms, record, turned
from convsim_cli.kernels import Kernel, Patterns, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.kernels.kernel import VANISHED
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import check_finite

SMALLEST_SINGULAR_VALUE = 1e-6  # as a share of the largest
_ROUNDING = 1e-8  # rows of U Vᵀ are at most 1 long; one this short lies outside of the directions that count


def orthogonalize_(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    advance: Advance | None = None,
) -> list[Record]:
    """Make the filters of every convolution of a module orthogonal, in place, and return a record per layer.

    Every filter keeps its norm, and dead ones their bits; the formula is in this module's head. include, exclude: globs
    over names of tensors; advance: called with the number of layers done since the last call. A record holds `name`,
    `shape`, `groups`, `assumed` and, under `before` and `after`, `cs`, `ncs` and `norm`. Warns of parametrized layers,
    which are left out. Raises InputError for a pattern that matches nothing and for a kernel with NaN or Inf; the model
    is then untouched.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> record = orthogonalize_(model)[0]
    >>> record["name"], abs(record["after"]["norm"] - record["before"]["norm"]) < 1e-6
    ('0.weight', True)
    """
    selection = module_kernels(model, Patterns(include, exclude))
    warn_of_unsupported(selection)
    done = []
    for kernel in selection.kernels:
        done.append((kernel, *orthogonalize_kernel(kernel, weight_of(model, kernel).detach())))
        if advance:
            advance(1)
    with torch.no_grad():
        for kernel, weight, _ in done:
            weight_of(model, kernel).copy_(weight)
    return [record for _, _, record in done]


def orthogonalize_weight_(weight: Tensor, groups: int = 1) -> Tensor:
    """Make the filters of a weight `[S, C, *taps]` orthogonal, in place, each at its own norm, and return the weight.

    Use it like torch.nn.init. groups: S filters in that many consecutive groups, each orthogonal by itself. Raises
    ValueError for another shape, type or number of groups, and InputError for NaN or Inf. The formula is in this
    module's head.

    >>> rows = nn.functional.normalize(orthogonalize_weight_(torch.randn(8, 4, 3, 3)).flatten(1))
    >>> torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    True
    """
    kernel = Kernel("weight", tuple(weight.shape), groups)
    with torch.no_grad():
        return weight.copy_(_orthogonal(kernel, weight))


def orthogonalize_kernel(kernel: Kernel, weight: Tensor) -> tuple[Tensor, Record]:
    """Return the orthogonal weight, in the stored shape and dtype, on its device, and the layer's record.

    weight: as stored, untouched. Raises InputError for NaN or Inf.
    """
    found = _orthogonal(kernel, weight)
    return found, record(kernel, weight, found)


def _orthogonal(kernel: Kernel, weight: Tensor) -> Tensor:
    check_finite(kernel, weight)
    return turned(kernel, weight, _directions)


def _directions(filters: Tensor, living: Tensor) -> Tensor:
    centered = filters - filters.mean(2, keepdim=True) if filters.shape[2] > 1 else filters
    varying = living & (norms(centered) > VANISHED * norms(filters))  # what is left of a constant is rounding
    rows = _polar(torch.where(varying[..., None, None], centered, 0).flatten(2))
    present = varying & (torch.linalg.vector_norm(rows, dim=-1) > _ROUNDING)
    return torch.where(present.unsqueeze(-1), rows, 0)


def _polar(rows: Tensor) -> Tensor:
    """Return U Vᵀ, in which singular values that count as zero take no part."""
    if rows.shape[-2] < rows.shape[-1]:
        return _polar(rows.mT).mT  # LAPACK decomposes a tall matrix several times as fast as a wide one
    u, values, vt = torch.linalg.svd(rows, full_matrices=False)
    kept = values > SMALLEST_SINGULAR_VALUE * values[..., :1]
    return (u * kept.unsqueeze(-2)) @ vt
