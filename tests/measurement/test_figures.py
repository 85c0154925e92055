from __future__ import annotations

from itertools import combinations

import pytest
import torch
from references import literal_normalized_similarity, literal_similarity
from torch import nn

from convsim_cli import ConvSimPenalty, measure, minimize_
from convsim_cli.kernels import Kernel
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity
from convsim_cli.measurement.figures import FIGURES, kernel_figures
from convsim_cli.measurement.network import feature_maps


def test_kernel_figures_match_their_definitions() -> None:
    weight = torch.randn(6, 3, 3, 2)
    found = kernel_figures(Kernel("k", (6, 3, 3, 2), 2), weight)
    exact = weight.double()
    cosines = [
        nn.functional.cosine_similarity(group[i].flatten(), group[j].flatten(), dim=0).abs()
        for group in exact.chunk(2)
        for i, j in combinations(range(3), 2)
    ]
    assert found["cs"] == pytest.approx(literal_similarity(exact, 2).item(), rel=1e-12)
    assert found["ncs"] == pytest.approx(literal_normalized_similarity(exact, 2).item(), rel=1e-12)
    assert found["kernel_cos"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-12)
    assert found["norm"] == pytest.approx(exact.norm().item(), rel=1e-12)
    assert found["zero"] == 0


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_kernel_figures_hold_at_the_ends_of_float32(scale: float) -> None:
    weight = torch.randn(4, 2, 3, 3) * scale / 4
    found = kernel_figures(Kernel("k", (4, 2, 3, 3)), weight)
    assert found["cs"] == pytest.approx(literal_similarity(weight.double()).item(), rel=1e-10)
    assert found["ncs"] == pytest.approx(literal_normalized_similarity(weight.double()).item(), rel=1e-6)


def test_null_stands_where_no_number_can_be_given_and_nan_never() -> None:
    weight = torch.zeros(3, 2, 3, 3)
    weight[0] = 1
    found = kernel_figures(Kernel("k", (3, 2, 3, 3)), weight)
    assert found == {"cs": 0.0, "ncs": None, "kernel_cos": None, "norm": pytest.approx(18**0.5), "zero": 2}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernel_figures_leave_a_float64_weight_alone(layout: torch.memory_format) -> None:
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64).to(memory_format=layout)
    before = weight.clone()
    kernel_figures(Kernel("k", (6, 3, 3, 3)), weight)
    assert torch.equal(weight, before)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
    )


def test_with_a_network_each_convolutions_real_output_without_its_bias_counts() -> None:
    model = network()
    images = torch.randn(4, 3, 16, 16)
    model.eval()
    with torch.no_grad():
        first = model[0](images)
        second = model[3](model[2](model[1](first)))
        third = model[4](second)
        maps = [first.clone(), second - model[3].bias.reshape(-1, 1, 1), third - model[4].bias.reshape(-1, 1, 1)]
        maps[0] = model[0](images)  # the in-place ReLU has not seen it
    records = measure(model, images)
    assert [record["name"] for record in records] == ["0.weight", "3.weight", "4.weight"]
    for record, expected, groups in zip(records, maps, (1, 2, 1), strict=True):
        reference = FeatureMapSimilarity(groups)
        reference.update(expected)
        assert record["fm_cos"] == pytest.approx(reference.result()["fm_cos"], rel=1e-4)
        assert tuple(record)[-len(FIGURES) :] == FIGURES


def test_measuring_leaves_the_network_as_it_was() -> None:
    model = network()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)])
    assert [layer.training for layer in model] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model)
    assert model[3].bias is not None
    assert model[3].bias.requires_grad


def test_batches_add_up_and_layers_that_are_never_called_have_null_figures() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.used(images)
            return result

    model, images = Partial(), torch.randn(6, 3, 8, 8)
    whole, parts = measure(model, images), measure(model, images.split(4))
    assert whole[0]["fm_cos"] == pytest.approx(parts[0]["fm_cos"], rel=1e-6)
    assert whole[1]["fm_cos"] is None
    assert whole[1]["dead"] == 0


def test_a_dead_filter_behind_a_bias_is_seen_as_dead() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    assert measure(layer, torch.randn(2, 3, 8, 8))[0]["dead"] == 1


def test_a_shared_weight_sees_the_maps_of_both_its_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    both = FeatureMapSimilarity()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        first = model[0](images)
        both.update(first - model[0].bias.reshape(-1, 1, 1))
        both.update(model[1](first) - model[1].bias.reshape(-1, 1, 1))
    assert measure(model, images)[0]["fm_cos"] == pytest.approx(both.result()["fm_cos"], rel=1e-4)


def test_layers_called_by_keyword_or_with_an_output_size_are_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 3, 3, stride=2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.up(input=self.down(input=images), output_size=[8, 8])
            return result

    assert all(record["fm_cos"] is not None for record in measure(Keyword(), torch.randn(2, 3, 8, 8)))


def test_autocast_outside_does_not_reach_the_measurement() -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    plain = feature_maps(model, [Kernel("0.weight", (6, 3, 3, 3))], [images])["0.weight"].result()
    with torch.autocast("cpu", torch.bfloat16):
        assert feature_maps(model, [Kernel("0.weight", (6, 3, 3, 3))], [images])["0.weight"].result() == plain


def test_single_images_without_a_batch_axis_are_measured_as_one_batch() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.layer(image) for image in images])

    model, images = Single(), torch.randn(4, 3, 8, 8)
    found, expected = measure(model, images)[0], measure(model.layer, images)[0]
    for key in ("fm_cos", "fm_cos_random", "fm_inner2"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_what_a_model_keeps_from_being_measured_can_be_trained_with() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale, self.kept = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(1)), None

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps: torch.Tensor = self.layer(images)
            if self.kept is None:
                self.kept = torch.linspace(0, 1, maps.shape[-1])  # type: ignore[assignment]
            return maps * (self.kept * self.scale)

    model, images = Keeping(), torch.randn(2, 3, 8, 8)
    measure(model, images)
    model(images).sum().backward()
    assert model.scale.grad is not None


def test_a_model_compiled_in_place_and_warm_is_measured() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    expected = measure(model, images)
    model.compile(backend="eager")
    with torch.no_grad():
        model(images)
    assert measure(model, images) == expected


def test_a_parameter_registered_under_a_second_name_is_still_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_parameter("kernel", model[0].weight)
    record = measure(model, torch.randn(2, 3, 8, 8))[0]
    assert record["name"] == "0.weight"
    assert record["fm_cos"] is not None


def test_parametrized_layers_are_left_out_of_the_library_with_one_warning() -> None:
    layers = [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Conv2d(3, 4, 3))
    for call in (
        lambda: measure(model, torch.randn(1, 3, 9, 9)),
        lambda: minimize_(model, 1),
        lambda: ConvSimPenalty(model),
    ):
        with pytest.warns(UserWarning, match=r"leaves out 0\.weight, 1\.weight \(parametrized") as caught:
            call()
        assert len(caught) == 1
        assert caught[0].filename == __file__
