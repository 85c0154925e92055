from __future__ import annotations

import pytest
import torch
from references import literal_correlation, literal_effective_rank, literal_fm_corr, literal_map_figures
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel
from convsim_cli.measurement import feature_maps
from convsim_cli.measurement.feature_maps import LayerMaps, MapMoments, PaperSimilarity, mean_correlation
from convsim_cli.measurement.kernel_figures import measure_layer
from convsim_cli.measurement.pairs import effective_rank


def moments_of(*parts: Tensor, groups: int = 1) -> MapMoments:
    moments = MapMoments(groups)
    for part in parts:
        moments.update(part)
    return moments


def paper_figures(maps: Tensor, groups: int = 1, **options: Tensor) -> tuple[float | None, float | None]:
    paper = PaperSimilarity(groups, **options)
    for part in maps.split(2):
        paper.update(part)
    return paper.fm_cos, paper.fm_inner2


@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize("groups", [1, 2])
def test_correlations_match_loops_over_pairs_of_maps(groups: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "_ROWS", rows)  # blocks that do not divide the filters
    maps = torch.randn(5, 10, 4, 3) + torch.randn(10, 1, 1)
    maps[2, 1] = 0
    maps[:, 3] = 7
    found = moments_of(*maps.split(2), groups=groups).correlation()
    expected = torch.stack([literal_correlation(group) for group in maps.chunk(groups, 1)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert mean_correlation(found) == pytest.approx(literal_fm_corr(maps, groups), rel=1e-5)
    ranks = [literal_effective_rank(group) for group in expected]
    assert effective_rank(found) == pytest.approx(sum(ranks) / groups, rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 100.0, -3e4])
def test_a_large_mean_costs_no_accuracy(mean: float) -> None:
    maps = torch.randn(6, 5, 20, 20, dtype=torch.float64)
    maps[:, 1] += 0.7 * maps[:, 0]
    shifted = (maps + mean).float()
    found = moments_of(*shifted.split(2)).correlation()[0].double()
    torch.testing.assert_close(found, literal_correlation(shifted), rtol=0, atol=1e-6)


def test_constants_and_scales_of_maps_move_no_correlation() -> None:
    maps = torch.randn(4, 6, 8, 8)
    plain = moments_of(maps).correlation()
    signs = torch.tensor([1.0, 1e-20, 3.0, 1e15, 0.5, 2.0]).reshape(-1, 1, 1)
    moved = moments_of(*((maps + torch.arange(6).reshape(-1, 1, 1)) * signs).split(1)).correlation()
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_figures_do_not_move_with_scale_even_at_the_ends_of_float32(scale: float) -> None:
    maps = torch.randn(2, 4, 8, 8)
    assert paper_figures(maps * scale)[0] == pytest.approx(literal_map_figures(maps)[0], rel=1e-5)
    found = moments_of(maps * scale)
    assert mean_correlation(found.correlation()) == pytest.approx(literal_fm_corr(maps), rel=1e-5)
    assert not found.constant.any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [1, 3])
def test_maps_stay_as_they_are_in_any_memory_format(layout: torch.memory_format, inputs: int) -> None:
    maps = (torch.randn(inputs, 4, 5, 5) + 1).to(memory_format=layout)
    before = maps.clone()
    moments_of(maps)
    PaperSimilarity().update(maps)
    assert torch.equal(maps, before)


def test_maps_in_float64_are_accumulated_in_float64() -> None:
    maps = torch.randn(3, 5, 9, 9, dtype=torch.float64)
    found = moments_of(*maps.split(2))
    torch.testing.assert_close(found.correlation(dtype=torch.float64)[0], literal_correlation(maps), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.mean[0], maps.mean((0, 2, 3)), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.variance[0], maps.var((0, 2, 3), correction=0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_papers_figures_match_loops_over_inputs_and_pairs(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "_ROWS", 2)
    maps = torch.randn(5, 10, 4, 3)
    maps[2, 1] = 0
    assert paper_figures(maps, groups) == pytest.approx(literal_map_figures(maps, groups), rel=1e-5)


@pytest.mark.parametrize("vanished", [1e-10, 1e-25, 1e-38, 0.0])
def test_dead_filters_take_part_in_no_pair_and_stay_in_fm_inner2(vanished: float) -> None:
    maps = torch.randn(3, 5, 5, 5)
    maps[:, 2] *= vanished
    maps[1, 4] = 0
    living = torch.tensor([[True, True, False, True, True]])
    rest = maps[:, [0, 1, 3, 4]]
    expected = literal_map_figures(rest)[0], literal_map_figures(maps)[1]
    assert paper_figures(maps, living=living) == pytest.approx(expected, rel=1e-5)
    found = moments_of(maps).correlation(living)[0]
    assert not found[2].any()
    torch.testing.assert_close(
        found[[0, 1, 3, 4]][:, [0, 1, 3, 4]].double(), literal_correlation(rest), rtol=1e-5, atol=1e-6
    )


def layer_maps(weight: Tensor, *parts: Tensor) -> tuple[Kernel, LayerMaps]:
    kernel = Kernel("k", tuple(weight.shape))
    maps = LayerMaps(kernel, weight)
    for part in parts:
        maps.update(part)
    return kernel, maps


def test_a_map_that_is_constant_on_every_input_or_vanished_is_dead() -> None:
    weight, maps = torch.randn(5, 3, 3, 3), torch.randn(3, 5, 6, 6)
    weight[1] = 0
    maps[:, 2], maps[:, 3] = 0, 5 + 1e-7 * torch.randn(3, 6, 6)
    maps[:, 4] = torch.arange(3.0).reshape(3, 1, 1)  # constant on each input, not over them
    kernel, found = layer_maps(weight, *maps.split(1))
    assert found.alive.tolist() == [[True, False, False, False, True]]
    assert measure_layer(kernel, weight, found)["dead"] == 3


def test_a_single_value_has_no_correlation_and_no_inputs_give_null() -> None:
    weight = torch.randn(4, 3, 3, 3)
    keys = ("fm_corr", "fm_corr_random", "fm_rank", "fm_rank_random", "redundant", "removable", "clusters", "fm_cos")
    for parts in ((), (torch.randn(1, 4, 1, 1),)):
        record = measure_layer(*layer_maps(weight, *parts)[:1], weight, layer_maps(weight, *parts)[1])
        assert [record[key] for key in keys] == [None] * len(keys)
        assert record["dead"] == 0
    several = measure_layer(*layer_maps(weight)[:1], weight, layer_maps(weight, torch.randn(9, 4, 1, 1))[1])
    assert several["fm_corr"] is not None
    assert (several["fm_cos"], several["fm_inner2"] is None) == (None, False)


def test_calls_at_several_sizes_all_count() -> None:
    maps = [torch.randn(8, 6, side, side) for side in (20, 1, 4)]
    joined = torch.cat([part.transpose(0, 1).flatten(1) for part in maps], 1).unsqueeze(0)
    found = moments_of(*maps).correlation()[0].double()
    torch.testing.assert_close(found, literal_correlation(joined), rtol=1e-5, atol=1e-6)
    paper = PaperSimilarity()
    for part in maps:
        paper.update(part)
    expected = (literal_map_figures(maps[0])[0] + literal_map_figures(maps[2])[0]) / 2
    assert paper.fm_cos == pytest.approx(expected, rel=1e-5)


def test_a_map_that_is_not_finite_is_an_error_and_not_dead() -> None:
    weight, maps = torch.randn(3, 2, 3, 3), torch.randn(2, 3, 4, 4)
    maps[0, 1, 0, 0] = torch.inf
    kernel, found = layer_maps(weight, maps)
    assert found.alive.all()
    with pytest.raises(InputError, match="its feature maps on these inputs contain NaN or Inf"):
        measure_layer(kernel, weight, found)


def test_of_very_many_filters_a_seeded_sample_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "MOST_FILTERS", 6)
    weight, maps = torch.randn(20, 2, 3, 3), torch.randn(3, 20, 5, 5)
    maps[:, 11] = 4
    kernel, found = Kernel("k", (20, 2, 3, 3), 2), None
    for _ in range(2):
        found = LayerMaps(kernel, weight, seed=3)
        found.update(maps)
        chosen = found.sample.tolist()
        assert chosen == LayerMaps(kernel, weight, seed=3).sample.tolist() != LayerMaps(kernel, weight).sample.tolist()
    record = measure_layer(kernel, weight, found)
    kept = [group * 10 + index for group in range(2) for index in chosen]
    assert record["sampled"] == 6
    assert record["fm_corr"] == pytest.approx(literal_fm_corr(maps[:, kept], 2), rel=1e-5)
    assert [record[key] for key in ("redundant", "opposite", "removable", "clusters")] == [None] * 4
    assert record["dead"] == 1  # of all filters
    small = LayerMaps(Kernel("k", (6, 2, 3, 3)), weight[:6])
    assert "sampled" not in measure_layer(Kernel("k", (6, 2, 3, 3)), weight[:6], small)
