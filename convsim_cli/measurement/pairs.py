"""Figures of the correlation of every two feature maps: its mean, rank, duplicates, opposites, clusters and order.

They take `MapMoments.correlation`, `[groups, S / groups, S / groups]`, whose diagonal is 1 for living filters and 0 for
dead ones, and number filters from 0 over the whole layer. Filters are clustered agglomeratively: by complete linkage
into duplicates, by average linkage into an order. Two clusters that are each other's nearest are merged, as chains of
nearest neighbors find them (the NN-chain algorithm): for both linkages this gives the tree of merging the closest two
first, in quadratic time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

MOST_CELLS = 128  # along each axis of a heat map; of more filters, a cell shows the strongest of several pairs
THRESHOLD = 0.95  # correlation above which one of two filters could go

_FLOAT64_FILTERS = 2048  # up to which eigenvalues are taken in float64: a matrix of 4,096 takes 134 MB, its copy too

Linkage = Literal["complete", "average"]


def redundant(correlation: Tensor, threshold: float = THRESHOLD) -> int:
    """Return how many filters have a partner whose correlation exceeds the threshold."""
    return int((_without_diagonal(correlation).amax(-1) > threshold).sum())


def opposite(correlation: Tensor, threshold: float = THRESHOLD) -> int:
    """Return how many filters have a partner whose correlation is below minus the threshold."""
    return int((_without_diagonal(correlation).amin(-1) < -threshold).sum())


def clusters(correlation: Tensor, threshold: float = THRESHOLD) -> list[list[int]]:
    """Return the clusters of duplicates: in each, every two filters exceed the threshold (complete linkage)."""
    found = []
    for group, similarity in enumerate(_without_diagonal(correlation)):
        candidates = (similarity.amax(-1) > threshold).nonzero().flatten()
        largest: dict[int, list[int]] = {}
        for merge in agglomerate(similarity[candidates][:, candidates], "complete"):
            if merge.similarity > threshold:
                whole = merge.left + merge.right
                largest |= dict.fromkeys(whole, whole)
        offset = group * correlation.shape[-1]
        unique = {id(cluster): cluster for cluster in largest.values()}.values()
        found += [sorted(offset + int(candidates[index]) for index in cluster) for cluster in unique]
    return sorted(found)


def effective_rank(correlation: Tensor) -> float | None:
    """Return exp of the entropy of the eigenvalues, clamped at 0 and divided by their sum: the mean over groups.

    From 1, where all maps are equal, to the number of living filters. Dead filters have no diagonal and add nothing;
    a group of them is left out. None if every filter is dead, or a correlation is not finite. Source: Roy &
    Vetterli 2007.
    """
    correlation = correlation.cpu() if correlation.device.type == "mps" else correlation  # mps has no eigenvalues
    living = correlation.diagonal(dim1=-2, dim2=-1).any(-1)
    if not living.any() or not torch.stack(torch.aminmax(correlation)).isfinite().all():
        return None
    correlation = correlation if living.all() else correlation[living]
    if correlation.shape[-1] <= _FLOAT64_FILTERS:
        correlation = correlation.double()
    eigenvalues = torch.linalg.eigvalsh(correlation).clamp_min(0).double()
    shares = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().mean().item()


def strongest_pairs(correlation: Tensor, count: int) -> list[dict[str, Any]]:
    """Return the pairs with the largest |correlation|, the largest first: `{"filters": [i, j], "corr": signed}`."""
    upper = correlation.triu(1)
    places = upper.abs().flatten().topk(min(count, upper.numel())).indices
    each = correlation.shape[-1]
    found = []
    for value, place in zip(upper.flatten()[places].tolist(), places.tolist(), strict=True):
        group, pair = divmod(place, each * each)
        if value != 0:
            found.append({"filters": [group * each + pair // each, group * each + pair % each], "corr": value})
    return found


def similarity_order(correlation: Tensor) -> Tensor:
    """Return each group's filters in the order of average linkage, dead ones last: indices `[groups, S / groups]`.

    Filters with similar maps are neighbors in it, so that clusters of duplicates become blocks.
    """
    orders = []
    for group in correlation:
        alive = group.diagonal() > 0
        living, dead = alive.nonzero().flatten(), (~alive).nonzero().flatten()
        merges = agglomerate(group[living][:, living], "average")
        order = merges[-1].left + merges[-1].right if merges else list(range(len(living)))
        orders.append(torch.cat([living[order], dead]))
    return torch.stack(orders)


def _without_diagonal(correlation: Tensor) -> Tensor:
    return correlation - torch.diag_embed(correlation.diagonal(dim1=-2, dim2=-1))


@dataclass(frozen=True)
class HeatMap:
    """The correlation of every pair of a layer's maps, as it is drawn.

    cells: `[n, n]`, NaN where two filters form no pair; labels: the filter that each row begins with; pooled: whether a
    cell stands for several pairs.
    """

    cells: Tensor
    labels: list[int]
    pooled: bool


def make_heat_map(correlation: Tensor) -> HeatMap:
    """Return the heat map of correlations `[groups, S / groups, S / groups]`, groups as blocks along its diagonal.

    Filters stand in `similarity_order` within their group. Dead filters form no pairs.
    """
    correlation = correlation.cpu()
    groups, each, _ = correlation.shape
    order = similarity_order(correlation)
    side = min(each, max(1, MOST_CELLS // groups))
    cells = torch.full((groups * side, groups * side), torch.nan, device="cpu")
    for group in range(groups):
        block = slice(group * side, (group + 1) * side)
        cells[block, block] = _pooled(_without_dead(correlation[group])[order[group]][:, order[group]], side)
    labels = [group * each + int(order[group, cell * each // side]) for group in range(groups) for cell in range(side)]
    return HeatMap(cells, labels, side < each)


def _without_dead(correlation: Tensor) -> Tensor:
    alive = correlation.diagonal() > 0
    return torch.where(alive[:, None] & alive[None, :], correlation, torch.nan)


def _pooled(correlation: Tensor, side: int) -> Tensor:
    """Keep the strongest pair of those that share a cell, with its sign; NaN where no pair is alive."""
    if side == len(correlation):
        return correlation
    pairs = correlation.clone().fill_diagonal_(torch.nan)  # a filter is no partner of its own
    highest = _pool(torch.where(pairs.isnan(), -torch.inf, pairs), side)
    lowest = -_pool(torch.where(pairs.isnan(), -torch.inf, -pairs), side)
    strongest = torch.where(highest >= -lowest, highest, lowest)
    return torch.where(strongest.isinf(), torch.nan, strongest)


def _pool(values: Tensor, side: int) -> Tensor:
    pooled: Any = torch.nn.functional.adaptive_max_pool2d(values[None], side)
    return pooled[0]


@dataclass(frozen=True)
class Merge:
    """Two clusters that became one: their members, and how similar they were."""

    left: list[int]
    right: list[int]
    similarity: float


def agglomerate(similarity: Tensor, linkage: Linkage) -> list[Merge]:
    """Return the merges that leave one cluster, children before their parents.

    similarity: symmetric `[n, n]`; the diagonal is ignored. linkage: the similarity of two clusters is that of their
    least similar members (`complete`), or the mean over their pairs (`average`).
    """
    near = similarity.double().cpu().clone().fill_diagonal_(-math.inf)
    members: dict[int, list[int]] = {index: [index] for index in range(len(near))}
    merges: list[Merge] = []
    chain: list[int] = []
    while len(members) > 1:
        if not chain:
            chain.append(next(iter(members)))
        last, former = chain[-1], chain[-2] if len(chain) > 1 else None
        closest = int(near[last].argmax())
        if former is None or near[last, former] < near[last, closest]:  # of equals the former: a chain has an end
            chain.append(closest)
            continue
        left, right = sorted((last, former))
        merges.append(Merge(members[left], members[right], float(near[left, right])))
        _join(near, left, right, linkage, len(members[left]), len(members[right]))
        members[left] = members[left] + members.pop(right)
        del chain[-2:]
    return merges


def _join(near: Tensor, left: int, right: int, linkage: Linkage, left_size: int, right_size: int) -> None:
    """Let `left` stand for both clusters, and `right` for none."""
    if linkage == "complete":
        joined = torch.minimum(near[left], near[right])
    else:
        joined = (left_size * near[left] + right_size * near[right]) / (left_size + right_size)
    near[left] = near[:, left] = joined
    near[right] = near[:, right] = -math.inf
    near[left, left] = -math.inf
