from __future__ import annotations

import pytest
import torch
from references import literal_map_figures, literal_mean_cosines

from convsim_cli.measurement import feature_maps
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity


def seen(maps: torch.Tensor, groups: int = 1, **options: object) -> FeatureMapSimilarity:
    similarity = FeatureMapSimilarity(groups, **options)  # type: ignore[arg-type]
    similarity.update(maps)
    return similarity


@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize("groups", [1, 2])
def test_feature_map_figures_match_loops_over_inputs_and_pairs(
    groups: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_maps, "_ROWS", rows)  # blocks that do not divide the filters
    maps = torch.randn(5, 10, 4, 3)
    maps[2, 1] = 0
    similarity = FeatureMapSimilarity(groups)
    for chunk in maps.split(2):
        similarity.update(chunk)
    assert (similarity.fm_cos, similarity.fm_inner2) == pytest.approx(literal_map_figures(maps, groups), rel=1e-5)
    expected = torch.stack([literal_mean_cosines(group) for group in maps.chunk(groups, 1)])
    torch.testing.assert_close(similarity.mean_cosines().double(), expected, rtol=1e-5, atol=1e-6)
    assert similarity.alive.all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosines_do_not_move_with_scale_even_at_the_ends_of_float32(scale: float) -> None:
    maps = torch.randn(2, 4, 8, 8)
    similarity = seen(maps * scale)
    assert similarity.fm_cos == pytest.approx(literal_map_figures(maps)[0], rel=1e-5)
    assert similarity.alive.all()


@pytest.mark.parametrize("vanished", [1e-10, 1e-25, 1e-38, 0.0])
def test_dead_filters_take_part_in_no_cosine_and_stay_in_the_papers_figure(vanished: float) -> None:
    maps = torch.randn(3, 5, 5, 5)
    maps[:, 2] *= vanished
    maps[1, 4] = 0
    living = torch.tensor([[True, True, False, True, True]])
    similarity = seen(maps, living=living)
    rest = maps[:, [0, 1, 3, 4]]
    assert similarity.fm_cos == pytest.approx(literal_map_figures(rest)[0], rel=1e-5)
    assert similarity.fm_inner2 == pytest.approx(literal_map_figures(maps)[1], rel=1e-5)
    assert similarity.alive.tolist() == living.tolist()
    mean = similarity.mean_cosines()[0]
    assert not mean[2].any()
    torch.testing.assert_close(
        mean[[0, 1, 3, 4]][:, [0, 1, 3, 4]].double(), literal_mean_cosines(rest), rtol=1e-5, atol=1e-6
    )


def test_a_map_that_is_zero_on_every_input_is_dead_and_a_vanished_one_too() -> None:
    maps = torch.randn(3, 4, 5, 5)
    maps[:, 2] = 0
    assert seen(maps).alive.tolist() == [[True, True, False, True]]
    living = torch.tensor([[True, False, True, True]])
    assert seen(maps, living=living).alive.tolist() == [[True, False, False, True]]


def test_a_single_position_has_no_angle_and_no_inputs_give_null() -> None:
    similarity = FeatureMapSimilarity()
    assert (similarity.fm_cos, similarity.fm_inner2, similarity.alive, similarity.mean_cosines()) == (None,) * 4
    similarity.update(torch.randn(3, 4, 1, 1))
    assert similarity.fm_cos is None
    assert similarity.mean_cosines() is None
    assert similarity.fm_inner2 is not None


def test_calls_at_several_sizes_all_count() -> None:
    maps = [torch.randn(8, 6, side, side) for side in (20, 1, 4)]
    similarity = FeatureMapSimilarity()
    for part in maps:
        similarity.update(part)
    expected = (literal_map_figures(maps[0])[0] + literal_map_figures(maps[2])[0]) / 2
    assert similarity.fm_cos == pytest.approx(expected, rel=1e-5)
    mean = (literal_mean_cosines(maps[0]) + literal_mean_cosines(maps[2])) / 2
    torch.testing.assert_close(similarity.mean_cosines()[0].double(), mean, rtol=1e-5, atol=1e-6)


def test_pairs_are_kept_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = torch.randn(3, 8, 5, 5)
    kept = seen(maps)
    monkeypatch.setattr(feature_maps, "MOST_PAIRS", 63)
    bounded = seen(maps)
    assert kept.mean_cosines() is not None
    assert bounded.mean_cosines() is None
    assert bounded.fm_cos == kept.fm_cos
    assert bounded.alive.equal(kept.alive)


def test_counts_of_pairs_take_no_memory_per_input() -> None:
    maps = torch.randn(40, 3, 2, 2)
    maps[::3, 1] = 0
    similarity = FeatureMapSimilarity()
    for part in maps.split(1):
        similarity.update(part)
        assert sum(map(len, similarity._recent)) < 3
    torch.testing.assert_close(similarity.mean_cosines()[0].double(), literal_mean_cosines(maps), rtol=1e-5, atol=1e-6)
