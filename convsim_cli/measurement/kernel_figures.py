"""What a layer's kernels alone say, in float64: what scaling moves, and what it does not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.feature_maps import finite
from convsim_cli.measurement.figures import Record
from convsim_cli.similarity import similarity

_ROWS = 256  # filters whose cosines with all later ones are computed at once


def describe(kernel: Kernel) -> Record:
    """Return the keys that say which layer a record is of."""
    return {"name": kernel.name, "shape": list(kernel.shape), "groups": kernel.groups, "assumed": kernel.assumed}


def kernel_figures(kernel: Kernel, weight: Tensor, living: Tensor | None = None) -> Record:
    """Return `cs` and `norm` of all filters, and `ncs` of the living ones.

    weight: as stored. living: which filters count in `ncs`, `[groups, S / groups]`; by their norms for None. `ncs` is
    None where no group has two living filters. Raises InputError for NaN or Inf.
    """
    check_finite(kernel, weight)
    filters = _wide_filters(kernel, weight)  # the one copy that is held, divided in place
    living = (living_filters(filters) if living is None else living).to(filters.device)
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    pairs = _pairs(living)
    with full_precision(filters.device):
        value = similarity(filters, kernel.taps).item()
        ncs = 1.0 if pairs else None
        if pairs and not kernel.pointwise:
            ncs = similarity(_directions_(filters, norms, living), kernel.taps).item() / pairs
    return {"cs": finite(value), "ncs": ncs, "norm": finite(torch.linalg.vector_norm(norms).item())}


def kernel_cosine(kernel: Kernel, weight: Tensor, living: Tensor | None = None) -> float | None:
    """Return the mean |cos| over pairs of living filters, None without a pair. Arguments as in `kernel_figures`."""
    filters = _wide_filters(kernel, weight)
    living = (living_filters(filters) if living is None else living).to(filters.device)
    pairs = _pairs(living)
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    unit = _directions_(filters, norms, living).flatten(2)
    total = torch.zeros((), dtype=unit.dtype, device=unit.device)
    with full_precision(unit.device):
        for start in range(0, unit.shape[1], _ROWS):
            cosines = (unit[:, start : start + _ROWS] @ unit[:, start:].mT).triu_(1)
            total += torch.linalg.vector_norm(cosines, 1)
    return total.item() / pairs if pairs else None


def check_finite(kernel: Kernel, weight: Tensor, where: Path | None = None) -> None:
    """Raise InputError, naming the tensor and the file it is in, where a kernel holds NaN or Inf."""
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        file = f"{where}: " if where else ""
        raise InputError(
            f"{file}{kernel.name} {list(kernel.shape)}: {bad} of {weight.numel()} values {'is' if bad == 1 else 'are'} "
            "NaN or Inf; fix the checkpoint or `exclude` this layer"
        )


def is_finite(weight: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf, without a copy of it."""
    return not weight.numel() or bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def _wide_filters(kernel: Kernel, weight: Tensor) -> Tensor:
    """A float64 copy of the filters `[groups, S / groups, N, C]`, on the CPU where the device has no float64."""
    stored = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()
    return kernel.to_filters(stored).to(torch.float64, copy=True)


def _directions_(filters: Tensor, norms: Tensor, living: Tensor) -> Tensor:
    """Divide filters by their norms, in place; dead ones become zero."""
    alive = living[..., None, None]
    return filters.div_(torch.where(alive, norms, 1)).mul_(alive)


def _pairs(living: Tensor) -> int:
    counts = living.sum(-1)
    return int((counts * (counts - 1)).sum()) // 2
