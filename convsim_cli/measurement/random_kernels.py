"""Chance: how similar the maps of random kernels are, on the inputs that a layer sees.

√(2 / (π·positions)) is the chance value of |cos| for white inputs only: neighboring positions of other inputs say much
the same, so that few of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

import torch
from torch import Tensor

from convsim_cli.kernels import Kernel
from convsim_cli.measurement.feature_maps import MOST_PAIRS, FeatureMapSimilarity
from convsim_cli.measurement.mean_cosines import effective_rank

FEWEST_PER_GROUP = 64  # random filters
FEWEST = 128  # random filters of a layer: with 3 channels, fm_cos on natural inputs is then known to 3 % (4 % with 64)
_MOST = 1024  # random filters per group of a layer whose pairs are too many to keep
_STREAM = 0x9E3779B9  # keeps the kernels from being the values that the same seed gives for inputs


class RandomKernels:
    """The similarity of the maps of random Gaussian kernels of a layer's shape.

    A layer with few filters is drawn several times, until it has had `FEWEST` and each group `FEWEST_PER_GROUP`.
    """

    def __init__(self, kernel: Kernel, seed: int = 0, keep_pairs: bool = True) -> None:
        each = kernel.filters // kernel.groups
        self._kernel, self._seed = kernel, seed
        self._draws = max(ceil(FEWEST_PER_GROUP / each), ceil(FEWEST / kernel.filters))
        self._each = each if kernel.groups * each**2 <= MOST_PAIRS else min(each, _MOST)
        self._similarity = FeatureMapSimilarity(kernel.groups, keep_pairs=keep_pairs and self._each == each)

    @property
    def filters(self) -> int:
        """Number of random filters, over all groups and draws."""
        return self._draws * self._kernel.filters

    def update(self, convolve: Callable[[Tensor], Tensor], like: Tensor) -> None:
        """Add the maps `[inputs, S, *space]` that `convolve` gives for a weight, once for each draw.

        like: a tensor of the weight's type, on its device.
        """
        maps = [convolve(weight).unflatten(1, (self._kernel.groups, -1)) for weight in self._weights(like)]
        kept = [part[:, :, : self._each] for part in maps]
        self._similarity.update(torch.cat(kept, dim=2).flatten(1, 2))

    @property
    def fm_cos(self) -> float | None:
        """Mean |cos| over inputs and pairs, those between draws included."""
        return self._similarity.fm_cos

    def fm_rank(self) -> float | None:
        """Return the effective rank of the maps of one draw, the mean over draws; None where pairs are not kept."""
        mean = self._similarity.mean_cosines()
        if mean is None:
            return None
        draws = mean.unflatten(2, (self._draws, -1)).unflatten(1, (self._draws, -1)).diagonal(dim1=1, dim2=3)
        return effective_rank(draws.movedim(-1, 1).flatten(0, 1))

    def _weights(self, like: Tensor) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed ^ _STREAM)
        for _ in range(self._draws):
            yield torch.randn(self._kernel.shape, generator=generator).to(like)
