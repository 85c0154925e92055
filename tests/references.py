"""Literal, slow transcriptions of the paper's equations: what the fast code is compared with."""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor


def correlate(a: Tensor, b: Tensor) -> Tensor:
    """Full cross-correlation (a ⋆ b)[d] = Σ_n a[n] b[n + d], one loop per axis; differentiable."""
    result = torch.zeros([2 * k - 1 for k in a.shape], dtype=a.dtype)
    for n in product(*(range(k) for k in a.shape)):
        window = tuple(slice(k - 1 - i, 2 * k - 1 - i) for k, i in zip(a.shape, n, strict=True))
        shifted = torch.zeros_like(result)
        shifted[window] = b
        result = result + a[n] * shifted
    return result


def literal_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Eq. 10 by its own loops: pairs of filters, pairs of channels, taps, lags; pairs within each group."""
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        for i, j in combinations(range(group.shape[0]), 2):
            for c1, c2 in product(range(group.shape[1]), repeat=2):
                total = total + correlate(group[i, c1], group[j, c2]).square().sum()
    return total


def pairwise_similarity(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 10 and its gradient as a float64 sum over pairs, for norms too far apart to subtract."""
    weight = weight.double()
    gradient = torch.zeros_like(weight)
    total = torch.zeros((), dtype=torch.float64)
    for i, j in combinations(range(weight.shape[0]), 2):
        pair = weight[[i, j]].clone().requires_grad_()
        value = literal_similarity(pair)
        value.backward()
        assert pair.grad is not None
        total = total + value.detach()
        gradient[i] += pair.grad[0]
        gradient[j] += pair.grad[1]
    return total, gradient


def literal_neighbouring_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """What the authors' public code sums: j = i + 1 and c1 = c2; neighbours within each group."""
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        for i in range(group.shape[0] - 1):
            for c in range(group.shape[1]):
                total = total + correlate(group[i, c], group[i + 1, c]).square().sum()
    return total


def literal_kernel_orthogonality(weight: Tensor, groups: int = 1) -> Tensor:
    """Section 3.1 of the paper: Σ_{i<j} ⟨K_i, K_j⟩², pairs within each group."""
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        for i, j in combinations(range(group.shape[0]), 2):
            total = total + (group[i] * group[j]).sum().square()
    return total


def literal_normalized_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Mean over pairs of ⟨A_i, A_j⟩ / (‖K_i‖²‖K_j‖²)."""
    ratios = []
    for group in weight.chunk(groups):
        for i, j in combinations(range(group.shape[0]), 2):
            scale = group[i].square().sum() * group[j].square().sum()
            ratios.append(literal_similarity(group[[i, j]]) / scale)
    return torch.stack(ratios).mean()


LITERAL = {  # the objectives by name
    "cs": literal_similarity,
    "neighbours": literal_neighbouring_similarity,
    "kernel": literal_kernel_orthogonality,
}
