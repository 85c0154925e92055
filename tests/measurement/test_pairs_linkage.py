from __future__ import annotations

import pytest
import torch
from references import literal_merges

from convsim_cli.measurement.pairs import agglomerate


@pytest.mark.parametrize("linkage", ["complete", "average"])
@pytest.mark.parametrize("count", [1, 2, 9, 24])
def test_merges_are_those_of_joining_the_two_most_similar_clusters_first(linkage: str, count: int) -> None:
    maps = torch.randn(count, 5, dtype=torch.float64)
    maps /= maps.norm(dim=1, keepdim=True)
    similarity = maps @ maps.mT
    found = agglomerate(similarity, linkage)  # type: ignore[arg-type]
    expected = literal_merges(similarity, linkage)
    assert {(frozenset(merge.left + merge.right), round(merge.similarity, 9)) for merge in found} == {
        (frozenset(cluster), round(value, 9)) for cluster, value in expected
    }


def test_equal_similarities_come_to_an_end() -> None:
    assert len(agglomerate(torch.ones(40, 40), "complete")) == 39
