"""What a layer's kernels alone say, in float64: what scaling moves, and what it does not.

A layer that was measured: its kernels, and what was seen of its feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity, RandomKernels, finite
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.pairs import THRESHOLD, clusters, effective_rank, opposite, redundant
from convsim_cli.precision import full_precision
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


class LayerMaps:
    """What is seen of a layer's feature maps: their similarity, that of random kernels' maps, and how many calls."""

    def __init__(
        self, kernel: Kernel, weight: Tensor, *, scale: float = 1.0, seed: int = 0, whole: bool = True
    ) -> None:
        """weight: as stored; it says which filters are dead. scale: what the maps are divided by beforehand.

        seed: of the random kernels. whole: measure chance and keep pairs, not `fm_cos` and `fm_inner2` alone.
        """
        self.living = living_filters(kernel.to_filters(weight))
        self.similarity = FeatureMapSimilarity(kernel.groups, scale=scale, living=self.living, keep_pairs=whole)
        self.chance: RandomKernels | None = RandomKernels(kernel, seed) if whole else None
        self.calls = 0


@dataclass
class Layer:
    """What the figures of a layer are computed from, each when it is first asked for.

    weight: as stored; seen: its feature maps; threshold: mean cosine above which two filters are duplicates.
    """

    kernel: Kernel
    weight: Tensor
    seen: LayerMaps
    threshold: float = THRESHOLD

    @property
    def maps(self) -> FeatureMapSimilarity:
        return self.seen.similarity

    @cached_property
    def kernels(self) -> dict[str, Any]:
        return kernel_figures(self.kernel, self.weight, self.seen.living)

    @property
    def kernel_cos(self) -> float | None:
        return kernel_cosine(self.kernel, self.weight, self.seen.living)

    @property
    def dead(self) -> int:
        alive = self.maps.alive
        return int((~(self.seen.living if alive is None else alive)).sum())

    @property
    def fm_cos_random(self) -> float | None:
        return None if self.seen.chance is None else self.seen.chance.fm_cos

    @property
    def fm_rank_random(self) -> float | None:
        return None if self.seen.chance is None else self.seen.chance.fm_rank()

    @cached_property
    def mean_cosines(self) -> Tensor | None:
        return self.maps.mean_cosines()

    @property
    def fm_rank(self) -> float | None:
        return None if self.mean_cosines is None else effective_rank(self.mean_cosines)

    @property
    def redundant(self) -> int | None:
        return None if self.mean_cosines is None else redundant(self.mean_cosines, self.threshold)

    @property
    def opposite(self) -> int | None:
        return None if self.mean_cosines is None else opposite(self.mean_cosines, self.threshold)

    @cached_property
    def clusters(self) -> list[list[int]] | None:
        return None if self.mean_cosines is None else clusters(self.mean_cosines, self.threshold)

    @property
    def removable(self) -> int | None:
        return None if self.clusters is None else sum(len(cluster) - 1 for cluster in self.clusters)
