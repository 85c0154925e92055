"""The figures of a layer: those of its kernels alone, in float64, and with them those of its feature maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, living_filters, refuse_meta
from convsim_cli.measurement.feature_maps import LayerMaps, finite, mean_correlation
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.pairs import THRESHOLD, clusters, effective_rank, opposite, redundant
from convsim_cli.precision import full_precision
from convsim_cli.similarity import similarity_of_filters

_COSINES = 1 << 21  # that are computed at once


def measure_layer(kernel: Kernel, weight: Tensor, maps: LayerMaps, threshold: float = THRESHOLD) -> Record:
    """Return the record of a layer: its description, and every figure of `FIGURES`, None if undefined.

    weight: as stored. threshold: correlation above which two filters are duplicates. A layer with too many filters for
    every pair has `sampled`, the number of filters that are compared. Raises InputError for NaN or Inf in either.
    """
    alive, correlation, chance, paper = maps.alive, maps.correlation(), maps.chance, maps.paper
    of_maps: Record = dict.fromkeys(("fm_corr", "fm_rank", "redundant", "opposite", "removable", "clusters"))
    if correlation is not None:
        of_maps |= {"fm_corr": mean_correlation(correlation), "fm_rank": effective_rank(correlation)}
    elif maps.moments.count > 1 and maps.compared.any():
        raise InputError(
            f"{kernel.name}: its feature maps on these inputs contain NaN or Inf; check the inputs, and the layers "
            "before it"
        )
    if correlation is not None and maps.sample is None:  # single filters are told of only where all are compared
        duplicates = clusters(correlation, threshold)
        of_maps["redundant"], of_maps["opposite"] = redundant(correlation, threshold), opposite(correlation, threshold)
        of_maps["removable"], of_maps["clusters"] = sum(len(cluster) - 1 for cluster in duplicates), duplicates
    del correlation  # before those of the random kernels are made: of 4,096 filters they take 67 MB
    by_chance = (None, None) if chance is None else chance.figures(maps.compared.sum(-1).tolist())
    alone = measure_weight(kernel, weight, maps.living)
    return {
        **describe(kernel),
        "filters": kernel.filters,
        **({} if maps.sample is None else {"sampled": len(maps.sample)}),
        "cs": alone["cs"],
        "ncs": alone["ncs"],
        "kernel_cos": kernel_cosine(kernel, weight, maps.living),
        "fm_corr": of_maps["fm_corr"],
        "fm_corr_random": by_chance[0],
        "fm_rank": of_maps["fm_rank"],
        "fm_rank_random": by_chance[1],
        "redundant": of_maps["redundant"],
        "opposite": of_maps["opposite"],
        "removable": of_maps["removable"],
        "clusters": of_maps["clusters"],
        "fm_cos": paper and paper.fm_cos,
        "fm_inner2": paper and paper.fm_inner2,
        "norm": alone["norm"],
        "dead": int((~alive).sum()),
        "turned": None,
    }


def compare_weights(layers: Sequence[tuple[Kernel, Tensor, Tensor]]) -> list[Record]:
    """Return the record of each changed layer: which it is, and `measure_weight` before and after.

    layers: each with its weight as stored, before and after. The filters that live before count in both. Waits for the
    device once, for all layers together. Raises InputError for NaN or Inf.
    """
    moments = []
    for kernel, before, after in layers:
        living = living_filters(kernel.to_filters(before))
        moments += [(kernel, before, living), (kernel, after, living)]
    figures = iter(_measure_weights(moments))
    return [{**describe(kernel), "before": next(figures), "after": next(figures)} for kernel, _, _ in layers]


def describe(kernel: Kernel) -> Record:
    """Return the keys that identify a record's layer."""
    return {"name": kernel.name, "shape": list(kernel.shape), "groups": kernel.groups, "assumed": kernel.assumed}


def measure_weight(kernel: Kernel, weight: Tensor, living: Tensor | None = None) -> Record:
    """Return `cs` and `norm` of all filters, and `ncs` of the living ones.

    weight: as stored. living: which filters count in `ncs`, `[groups, S / groups]`; by their norms for None. `ncs` is
    None if no group has two living filters, or a norm leaves the range of float64. Raises InputError for NaN or Inf.
    """
    return _measure_weights([(kernel, weight, living)])[0]


def _measure_weights(weights: Sequence[tuple[Kernel, Tensor, Tensor | None]]) -> list[Record]:
    """Return what `measure_weight` returns of each. Waits for the device once, for all together."""
    figures = [_figures(*each) for each in weights]
    rows = torch.stack([each.to(figures[0].device) for each in figures]).tolist() if figures else []
    records = []
    for (kernel, weight, _), (pairs, value, normalized, norm) in zip(weights, rows, strict=True):
        if not math.isfinite(norm):
            check_finite([(kernel, weight)])
        ncs = None if not pairs or not math.isfinite(norm) else 1.0 if kernel.pointwise else normalized / pairs
        records.append({"cs": finite(value), "ncs": ncs, "norm": finite(norm)})
    return records


def _figures(kernel: Kernel, weight: Tensor, living: Tensor | None) -> Tensor:
    """Pairs of living filters, L_CS, L_CS of the living filters at norm 1, and the norm of all: `[4]` in float64."""
    refuse_meta(kernel.name, weight)
    filters = _wide_filters(kernel, weight)  # the one copy that is held, divided in place
    living = (living_filters(filters) if living is None else living).to(filters.device)
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    with full_precision(filters.device):
        value = normalized = similarity_of_filters(filters, kernel.taps)
        if not kernel.pointwise:
            normalized = similarity_of_filters(_directions_(filters, norms, living), kernel.taps)
    return torch.stack([_pairs(living).double(), value, normalized, torch.linalg.vector_norm(norms)])


def kernel_cosine(kernel: Kernel, weight: Tensor, living: Tensor | None = None) -> float | None:
    """Return the mean |cos| over pairs of living filters, None without a pair. Arguments as in `measure_weight`."""
    filters = _wide_filters(kernel, weight)
    living = (living_filters(filters) if living is None else living).to(filters.device)
    pairs = int(_pairs(living))
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    if not norms.isfinite().all():
        return None
    unit = _directions_(filters, norms, living).flatten(2)
    total = torch.zeros((), dtype=unit.dtype, device=unit.device)
    with full_precision(unit.device):
        rows = max(1, _COSINES // (unit.shape[0] * unit.shape[1]))
        for start in range(0, unit.shape[1], rows):
            cosines = (unit[:, start : start + rows] @ unit[:, start:].mT).triu_(1)
            total += torch.linalg.vector_norm(cosines, 1)
    return total.item() / pairs if pairs else None


def sum_cs(records: Iterable[Record]) -> float | None:
    """Return L_CS summed over layers; None where one has none, or the sum leaves the range of float64."""
    values = [record["cs"] for record in records]
    return None if None in values else finite(math.fsum(values) if values else 0.0)


def check_finite(layers: Sequence[tuple[Kernel, Tensor]], where: str | None = None) -> None:
    """Raise InputError, naming the tensor and the file it is in, where a kernel holds NaN or Inf, or no values.

    Waits for the device once, for all layers together.
    """
    for kernel, weight in layers:
        refuse_meta(kernel.name, weight)
    if are_finite([weight for _, weight in layers]):
        return
    for kernel, weight in layers:
        if bad := int((~torch.isfinite(weight)).sum()):
            file = f"{where}: " if where else ""
            raise InputError(
                f"{file}{kernel.name} {list(kernel.shape)}: {bad} of {weight.numel()} values "
                f"{'is' if bad == 1 else 'are'} NaN or Inf; fix the checkpoint or `exclude` this layer"
            )


def check_range(kernel: Kernel, weight: Tensor) -> None:
    """Raise InputError if a new weight does not fit the type in which it is stored."""
    if not are_finite([weight]):
        kind = str(weight.dtype).removeprefix("torch.")
        raise InputError(f"{kernel.name}: the new kernels exceed the range of {kind}; scale this layer down first")


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors hold neither NaN nor Inf, without a copy of them, waiting for the device once."""
    found = [torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in tensors if tensor.numel()]
    return not found or bool(torch.stack([each.to(found[0].device) for each in found]).all())


def _wide_filters(kernel: Kernel, weight: Tensor) -> Tensor:
    """A float64 copy of the filters `[groups, S / groups, N, C]`, on the CPU where the device has no float64."""
    stored = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()
    return kernel.to_filters(stored).to(torch.float64, copy=True)


def _directions_(filters: Tensor, norms: Tensor, living: Tensor) -> Tensor:
    """Divide filters by their norms, in place; dead ones become zero."""
    alive = living[..., None, None]
    return filters.div_(torch.where(alive, norms, 1)).mul_(alive)


def _pairs(living: Tensor) -> Tensor:
    counts = living.sum(-1)
    return (counts * (counts - 1)).sum() // 2
