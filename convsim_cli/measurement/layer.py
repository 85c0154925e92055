"""A layer that was measured: its kernels, and what was seen of its feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity
from convsim_cli.measurement.kernel_figures import kernel_cosine, kernel_figures
from convsim_cli.measurement.mean_cosines import THRESHOLD, clusters, effective_rank, opposite, redundant
from convsim_cli.measurement.random_kernels import RandomKernels


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
