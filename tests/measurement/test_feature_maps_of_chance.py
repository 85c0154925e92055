from __future__ import annotations

from statistics import mean

import pytest
import torch
from references import literal_correlation, literal_effective_rank, literal_fm_corr
from torch import nn

from convsim_cli.kernels import Kernel
from convsim_cli.measurement import feature_maps
from convsim_cli.measurement.feature_maps import RandomKernels
from convsim_cli.measurement.kernel_figures import measure_layer
from convsim_cli.measurement.synthetic import LayerProbe, make_inputs


@pytest.mark.parametrize(("groups", "filters", "draws"), [(1, 64, 2), (2, 8, 16), (1, 200, 1), (16, 32, 32)])
def test_each_group_has_at_least_64_random_filters_and_each_layer_128(groups: int, filters: int, draws: int) -> None:
    kernel = Kernel("k", (filters, 2, 3, 3), groups)
    weights = RandomKernels(kernel).weights(torch.zeros(()))
    assert [tuple(weight.shape) for weight in weights] == [kernel.shape] * draws
    assert abs(torch.stack(weights).mean()) < 0.025
    assert abs(torch.stack(weights).std() - 0.25) < 0.025  # filters of 18 weights: the power of two nearest to 1/√18


@pytest.mark.parametrize(("groups", "filters", "draws"), [(1, 8, 1), (1, 5, 2), (2, 4, 2)])
def test_chance_has_the_layers_shape_and_inputs(
    groups: int, filters: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_maps, "FEWEST", 8)
    monkeypatch.setattr(feature_maps, "FEWEST_PER_GROUP", 4)
    kernel = Kernel("k", (filters, 2, 3, 3), groups)
    images = make_inputs("natural", 2, 2 * groups, (8, 8))
    chance = RandomKernels(kernel, seed=3)
    maps = [nn.functional.conv2d(images, w, stride=2, groups=groups) for w in chance.weights(torch.zeros(()))]
    for part in range(2):
        chance.update([draw[part : part + 1] for draw in maps])
    each = [draw.unflatten(1, (groups, -1)) for draw in maps]
    assert len(each) == draws
    joined = torch.cat(each, 2).flatten(1, 2)
    assert chance.figures([1] * groups)[0] == pytest.approx(literal_fm_corr(joined, groups), rel=1e-4)
    living = [filters // groups - group for group in range(groups)]  # as many random filters as living ones
    ranks = [
        literal_effective_rank(literal_correlation(draw[:, group, :count]))
        for draw in each
        for group, count in enumerate(living)
    ]
    assert chance.figures(living)[1] == pytest.approx(mean(ranks), rel=1e-4)


def test_the_seed_decides_and_the_kernels_are_not_the_values_of_the_inputs() -> None:
    kernel = Kernel("k", (64, 4, 3, 3))
    drawn = [RandomKernels(kernel, seed).weights(torch.zeros(())) for seed in (0, 0, 1)]
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
        ratios.append((record["fm_corr"] / record["fm_corr_random"], record["fm_rank"] / record["fm_rank_random"]))
    for ratio in map(mean, zip(*ratios, strict=True)):
        assert 0.9 < ratio < 1.1


def test_the_formula_for_white_maps_is_not_the_chance_of_natural_inputs() -> None:
    kernel, weight = Kernel("k", (64, 64, 3, 3)), nn.Conv2d(64, 64, 3).weight.detach()
    formula = (2 / (torch.pi * 16 * 34 * 34)) ** 0.5
    found = LayerProbe("natural").look(kernel, weight).chance.figures([64])[0]
    assert found is not None
    assert found > 4 * formula


def test_random_kernels_are_drawn_once_and_a_dead_layer_has_no_rank() -> None:
    chance = RandomKernels(Kernel("k", (8, 2, 3, 3)))
    first, again = chance.weights(torch.zeros(())), chance.weights(torch.zeros(()))
    assert all(one is other for one, other in zip(first, again, strict=True))
    chance.update([torch.randn(2, 8, 4, 4) for _ in first])
    assert chance.figures([0])[1] is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torchs_defaults_of_type_and_device_change_no_figure(device: str) -> None:
    kernel, weight = Kernel("k", (8, 2, 3, 3)), torch.randn(8, 2, 3, 3)
    expected = measure_layer(kernel, weight, LayerProbe("natural", samples=2).look(kernel, weight))
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device(device)
        found = measure_layer(kernel, weight, LayerProbe("natural", samples=2).look(kernel, weight))
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
    assert found == expected


def test_chance_is_taken_once_for_layers_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, probe, updates = Kernel("k", (8, 2, 3, 3)), LayerProbe("natural", samples=2), []
    update = RandomKernels.update
    monkeypatch.setattr(RandomKernels, "update", lambda self, maps: updates.append(1) or update(self, maps))
    first, second = (probe.look(kernel, torch.randn(8, 2, 3, 3)).chance.figures([8])[0] for _ in range(2))
    assert (
        first == second == LayerProbe("natural", samples=2).look(kernel, torch.randn(8, 2, 3, 3)).chance.figures([8])[0]
    )
    assert len(updates) == 2
