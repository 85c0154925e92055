from __future__ import annotations

from statistics import mean

import pytest
import torch
from references import literal_effective_rank, literal_map_figures, literal_mean_cosines
from torch import Tensor, nn

from convsim_cli.kernels import Kernel
from convsim_cli.measurement import feature_maps
from convsim_cli.measurement.feature_maps import RandomKernels
from convsim_cli.measurement.kernel_figures import measure_layer
from convsim_cli.measurement.synthetic import LayerProbe, make_inputs


@pytest.mark.parametrize(("groups", "filters", "draws"), [(1, 64, 2), (2, 8, 16), (1, 200, 1), (16, 32, 32)])
def test_each_group_has_at_least_64_random_filters_and_each_layer_128(groups: int, filters: int, draws: int) -> None:
    kernel = Kernel("k", (filters, 2, 3, 3), groups)
    weights = list(RandomKernels(kernel)._weights(torch.zeros(())))
    assert [tuple(weight.shape) for weight in weights] == [kernel.shape] * draws
    assert abs(torch.stack(weights).mean()) < 0.1
    assert abs(torch.stack(weights).std() - 1) < 0.1


@pytest.mark.parametrize(("groups", "filters", "draws"), [(1, 8, 1), (1, 5, 2), (2, 4, 2)])
def test_chance_has_the_layers_shape_and_inputs(
    groups: int, filters: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_maps, "FEWEST", 8)
    monkeypatch.setattr(feature_maps, "FEWEST_PER_GROUP", 4)
    kernel = Kernel("k", (filters, 2, 3, 3), groups)
    images = make_inputs("natural", 2, 2 * groups, (8, 8))
    given: list[Tensor] = []

    def convolve(weight: Tensor) -> Tensor:
        given.append(weight)
        return nn.functional.conv2d(images, weight, stride=2, groups=groups)

    chance = RandomKernels(kernel, seed=3)
    chance.update(convolve, torch.zeros(()))
    each = [nn.functional.conv2d(images, w, stride=2, groups=groups).unflatten(1, (groups, -1)) for w in given]
    assert len(each) == draws
    joined = torch.cat(each, 2).flatten(1, 2)
    assert chance.fm_cos == pytest.approx(literal_map_figures(joined, groups)[0], rel=1e-4)
    ranks = [literal_effective_rank(literal_mean_cosines(draw[:, group])) for draw in each for group in range(groups)]
    assert chance.fm_rank() == pytest.approx(mean(ranks), rel=1e-4)


def test_the_seed_decides_and_the_kernels_are_not_the_values_of_the_inputs() -> None:
    kernel = Kernel("k", (64, 4, 3, 3))
    drawn = [list(RandomKernels(kernel, seed)._weights(torch.zeros(()))) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    inputs = make_inputs("white", 16, 4, (32, 32), seed=0).flatten()
    assert not torch.isclose(drawn[0][0].flatten()[0], inputs).any()


@pytest.mark.parametrize("inputs", ["white", "natural"])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (32, 3, 3, 3)])
def test_a_fresh_layer_is_as_similar_as_chance(shape: tuple[int, ...], inputs: str) -> None:
    kernel, probe, ratios = Kernel("k", shape), LayerProbe(inputs, samples=8), []
    for _ in range(3 if shape[1] == 3 else 1):  # few channels: the figure of one layer varies by a tenth by itself
        weight = nn.Conv2d(shape[1], shape[0], 3).weight.detach()
        record = measure_layer(kernel, weight, probe.look(kernel, weight))
        ratios.append((record["fm_cos"] / record["fm_cos_random"], record["fm_rank"] / record["fm_rank_random"]))
    for ratio in map(mean, zip(*ratios, strict=True)):
        assert 0.9 < ratio < 1.1


def test_the_formula_for_white_maps_is_not_the_chance_of_natural_inputs() -> None:
    kernel, weight = Kernel("k", (64, 64, 3, 3)), nn.Conv2d(64, 64, 3).weight.detach()
    formula = (2 / (torch.pi * 34 * 34)) ** 0.5
    found = LayerProbe("natural").look(kernel, weight).chance.fm_cos
    assert found is not None
    assert found > 4 * formula


def test_a_layer_with_too_many_pairs_has_chance_but_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "MOST_PAIRS", 150 * 150)
    monkeypatch.setattr(feature_maps, "_MOST", 100)
    kernel = Kernel("k", (160, 3, 3, 3))
    chance = RandomKernels(kernel)
    chance.update(lambda weight: nn.functional.conv2d(make_inputs("white", 2, 3, (8, 8)), weight), torch.zeros(()))
    assert chance.fm_cos is not None
    assert chance.fm_rank() is None
