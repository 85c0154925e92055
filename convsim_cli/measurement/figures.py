"""The per-layer report: what scaling moves, and what it cannot move.

Keys of a record: `cs` L_CS (Eq. 10); `ncs` L_CS free of scale; `kernel_cos` mean |cos| of filter pairs; `fm_cos` mean
|cos| of feature-map pairs; `fm_cos_random` what it would be by chance; `fm_inner2` the paper's feature-map similarity;
`norm` ‖W‖; `dead` filters that are zero or whose map is zero on every input; `redundant` filters with a partner of mean
|cos| above 0.95.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.feature_maps import finite
from convsim_cli.similarity import similarity

Record = dict[str, Any]
FIGURES = ("cs", "ncs", "kernel_cos", "fm_cos", "fm_inner2", "norm", "dead", "fm_cos_random", "redundant")


def layer_record(kernel: Kernel, weight: Tensor, maps: Mapping[str, Any]) -> Record:
    """Join what a layer is, its kernel figures and those of its feature maps (`FeatureMapSimilarity.result`)."""
    figures = kernel_figures(kernel, weight)
    found = {**figures, **maps, "dead": max(figures["zero"], maps["dead"] or 0)}
    return describe(kernel) | {key: found[key] for key in FIGURES}


def describe(kernel: Kernel) -> Record:
    """Return the keys that say which layer a record is of."""
    return {"name": kernel.name, "shape": list(kernel.shape), "groups": kernel.groups, "assumed": kernel.assumed}


def kernel_figures(kernel: Kernel, weight: Tensor) -> Record:
    """Return `cs`, `ncs`, `kernel_cos`, `norm` and the number of `zero` filters of a stored weight, in float64.

    `ncs` and `kernel_cos` are None where fewer than two filters of a group are non-zero. Raises InputError for NaN or
    Inf.
    """
    check_finite(kernel, weight)
    stored = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()  # mps has no float64
    filters = kernel.to_filters(stored).to(torch.float64, copy=True)  # the one copy that is held, divided in place
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    live = (norms > 0).sum(dim=1).flatten()
    pairs = (live * (live - 1)).sum().item() / 2
    with full_precision(stored.device):
        value = similarity(filters, kernel.taps).item()
        unit = filters.div_(torch.where(norms > 0, norms, 1)).flatten(2)
        ncs = 1.0 if kernel.pointwise or not pairs else similarity(filters, kernel.taps).item() / pairs
        cosines = unit @ unit.mT
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    return {
        "cs": finite(value),
        "ncs": ncs if pairs else None,
        "kernel_cos": cosines.abs_().sum().item() / 2 / pairs if pairs else None,
        "norm": finite(torch.linalg.vector_norm(norms).item()),
        "zero": norms.numel() - int(live.sum().item()),
    }


def check_finite(kernel: Kernel, weight: Tensor, where: Path | None = None) -> None:
    """Raise InputError, naming the tensor (and the file it is in), where a kernel holds NaN or Inf."""
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        file = f"{where}: " if where else ""
        raise InputError(
            f"{file}{kernel.name} {list(kernel.shape)}: {bad} of {weight.numel()} values are NaN or Inf; "
            "mend it, or leave it out (--exclude)"
        )


def is_finite(weight: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf, without a copy of it."""
    return not weight.numel() or bool(torch.stack(torch.aminmax(weight)).isfinite().all())
