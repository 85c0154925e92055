from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from references import literal_correlation, literal_duplicates, literal_effective_rank, literal_merges
from torch import Tensor

from convsim_cli.measurement.feature_maps import MapMoments
from convsim_cli.measurement.pairs import (
    clusters,
    effective_rank,
    opposite,
    redundant,
    similarity_order,
    strongest_pairs,
)


def correlation_of(maps: Tensor, groups: int = 1) -> Tensor:
    moments = MapMoments(groups)
    for part in maps.split(2):
        moments.update(part)
    found = moments.correlation()
    assert found is not None
    return found


def test_maps_of_the_same_sign_are_redundant_and_of_the_other_opposite() -> None:
    maps = torch.randn(5, 7, 8, 8)
    maps[:, 4] = -3 * maps[:, 1]
    maps[:, 2] = maps[:, 0] + 0.1 * maps[:, 3]
    mean = correlation_of(maps)
    assert (redundant(mean), opposite(mean)) == (2, 2)
    assert clusters(mean) == [[0, 2]]
    first, second = strongest_pairs(mean, 2)
    assert first == {"filters": [1, 4], "corr": pytest.approx(-1)}
    assert second == {"filters": [0, 2], "corr": pytest.approx(literal_correlation(maps)[0, 2].item(), rel=1e-5)}
    assert literal_duplicates(literal_correlation(maps), 0.95) == (2, 2, 1)


def test_the_threshold_is_exceeded_not_met() -> None:
    mean = torch.eye(4)
    mean[0, 1] = mean[1, 0] = 0.5
    mean[2, 3] = mean[3, 2] = -0.5
    for threshold, count in ((0.5, 0), (0.49, 2)):
        assert redundant(mean[None], threshold) == opposite(mean[None], threshold) == count
        assert clusters(mean[None], threshold) == [[0, 1]] * (count // 2)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_in_a_cluster_every_two_filters_exceed_the_threshold(threshold: float) -> None:
    base = torch.randn(6, 16, 40)
    maps = base[:, torch.arange(30) % 4] + 0.8 * torch.randn(6, 30, 40)
    mean = correlation_of(maps.unsqueeze(-1))[0]
    found = clusters(mean[None], threshold)
    joined = [cluster for cluster, value in literal_merges(mean.double(), "complete") if value > threshold]
    assert found == sorted(sorted(a) for a in joined if not any(a < b for b in joined))
    for cluster in found:
        block = mean[cluster][:, cluster] + torch.eye(len(cluster))
        assert (block > threshold).all()


def test_filters_of_groups_are_numbered_over_the_layer() -> None:
    maps = torch.randn(3, 4, 6, 6)
    maps[:, 3] = maps[:, 1]  # of different groups: no pair
    maps[:, 2] = 2 * maps[:, 3]
    mean = correlation_of(maps, groups=2)
    assert clusters(mean) == [[2, 3]]
    assert {tuple(pair["filters"]) for pair in strongest_pairs(mean, 9)} == {(0, 1), (2, 3)}


def test_maps_dead_on_one_input_count_on_the_others() -> None:
    maps = torch.randn(3, 4, 6, 6)
    maps[0, 3] = 0
    maps[:, 2] = 0
    pairs = {tuple(pair["filters"]): pair["corr"] for pair in strongest_pairs(correlation_of(maps), 9)}
    assert set(pairs) == {(0, 1), (0, 3), (1, 3)}
    assert pairs[1, 3] == pytest.approx(literal_correlation(maps)[1, 3].item(), rel=1e-5)


def test_the_effective_rank_is_its_definition() -> None:
    maps = torch.randn(4, 12, 6, 6)
    maps[:, 5] = 0
    mean = correlation_of(maps)
    living = [index for index in range(12) if index != 5]
    expected = literal_effective_rank(mean[0][living][:, living])
    assert effective_rank(mean) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(torch.ones(1, 6, 6)) == pytest.approx(1)
    assert effective_rank(torch.eye(6)[None]) == pytest.approx(6)
    half = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    assert effective_rank(half[None]) == pytest.approx(2)


def test_the_effective_rank_is_the_mean_over_living_groups() -> None:
    groups = torch.stack([torch.eye(4), torch.ones(4, 4), torch.zeros(4, 4)])
    assert effective_rank(groups) == pytest.approx((4 + 1) / 2)
    assert effective_rank(groups[2:]) is None
    assert effective_rank(torch.full((1, 3, 3), torch.nan)) is None


def test_clusters_stand_together_and_dead_filters_last() -> None:
    base = torch.randn(4, 3, 50)
    maps = (base[:, [0, 1, 2, 0, 1, 2, 0, 1]] + 0.1 * torch.randn(4, 8, 50)).unsqueeze(-1)
    maps[:, 4] = 0
    order = similarity_order(correlation_of(maps))[0].tolist()
    assert sorted(order) == list(range(8))
    assert order[-1] == 4
    kinds = [index % 3 for index in order[:-1]]
    assert sum(a != b for a, b in pairwise(kinds)) == 2


def test_a_chain_of_similar_filters_is_no_cluster() -> None:
    angles = torch.tensor([0.0, 0.29, 0.58])
    mean = (angles[:, None] - angles[None, :]).cos()
    assert mean[0, 2] < 0.95 < mean[0, 1]
    assert redundant(mean[None]) == 3
    assert [len(cluster) for cluster in clusters(mean[None])] == [2]
