"""Literal, slow transcriptions of the paper's equations: what the fast code is compared with."""

from __future__ import annotations

import math
from itertools import combinations, product
from random import Random

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


def similarity_by_convolution(weight: Tensor, groups: int = 1) -> Tensor:
    """Eq. 10 where its loops would take too long: the cross-correlations of each pair of filters by one convolution."""
    convolve = [torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d][weight.ndim - 3]
    padding = [k - 1 for k in weight.shape[2:]]
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        for i, j in combinations(range(group.shape[0]), 2):
            total = total + convolve(group[i].unsqueeze(1), group[j].unsqueeze(1), padding=padding).square().sum()
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


def literal_expected_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """100 positions: 100 Σ_{i<j} ⟨K_i, K_j⟩² + Eq. 10."""
    return 100 * literal_kernel_orthogonality(weight, groups) + literal_similarity(weight, groups)


def literal_ocnn(weight: Tensor, groups: int = 1) -> Tensor:
    """Wang et al. 2020, stride 1: ‖Σ_c K_i[c] ⋆ K_j[c] − δ_ij δ_0‖² over all lags and ordered pairs of each group."""
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        for i, j in product(range(group.shape[0]), repeat=2):
            lags = sum(correlate(group[i, c], group[j, c]) for c in range(group.shape[1]))
            target = torch.zeros_like(lags)
            if i == j:
                target[tuple(size // 2 for size in target.shape)] = 1
            total = total + (lags - target).square().sum()
    return total


def literal_srip(weight: Tensor, groups: int = 1) -> Tensor:
    """Bansal et al. 2018: the spectral norm of KKᵀ − I (KᵀK − I where S > C·N) by two power iterations, per group."""
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        rows = group.flatten(1)
        rows = rows if rows.shape[0] <= rows.shape[1] else rows.T
        excess = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)
        normal = Random(0).gauss
        vector = torch.tensor([normal(0, 1) for _ in rows], dtype=rows.dtype)
        for _ in range(2):
            first = excess @ vector
            vector = excess @ first
        total = total + vector.norm() / first.norm()
    return total


def literal_orthoreg(weight: Tensor, groups: int = 1) -> Tensor:
    """Rodríguez et al. 2017: Σ_{i≠j} log(1 + exp(10 (cos(K_i, K_j) − 1))), pairs within each group."""
    total = torch.zeros((), dtype=weight.dtype)
    for group in weight.chunk(groups):
        for i, j in product(range(group.shape[0]), repeat=2):
            if i != j:
                cosine = (group[i] * group[j]).sum() / group[i].norm() / group[j].norm()
                total = total + (1 + (10 * (cosine - 1)).exp()).log()
    return total


def literal_normalized_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Mean over pairs of ⟨A_i, A_j⟩ / (‖K_i‖²‖K_j‖²)."""
    ratios = []
    for group in weight.chunk(groups):
        for i, j in combinations(range(group.shape[0]), 2):
            scale = group[i].square().sum() * group[j].square().sum()
            ratios.append(literal_similarity(group[[i, j]]) / scale)
    return torch.stack(ratios).mean()


def literal_map_figures(maps: Tensor, groups: int = 1) -> tuple[float, float]:
    """Mean over inputs and pairs of |cos(F_i, F_j)| and of ⟨F_i, F_j⟩², by loops in float64."""
    cosines, products = [], []
    for image in maps.double().flatten(2):
        for group in image.chunk(groups):
            for i, j in combinations(range(group.shape[0]), 2):
                product = group[i] @ group[j]
                products.append(product**2)
                if group[i].any() and group[j].any():
                    cosines.append((product / group[i].norm() / group[j].norm()).abs())
    return torch.stack(cosines).mean().item(), torch.stack(products).mean().item()


def literal_correlation(maps: Tensor) -> Tensor:
    """The Pearson correlation of every two maps of one group over all inputs and positions, by loops in float64.

    A map whose variance is at most 1e-10 of its mean square has none: 0, and 0 on the diagonal.
    """
    values = [maps[:, i].double().flatten().tolist() for i in range(maps.shape[1])]
    means = [math.fsum(value) / len(value) for value in values]
    found = torch.zeros(len(values), len(values), dtype=torch.float64)

    def covariance(i: int, j: int) -> float:
        products = ((a - means[i]) * (b - means[j]) for a, b in zip(values[i], values[j], strict=True))
        return math.fsum(products) / len(values[i])

    spreads = [covariance(i, i) for i in range(len(values))]
    living = [s > 1e-10 * (s + mean**2) for s, mean in zip(spreads, means, strict=True)]
    for i, j in product(range(len(values)), repeat=2):
        if living[i] and living[j]:
            found[i, j] = covariance(i, j) / math.sqrt(spreads[i] * spreads[j])
    return found


def literal_fm_corr(maps: Tensor, groups: int = 1) -> float:
    """Mean over the pairs of living maps of |correlation|."""
    pairs = []
    for group in maps.chunk(groups, 1):
        correlation = literal_correlation(group)
        living = [i for i in range(len(correlation)) if correlation[i, i] > 0]
        pairs += [abs(correlation[i, j].item()) for i, j in combinations(living, 2)]
    return math.fsum(pairs) / len(pairs)


def literal_duplicates(correlation: Tensor, threshold: float) -> tuple[int, int, int]:
    """How many filters have a partner above the threshold, below its negative, and could go (complete linkage)."""
    partners = [[correlation[i, j].item() for j in range(len(correlation)) if j != i] for i in range(len(correlation))]
    joined = [cluster for cluster, value in literal_merges(correlation, "complete") if value > threshold]
    largest = [cluster for cluster in joined if not any(cluster < other for other in joined)]
    redundant = sum(max(others) > threshold for others in partners)
    return redundant, sum(min(others) < -threshold for others in partners), sum(len(c) - 1 for c in largest)


def literal_effective_rank(mean: Tensor) -> float:
    """Exp of the entropy of the eigenvalues of a matrix, clamped at 0 and divided by their sum."""
    eigenvalues = [max(value.real.item(), 0.0) for value in torch.linalg.eigvals(mean.double())]
    shares = [value / sum(eigenvalues) for value in eigenvalues]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def literal_merges(similarity: Tensor, linkage: str) -> list[tuple[set[int], float]]:
    """Merge the two most similar clusters until one is left: every merged cluster and how similar its halves were."""
    reduce = {"complete": min, "average": lambda values: sum(values) / len(values)}[linkage]
    clusters, merges = [{index} for index in range(len(similarity))], []
    while len(clusters) > 1:
        near = {
            (a, b): reduce([similarity[i, j].item() for i in clusters[a] for j in clusters[b]])
            for a, b in combinations(range(len(clusters)), 2)
        }
        a, b = max(near, key=lambda pair: near[pair])
        merges.append((clusters[a] | clusters[b], near[a, b]))
        clusters = [cluster for c, cluster in enumerate(clusters) if c not in (a, b)] + [clusters[a] | clusters[b]]
    return merges


def literal_dct(weight: Tensor, groups: int = 1, photographs: bool = False) -> Tensor:
    """One DCT pattern per filter: (filter, pattern) pairs in falling share of energy, then U Vᵀ within a pattern.

    Full rank, no dead filters. photographs: channels correlated by 0.85, and 30 steps down Σ cos⁸ where n > C.
    """
    taps, channels = weight.shape[2:], weight.shape[1]
    found = torch.zeros_like(weight, dtype=torch.float64)
    correlation = torch.full((channels, channels), 0.85, dtype=torch.float64).fill_diagonal_(1)
    values, vectors = torch.linalg.eigh(correlation)
    root, inverse = (vectors @ torch.diag(values**power) @ vectors.T for power in (0.5, -0.5))
    patterns = []
    for waves in product(*(range(k) for k in taps)):
        pattern = torch.ones(taps, dtype=torch.float64)
        for n in product(*(range(k) for k in taps)):
            for k, wave, tap in zip(taps, waves, n, strict=True):
                pattern[n] *= math.sqrt((2 if wave else 1) / k) * math.cos(math.pi * wave * (2 * tap + 1) / (2 * k))
        patterns.append(pattern)
    for group, filters in zip(found.chunk(groups), weight.double().chunk(groups), strict=True):
        parts = [[torch.stack([(k * p).sum() for k in filter]) for p in patterns] for filter in filters]
        shares = {
            (i, p): (parts[i][p].square().sum() / filters[i].square().sum()).item()
            for i in range(len(filters))
            for p in range(len(patterns))
        }
        each, more = divmod(len(filters), len(patterns))
        taken: dict[int, list[int]] = {p: [] for p in range(len(patterns))}
        for i, p in sorted(shares, key=lambda pair: -shares[pair]):
            room = each + 1 if more and len(taken[p]) == each else each
            if len(taken[p]) < room and not any(i in members for members in taken.values()):
                more -= len(taken[p]) == each
                taken[p].append(i)
        for p, members in taken.items():
            if not members:
                continue
            rows = torch.stack([parts[i][p] for i in members])
            rows = rows @ root if photographs else rows
            u, _, vt = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
            rows = u @ vt
            most = -(-len(filters) // len(patterns))
            if photographs and most > channels:
                rows = rows / rows.norm(dim=1, keepdim=True)
                for _ in range(30):
                    cosines = (rows @ rows.T).fill_diagonal_(0)
                    rows = rows - 2 / most * cosines**7 @ rows
                    rows = rows / rows.norm(dim=1, keepdim=True)
            rows = rows @ inverse if photographs else rows
            for row, i in zip(rows, members, strict=True):
                outer = torch.stack([value * patterns[p] for value in row / row.norm()])
                group[i] = filters[i].norm() * outer
    return found


LITERAL = {  # the objectives by name
    "cs": literal_similarity,
    "neighbours": literal_neighbouring_similarity,
    "kernel": literal_kernel_orthogonality,
    "expected": literal_expected_similarity,
    "ocnn": literal_ocnn,
    "srip": literal_srip,
    "orthoreg": literal_orthoreg,
}
