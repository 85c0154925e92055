"""How similar a layer's feature maps are, accumulated over inputs, and how similar those of random kernels are: chance.

√(2 / (π·positions)) is the chance value of |cos| for white inputs only: neighboring positions of other inputs are
alike, so that few of them count. Chance is therefore measured, with random kernels on the inputs that the layer sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from math import ceil

import torch
from torch import Tensor

from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.measurement.pairs import effective_rank
from convsim_cli.precision import full_precision

MOST_PAIRS = 1 << 24  # ordered pairs of filters in a layer up to which a mean cosine is kept for each: 4,096² × 4 bytes
_ROWS = 256  # filters whose cosines with all later ones are computed at once: half of all pairs, in bounded memory
_GRAM_ELEMENTS = 1 << 22  # cosines at once
_MAP_ELEMENTS = 1 << 23  # values of feature maps at once
FEWEST_PER_GROUP = 64  # random filters
FEWEST = 128  # random filters of a layer: with 3 channels, fm_cos on natural inputs is then known to 3 % (4 % with 64)
_MOST = 1024  # random filters per group of a layer whose pairs are too many to keep
_STREAM = 0x9E3779B9  # keeps the kernels from being the values that the same seed gives for inputs


class LayerMaps:
    """A layer's feature maps: their similarity, that of random kernels' maps, and how many calls there were."""

    def __init__(
        self, kernel: Kernel, weight: Tensor, *, scale: float = 1.0, seed: int = 0, whole: bool = True
    ) -> None:
        """weight: as stored; it says which filters are dead. scale: what the maps are divided by beforehand.

        seed: of the random kernels. whole: measure chance and keep pairs, not `fm_cos` and `fm_inner2` alone.
        """
        self.living = living_filters(kernel.to_filters(weight))
        self.similarity = FeatureMapSimilarity(kernel.groups, scale=scale, living=self.living, keep_pairs=whole)
        self.chance = RandomKernels(kernel, seed) if whole else None
        self.calls = 0


def inputs_at_once(filters: int, groups: int, positions: int) -> int:
    """Return how many inputs to take at once, so that memory stays bounded whatever the layer."""
    each = filters // groups
    return max(1, min(_GRAM_ELEMENTS // (filters * min(each, _ROWS)), _MAP_ELEMENTS // (filters * positions)))


class FeatureMapSimilarity:
    """Running similarity of a layer's feature maps over inputs.

    Pairs are i < j within a group. Dead filters, and maps that are zero on an input, have no direction and take part in
    no cosine. A layer that is called several times counts every call; calls with a single position add no cosines.
    alive: which filters are not dead and have a map that is not zero on every input; None without inputs.
    """

    def __init__(
        self, groups: int = 1, *, scale: float = 1.0, living: Tensor | None = None, keep_pairs: bool = True
    ) -> None:
        """Start with no inputs.

        scale: what the maps were divided by before they are given to `update`. living: which filters take part in
        cosines `[groups, S / groups]`, all for None. keep_pairs: keep a mean cosine for each pair, up to `MOST_PAIRS`.
        """
        self._groups, self._scale = groups, scale
        self._living = None if living is None or bool(living.all()) else living
        self._keep_pairs = keep_pairs
        self._inputs = 0  # times the number of pairs
        self._products: Tensor | float = 0.0  # sum of ⟨F_i, F_j⟩²
        self._angles: Tensor | float = 0.0  # how many cosines were added up
        self._cosines: Tensor | float = 0.0  # sum of |cos|
        self._sums: Tensor | None = None  # signed, above the diagonal: [groups, S / groups, S / groups]
        self._counts: Tensor | float = 0.0  # how many cosines each of these sums has, but for those of `_recent`
        self._recent: list[Tensor] = []  # which maps were not zero
        self.alive: Tensor | None = None

    def update(self, maps: Tensor) -> None:
        """Add maps `[inputs, S, *space]`, the convolution's output without its bias. Waits for no device."""
        filters = maps.shape[1]
        maps = maps.detach().float().unflatten(1, (self._groups, -1)).flatten(3)
        for part in maps.split(inputs_at_once(filters, self._groups, maps.shape[-1])):
            with full_precision(part.device):
                self._add(part)

    @property
    def fm_cos(self) -> float | None:
        """Mean over inputs and pairs of |cos(F_i, F_j)|; None at a single position or without a pair of maps."""
        angles = float(self._angles)
        return finite(float(self._cosines) / angles) if angles else None

    @property
    def fm_inner2(self) -> float | None:
        """Mean over inputs and pairs of ⟨F_i, F_j⟩²; None without a pair, or beyond the range of float64."""
        return finite(float(self._products) / self._inputs * self._scale**2 * self._scale**2) if self._inputs else None

    def mean_cosines(self) -> Tensor | None:
        """Return the mean over inputs of cos(F_i, F_j), signed: `[groups, S / groups, S / groups]`.

        The diagonal is 1, and 0 for filters that are not `alive`; two maps that were never both non-zero have 0. None
        at a single position, without inputs, or where pairs are not kept.
        """
        if self._sums is None or self.alive is None:
            return None
        upper = self._sums / self._pair_counts().clamp_min(1)
        mean = upper + upper.mT
        mean.diagonal(dim1=-2, dim2=-1).copy_(self.alive)
        return mean

    def _add(self, maps: Tensor) -> None:
        inputs, groups, count, positions = maps.shape
        unit, length, live = _directions(maps)
        if self._living is not None:
            live = live & self._living
        alive = live.any(0)
        self.alive = alive if self.alive is None else self.alive | alive
        self._inputs += inputs * groups * count * (count - 1) // 2
        if positions > 1:
            self._count(live)
        largest = length.amax(dim=(1, 2), keepdim=True)
        share = (length / torch.where(largest > 0, largest, 1)).square().float()
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            cosines = (unit[:, :, rows] @ unit[:, :, start:].mT).triu_(1)
            if positions > 1:
                self._add_cosines(cosines, start)
            inner = (cosines.square_() @ share[:, :, start:]) * share[:, :, rows]
            self._products = self._products + (inner.to(length.dtype) * largest**4).sum()

    def _count(self, live: Tensor) -> None:
        """Count the cosines of maps that are not zero, `[inputs, groups, S / groups]`."""
        pairs = live.sum(-1)
        self._angles = self._angles + (pairs * (pairs - 1)).sum().to(_wide(live.device)) / 2
        _, groups, count = live.shape
        if not self._keep_pairs or groups * count * count > MOST_PAIRS:
            return
        if self._sums is None:
            self._sums = torch.zeros(groups, count, count, device=live.device)
        self._recent.append(live)
        if sum(map(len, self._recent)) >= count:  # by then a matrix takes less memory
            self._counts, self._recent = self._pair_counts(), []

    def _add_cosines(self, cosines: Tensor, start: int) -> None:
        """Add cosines `[inputs, groups, rows, columns]` of filters `start` and after, zero up to the diagonal."""
        rows = slice(start, start + cosines.shape[2])
        if self._living is not None:
            cosines = cosines * (self._living[:, rows, None] & self._living[:, None, start:])
        self._cosines = self._cosines + torch.linalg.vector_norm(cosines, 1, dim=-1).sum(dtype=_wide(cosines.device))
        if self._sums is not None:
            self._sums[:, rows, start:] += cosines.sum(0)

    def _pair_counts(self) -> Tensor:
        counts = self._counts
        if self._recent:
            live = torch.cat(self._recent).float()
            counts = counts + torch.einsum("bgi,bgj->gij", live, live)
        assert isinstance(counts, Tensor)
        return counts


def finite(value: float) -> float | None:
    """Return the value, or None where it is not a number that JSON can hold."""
    return value if math.isfinite(value) else None


def _directions(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps `[…, positions]` at unit length, their lengths `[…, 1]` and which of them are not zero `[…]`."""
    peak = torch.linalg.vector_norm(maps, math.inf, dim=-1, keepdim=True)
    unit = maps / torch.where(peak > 0, peak, 1)  # squares of very small or large maps leave float32's range
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    unit.div_(torch.where(norm > 0, norm, 1))
    wide = _wide(maps.device)
    return unit, norm.to(wide) * peak.to(wide), (peak > 0).squeeze(-1)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class RandomKernels:
    """The similarity of the maps of random Gaussian kernels of a layer's shape.

    A layer with few filters is drawn several times, until it has had `FEWEST` and each group `FEWEST_PER_GROUP`.
    """

    def __init__(self, kernel: Kernel, seed: int = 0) -> None:
        each = kernel.filters // kernel.groups
        self._kernel, self._seed = kernel, seed
        self._draws = max(ceil(FEWEST_PER_GROUP / each), ceil(FEWEST / kernel.filters))
        self._each = each if kernel.groups * each**2 <= MOST_PAIRS else min(each, _MOST)
        self._similarity = FeatureMapSimilarity(kernel.groups, keep_pairs=self._each == each)

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
