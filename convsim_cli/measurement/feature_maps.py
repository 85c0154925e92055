"""Statistics of a layer's feature maps accumulated over inputs, and those of random kernels: chance.

`MapMoments` gives the Pearson correlation of every two maps over all inputs and positions together: each map is centred
by its own mean, as batch norm or the next layer's bias does, so that adding a constant to a map changes nothing. All
figures of pairs come from this matrix. `PaperSimilarity` has the paper's own figures, which leave the means in.

Chance is measured with random kernels on the layer's inputs: a formula such as √(2 / (π·positions)) holds only for
white inputs, since neighboring positions of other inputs are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import ceil, log2, prod
from typing import Any

import torch
from torch import Tensor

from convsim_cli.kernels import Kernel, living_filters
from convsim_cli.measurement.pairs import effective_rank
from convsim_cli.precision import full_precision

MOST_FILTERS = 4096  # of a group, up to which every pair counts; of more, the maps of so many are compared
CONSTANT = 1e-10  # a map is constant if its variance is at most this share of its mean square
FEWEST_PER_GROUP = 64  # random filters
FEWEST = 128  # random filters of a layer: with 3 channels, fm_corr on natural inputs is then known to 3 % (4 % with 64)
_ROWS = 256  # filters whose products with all later ones are taken at once: half of all pairs, in bounded memory
_GRAM_ELEMENTS = 1 << 22  # cosines at once
_MAP_ELEMENTS = 1 << 23  # values of feature maps at once
_STREAM = 0x9E3779B9  # keeps the kernels from being the values that the same seed gives for inputs


class LayerMaps:
    """A layer's feature maps, those of random kernels on the same inputs, and how many calls had inputs.

    sample: which filters of each group are compared with each other, of more than `MOST_FILTERS`; None for all.
    """

    def __init__(
        self,
        kernel: Kernel,
        weight: Tensor,
        *,
        scale: float = 1.0,
        seed: int = 0,
        chance: bool = True,
        paper: bool = True,
    ) -> None:
        """weight: as stored; it says which filters are dead. scale: what the maps are divided by beforehand.

        seed: of the random kernels and the sample. chance: take the maps of random kernels too. paper: take the paper's
        figures too, which are a second product of every two maps.
        """
        self.living = living_filters(kernel.to_filters(weight))
        self.sample = _draw_sample(kernel.filters // kernel.groups, seed)
        self.moments = MapMoments(kernel.groups, self.sample)
        self.paper = PaperSimilarity(kernel.groups, scale=scale, living=self._sampled(self.living)) if paper else None
        self.chance = RandomKernels(kernel, seed) if chance else None
        self.calls = 0

    def update(self, maps: Tensor) -> None:
        """Add maps `[inputs, S, *space]`, the convolution's output without its bias. Waits for no device."""
        self.moments.update(maps)
        if self.paper is not None:
            grouped = maps.unflatten(1, (len(self.living), -1))
            compared = maps if self.sample is None else grouped[:, :, self.sample.to(maps.device)].flatten(1, 2)
            self.paper.update(compared)

    @property
    def alive(self) -> Tensor:
        """Which filters are not dead, `[groups, S / groups]`: neither vanished, nor with a map that is constant."""
        constant = self.moments.constant
        return self.living if constant is None else self.living & ~constant

    @property
    def compared(self) -> Tensor:
        """Which of the filters that are compared are not dead, `[groups, filters]`."""
        return self._sampled(self.alive)

    def correlation(self) -> Tensor | None:
        """Return the correlation of the maps that are compared: see `MapMoments.correlation`. Of a sample, once."""
        return self.moments.correlation(self.compared, last=self.sample is not None)

    def fm_corr(self) -> float | None:
        """Return the mean |correlation| over pairs; None without a pair, and for a single value of each map."""
        correlation = self.correlation()
        return None if correlation is None else mean_correlation(correlation)

    def _sampled(self, filters: Tensor) -> Tensor:
        return filters if self.sample is None else filters[:, self.sample.to(filters.device)]


def _draw_sample(filters: int, seed: int) -> Tensor | None:
    if filters <= MOST_FILTERS:
        return None
    generator = torch.Generator("cpu").manual_seed(seed ^ _STREAM)
    return torch.randperm(filters, generator=generator, device="cpu")[:MOST_FILTERS].sort().values


def inputs_at_once(filters: int, groups: int, positions: int) -> int:
    """Return how many inputs to process at once, so that memory stays bounded for any layer."""
    each = filters // groups
    return max(1, min(_GRAM_ELEMENTS // (filters * min(each, _ROWS)), _MAP_ELEMENTS // (filters * positions)))


class MapMoments:
    """Means, variances and correlations of a layer's maps over all inputs and positions, from one pass.

    Each map is taken less its mean over the first inputs, since raw products of maps with a large mean lose everything
    in float32, and in units of its largest value there, so that no product leaves the range. Products are taken in
    float32 (float64 for maps in float64), without TF32 or autocast, and summed in float64.

    sample: which filters of each group are compared with each other, all for None.
    """

    def __init__(self, groups: int = 1, sample: Tensor | None = None) -> None:
        self._groups, self._sample = groups, sample
        self.count = 0  # values of each map
        self._shift: Tensor | None = None  # the mean over the first inputs, `[groups, S / groups, 1]`
        self._units: list[Tensor] = []  # the largest values there, less the mean, per `MOST_FILTERS`
        self._sums = torch.zeros((), dtype=torch.float32, device="cpu")  # shifted, in units: `[groups, S / groups]`
        self._squares = self._sums  # likewise
        self._products: list[Tensor] = []  # per `_ROWS` filters, with those and all later ones

    def update(self, maps: Tensor) -> None:
        """Add maps `[inputs, S, *space]`. Waits for no device."""
        maps = maps.detach().unflatten(1, (self._groups, -1)).flatten(3)
        each, positions = maps.shape[2:]
        for part in maps.split(inputs_at_once(self._groups * each, self._groups, positions)):
            with full_precision(part.device):
                self._add(part.to(torch.promote_types(part.dtype, torch.float32)))

    def _add(self, maps: Tensor) -> None:
        """Add maps `[inputs, groups, S / groups, positions]`."""
        if self._shift is None:
            self._shift = maps.mean((0, 3)).unsqueeze(-1)
        wide, first = _wide(maps.device), not self.count
        self.count += maps.shape[0] * maps.shape[3]
        sums, squares, compared = [], [], []
        for index, start in enumerate(range(0, maps.shape[2], MOST_FILTERS)):  # a few of very many filters at a time
            rows = slice(start, start + MOST_FILTERS)
            values = maps[:, :, rows].permute(1, 2, 0, 3).flatten(2)  # may be a view of the network's own maps
            values = values - self._shift[:, rows]
            if first:
                peak = _peak(values)
                largest = peak.amax()
                self._units.append(torch.where(peak > 0, peak, torch.where(largest > 0, largest, 1)))
            values.div_(self._units[index])
            sums.append(values.sum(-1).to(wide))
            if self._sample is not None:
                squares.append(torch.linalg.vector_norm(values, dim=-1).to(wide).square())
                values = values[:, _within(self._sample, rows, maps.device)]
            compared.append(values)
        self._sums = self._sums + torch.cat(sums, 1)
        self._add_products(compared[0] if len(compared) == 1 else torch.cat(compared, 1))
        self._squares = self._squares + torch.cat(squares, 1) if squares else self._products_with_themselves()

    def _add_products(self, values: Tensor) -> None:
        filters, wide = values.shape[1], _wide(values.device)
        for index, start in enumerate(range(0, filters, _ROWS)):
            product = values[:, start : start + _ROWS] @ values[:, start:].mT
            if index == len(self._products):
                self._products.append(product.to(wide))
            else:
                self._products[index] += product

    def _products_with_themselves(self) -> Tensor:
        return torch.cat([block.diagonal(dim1=-2, dim2=-1) for block in self._products], 1)

    @property
    def _unit(self) -> Tensor:
        unit = torch.cat(self._units, 1).squeeze(-1)
        return unit.to(_wide(unit.device))

    @property
    def mean(self) -> Tensor:
        """Mean of every map, `[groups, S / groups]` in float64."""
        assert self._shift is not None
        return self._shift.squeeze(-1).to(_wide(self._shift.device)) + self._unit * self._sums / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of every map, `[groups, S / groups]` in float64."""
        return (self._squares / self.count - (self._sums / self.count) ** 2).clamp_min(0) * self._unit**2

    @property
    def constant(self) -> Tensor | None:
        """Which maps are constant over all inputs and positions, or zero where they have a single value; None without.

        A map that is not finite is not constant.
        """
        if not self.count:
            return None
        mean, variance = self.mean, self.variance
        return mean == 0 if self.count == 1 else variance <= CONSTANT * (variance + mean**2)

    def correlation(
        self, alive: Tensor | None = None, dtype: torch.dtype = torch.float32, *, last: bool = False
    ) -> Tensor | None:
        """Return the correlation of every two maps that are compared, `[groups, filters, filters]`.

        alive: which of these take part, those that are not constant for None. The diagonal is 1, and 0 for the others,
        as are their rows and columns. None for a single value of each map, and where a map is not finite. last: give up
        the products for it, to have the memory.
        """
        if self.count < 2:
            return None
        if alive is None:
            assert self.constant is not None
            alive = ~self.constant
        means = self._sums / self.count
        means = means if self._sample is None else means[:, self._sample.to(means.device)]
        filters = means.shape[1]
        variances = self._products_with_themselves() / self.count - means**2
        spread = torch.where(alive & (variances > 0), variances, torch.inf).sqrt()
        kind = torch.float32 if means.device.type == "mps" else dtype
        found = torch.empty(self._groups, filters, filters, dtype=kind, device=means.device)
        for index, start in enumerate(range(0, filters, _ROWS)):
            rows, later = slice(start, start + _ROWS), slice(start, filters)
            covariance = self._products[index] / self.count - means[:, rows, None] * means[:, None, later]
            pairs = covariance / spread[:, rows, None] / spread[:, None, later]
            found[:, rows, later], found[:, later, rows] = pairs, pairs.mT
            if last:
                self._products[index] = pairs[:0]
        found.diagonal(dim1=-2, dim2=-1).copy_(alive)
        return found if bool(torch.stack(torch.aminmax(found)).isfinite().all()) else None  # no copy


def _within(sample: Tensor, rows: slice, device: torch.device) -> Tensor:
    """The filters of a sorted sample that are among these rows, numbered from the first of the rows."""
    return (sample[(sample >= rows.start) & (sample < rows.stop)] - rows.start).to(device)


class PaperSimilarity:
    """The paper's figures: mean |cos| and mean squared inner product of two maps on the same input, means left in.

    Pairs are i < j within a group. Dead filters, and maps that are zero on an input, have no direction and take part in
    no cosine; the inner products are those of all filters. Calls with a single position add no cosines.
    """

    def __init__(self, groups: int = 1, *, scale: float = 1.0, living: Tensor | None = None) -> None:
        """Start with no inputs.

        scale: what the maps were divided by before they are given to `update`. living: which filters take part in
        cosines `[groups, S / groups]`, all for None.
        """
        self._groups, self._scale = groups, scale
        self._living = None if living is None or bool(living.all()) else living
        self._pairs = 0  # of maps, over all inputs
        self._products: Tensor | float = 0.0  # sum of ⟨F_i, F_j⟩²
        self._angles: Tensor | float = 0.0  # how many cosines were added up
        self._cosines: Tensor | float = 0.0  # sum of |cos|

    def update(self, maps: Tensor) -> None:
        """Add maps `[inputs, S, *space]`. Waits for no device."""
        maps = maps.detach().float().unflatten(1, (self._groups, -1)).flatten(3)
        for part in maps.split(inputs_at_once(maps.shape[1] * maps.shape[2], self._groups, maps.shape[-1])):
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
        if not self._pairs:
            return None
        scale = self._scale  # of which a power would be an error beyond the range of float64, not inf
        return finite(float(self._products) / self._pairs * scale * scale * scale * scale)

    def _add(self, maps: Tensor) -> None:
        inputs, groups, count, positions = maps.shape
        unit, length, live = _directions(maps)
        if self._living is not None:
            live = live & self._living
        self._pairs += inputs * groups * count * (count - 1) // 2
        if positions > 1:
            pairs = live.sum(-1)
            self._angles = self._angles + (pairs * (pairs - 1)).sum().to(_wide(live.device)) / 2
        largest = length.amax(dim=(1, 2), keepdim=True)
        share = (length / torch.where(largest > 0, largest, 1)).square().float()
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            cosines = (unit[:, :, rows] @ unit[:, :, start:].mT).triu_(1)
            if positions > 1:
                counted = cosines
                if self._living is not None:
                    counted = cosines * (self._living[:, rows, None] & self._living[:, None, start:])
                total = torch.linalg.vector_norm(counted, 1, dim=-1).sum(dtype=_wide(maps.device))
                self._cosines = self._cosines + total
            inner = (cosines.square_() @ share[:, :, start:]) * share[:, :, rows]
            self._products = self._products + (inner.to(length.dtype) * largest**4).sum()


def mean_correlation(correlation: Tensor) -> float | None:
    """Return the mean |correlation| over pairs of living filters; None without a pair."""
    living = correlation.diagonal(dim1=-2, dim2=-1).sum(-1)
    pairs = (living * (living - 1)).sum().item()
    wide = torch.float32 if correlation.device.type == "mps" else torch.float64  # beside the diagonal all may be small
    total = sum(torch.linalg.vector_norm(rows, 1, dtype=wide).item() for rows in correlation.split(_ROWS, dim=-2))
    return (total - living.sum().item()) / pairs if pairs else None


def finite(value: float) -> float | None:
    """Return the value, or None if it is not a number that JSON can hold."""
    return value if math.isfinite(value) else None


def _directions(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps `[…, positions]` at unit length, their lengths `[…, 1]` and which of them are not zero `[…]`."""
    peak = _peak(maps)
    unit = maps / torch.where(peak > 0, peak, 1)  # squares of very small or large maps leave float32's range
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    unit.div_(torch.where(norm > 0, norm, 1))
    wide = _wide(maps.device)
    return unit, norm.to(wide) * peak.to(wide), (peak > 0).squeeze(-1)


def _peak(maps: Tensor) -> Tensor:
    """The largest |value| of maps `[…, positions]`: four times as fast as torch's norm of order infinity."""
    return torch.maximum(maps.amax(-1, keepdim=True), -maps.amin(-1, keepdim=True))


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class RandomKernels:
    """The maps of random Gaussian kernels of a layer's shape, drawn once.

    A layer with few filters is drawn several times, until it has had `FEWEST` and each group `FEWEST_PER_GROUP`.
    """

    def __init__(self, kernel: Kernel, seed: int = 0) -> None:
        each = kernel.filters // kernel.groups
        self.kernel, self._seed = kernel, seed
        self.draws = max(ceil(FEWEST_PER_GROUP / each), ceil(FEWEST / kernel.filters))
        self._each = min(each, MOST_FILTERS)
        self._moments = MapMoments(kernel.groups)
        self._weights: list[Tensor] = []

    @property
    def filters(self) -> int:
        """Number of random filters, over all groups and draws."""
        return self.draws * self.kernel.filters

    def weights(self, like: Tensor) -> list[Tensor]:
        """Return a weight as stored for each draw, of the type of a tensor and on its device."""
        if not self._weights:
            generator = torch.Generator("cpu").manual_seed(self._seed ^ _STREAM)
            how: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
            weights = self.kernel.channels // self.kernel.groups * prod(self.kernel.taps)  # of a filter
            scale = 2.0 ** -round(log2(weights) / 2)  # its norm is about 1: maps stay in the range of half precision
            self._weights = [torch.randn(self.kernel.shape, **how).mul_(scale).to(like) for _ in range(self.draws)]
        return self._weights

    def update(self, maps: Sequence[Tensor]) -> None:
        """Add the maps `[inputs, S, *space]` of each draw."""
        kept = [part.unflatten(1, (self.kernel.groups, -1))[:, :, : self._each] for part in maps]
        self._moments.update(torch.cat(kept, dim=2).flatten(1, 2))

    def figures(self, filters: Sequence[int]) -> tuple[float | None, float | None]:
        """Return `fm_corr_random` and `fm_rank_random`, None for a single value of each map.

        filters: the number of living filters by group. The mean |correlation| is that of all pairs, those between draws
        included; the effective rank is that of as many random maps of each group, the mean over draws and over the
        groups that have any.
        """
        correlation = self._moments.correlation(last=self.kernel.filters > self._each * self.kernel.groups)
        if correlation is None:
            return None, None
        draws = correlation.unflatten(2, (self.draws, -1)).unflatten(1, (self.draws, -1)).diagonal(dim1=1, dim2=3)
        draws = draws.movedim(-1, 1)  # [groups, draws, S / groups, S / groups]
        ranks = [effective_rank(group[:, :count, :count]) for group, count in zip(draws, filters, strict=True) if count]
        known = [rank for rank in ranks if rank is not None]
        return mean_correlation(correlation), sum(known) / len(known) if known else None
