"""Give the filters of a layer other directions, each at its own norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import describe, is_finite, kernel_figures

Advance = Callable[[int], None]  # takes the number of layers done since the last call

# (filters `[groups, S / groups, N, C]` in float64, which of them live `[groups, S / groups]`) → new directions, of any
# length, as rows `[groups, S / groups, N·C]`; a row of zeros for a filter that has none
Directions = Callable[[Tensor, Tensor], Tensor]


def turned(kernel: Kernel, weight: Tensor, directions: Directions) -> Tensor:
    """Return a weight of other directions, each filter at its own norm, in the stored shape and dtype, on its device.

    weight: as stored, finite, untouched. Dead filters, and those without a new direction, stay bit-identical. Raises
    InputError where the stored dtype cannot hold the result.
    """
    filters = in_float64(kernel.to_filters(weight.detach()))
    living = living_filters(filters)
    rows = directions(filters, living).view_as(filters)
    lengths = norms(rows)
    scale = torch.where(lengths > 0, norms(filters) / lengths, 0)
    changed = living & (lengths > 0)
    rows = torch.where(changed[..., None, None], rows * scale[..., None, None], filters)
    found = kernel.to_stored(rows, weight.dtype).to(weight.device)
    if not is_finite(found):
        kind = str(weight.dtype).removeprefix("torch.")
        raise InputError(f"{kernel.name}: the new kernels leave the range of {kind}; scale this layer down first")
    return found


def record(kernel: Kernel, before: Tensor, after: Tensor) -> Record:
    """Return the record of a layer: which it is, and `cs`, `ncs` and `norm` of its weight before and after."""
    found = [kernel_figures(kernel, weight) for weight in (before, after)]
    first, last = ({key: figures[key] for key in ("cs", "ncs", "norm")} for figures in found)
    return {**describe(kernel), "before": first, "after": last}


def norms(filters: Tensor) -> Tensor:
    """L2 norms of filters `[groups, S / groups, N, C]`: `[groups, S / groups]`."""
    return torch.linalg.vector_norm(filters, dim=(-2, -1))


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device if that has float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
