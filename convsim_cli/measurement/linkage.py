"""Agglomerative clustering of filters: by complete linkage into duplicates, by average linkage into an order.

Two clusters that are each other's nearest are merged, as chains of nearest neighbors find them (the NN-chain
algorithm): for both linkages this gives the tree of merging the closest two first, in quadratic time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Linkage = Literal["complete", "average"]


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
