from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from references import literal_correlation, literal_effective_rank, literal_fm_corr
from torch import nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, module_kernels
from convsim_cli.measurement import feature_maps
from convsim_cli.measurement.feature_maps import PaperSimilarity, RandomKernels
from convsim_cli.measurement.figures import FIGURES
from convsim_cli.measurement.network import fm_corr_by_layer, measure, record_feature_maps
from convsim_cli.minimize import minimize_


def nearly(record: dict[str, Any]) -> dict[str, Any]:
    """A record to compare with, up to the rounding of float32."""
    return {key: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for key, v in record.items()}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
    )


def test_with_a_network_each_convolutions_real_output_counts() -> None:
    model = network()
    images = torch.randn(4, 3, 16, 16)
    model.eval()
    with torch.no_grad():
        first = model[0](images)
        second = model[3](model[2](model[1](first)))
        third = model[4](second)
        maps = [first.clone(), second - model[3].bias.reshape(-1, 1, 1), third - model[4].bias.reshape(-1, 1, 1)]
        maps[0] = model[0](images)  # the in-place ReLU has not seen it
    records = measure(model, images, bn_statistics="stored")
    assert [record["name"] for record in records] == ["0.weight", "3.weight", "4.weight"]
    for record, expected, groups in zip(records, maps, (1, 2, 1), strict=True):
        reference = PaperSimilarity(groups)
        reference.update(expected)
        assert record["fm_cos"] == pytest.approx(reference.fm_cos, rel=1e-4)
        assert tuple(record)[-len(FIGURES) :] == tuple(figure.key for figure in FIGURES)


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


@pytest.mark.parametrize("bias", [False, True])
def test_calls_on_nothing_add_no_maps(bias: bool) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3)
            self.some, self.none = nn.Conv2d(8, 8, 3, bias=bias), nn.Conv2d(8, 4, 3, bias=bias)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.body(images)
            return self.some(maps[images.mean((1, 2, 3)) > 0]) + self.none(maps[:0]).sum()

    model, images = Heads(), torch.randn(6, 3, 8, 8)
    images -= images.mean((1, 2, 3), keepdim=True) + torch.tensor([1, -1, 1, -1, -1, 1]).reshape(-1, 1, 1, 1)
    body, some, none = measure(model, images.split(1))
    plain = nn.Sequential(model.body, model.some)
    assert body == {**nearly(measure(plain, images)[0]), "name": "body.weight"}
    assert some == {**nearly(measure(plain, images[[1, 3, 4]])[1]), "name": "some.weight"}
    assert [none[key] for key in ("fm_corr", "fm_rank", "fm_cos", "fm_inner2", "fm_corr_random", "dead")] == [
        None
    ] * 5 + [0]


@pytest.mark.parametrize("always", [False, True])
def test_a_users_hook_on_an_output_changes_no_figure_of_its_layer(always: bool) -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3)), torch.randn(4, 3, 9, 9)
    first, second = measure(model, images)
    hook = model[0].register_forward_hook(lambda _, __, output: output.abs() + output.mean(1, True), always_call=always)
    found = measure(model, images)
    assert found[0] == first
    assert found[1]["fm_corr"] != second["fm_corr"]  # it sees what the hook makes of the maps
    assert list(model[0]._forward_hooks) == [hook.id]


def test_chance_of_a_model_in_half_precision_stays_in_its_range() -> None:
    model, images = nn.Sequential(nn.Conv2d(64, 16, 3, bias=False)), 2000 * torch.randn(2, 64, 6, 6)
    exact, found = measure(model, images)[0], measure(model.half(), images.half())[0]
    assert found["fm_corr_random"] == pytest.approx(exact["fm_corr_random"], rel=1e-2)


def test_a_dead_filter_behind_a_bias_is_seen_as_dead() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    assert measure(layer, torch.randn(2, 3, 8, 8))[0]["dead"] == 1


def test_a_shared_weight_sees_the_maps_of_both_its_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    both = PaperSimilarity()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        first = model[0](images)
        both.update(first - model[0].bias.reshape(-1, 1, 1))
        both.update(model[1](first) - model[1].bias.reshape(-1, 1, 1))
    assert measure(model, images)[0]["fm_cos"] == pytest.approx(both.fm_cos, rel=1e-4)


def test_a_decoder_that_transposes_a_shared_weight_adds_no_maps() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)
            self.decoder.weight = self.encoder.weight

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.decoder(self.encoder(images))
            return decoded

    model, images = Tied(), torch.randn(2, 3, 8, 8)
    (found,), (expected,) = measure(model, images), measure(model.encoder, images)
    assert found["fm_cos"] == expected["fm_cos"]


def test_measuring_draws_no_random_numbers_and_keeps_no_buffer() -> None:
    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += torch.rand(1) + random.random() + np.random.rand()
            return super().forward(images)  # type: ignore[no-any-return]

    model, images = Counting(), torch.randn(2, 3, 8, 8)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measure(model, images)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert not model.calls.any()


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
    plain = record_feature_maps(model, [Kernel("0.weight", (6, 3, 3, 3))], [images])["0.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        found = record_feature_maps(model, [Kernel("0.weight", (6, 3, 3, 3))], [images])["0.weight"]
    assert found.fm_corr() == plain.fm_corr()
    assert found.chance is not None
    assert plain.chance is not None
    assert found.chance.figures([6])[0] == plain.chance.figures([6])[0]


def test_single_images_without_a_batch_axis_are_measured_as_one_batch() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.layer(image) for image in images])

    model, images = Single(), torch.randn(4, 3, 8, 8)
    found, expected = measure(model, images)[0], measure(model.layer, images)[0]
    for key in ("fm_cos", "fm_corr_random", "fm_inner2"):
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


def test_parametrized_layers_are_left_out_with_one_warning() -> None:
    layers = [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Conv2d(3, 4, 3))
    with pytest.warns(UserWarning, match=r"skips 0\.weight, 1\.weight \(parametrized") as caught:
        minimize_(model, 1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def _parametrized() -> dict[str, nn.Module]:
    return {
        "weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
        "spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
        "pruned": nn.utils.prune.l1_unstructured(nn.Conv2d(3, 6, 3), "weight", 0.5),
        "transposed": nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(3, 6, 3)),
    }


@pytest.mark.parametrize("kind", _parametrized())
def test_parametrized_layers_are_measured_by_their_computed_weight(kind: str) -> None:
    layer = _parametrized()[kind]
    images = torch.randn(2, 3, 9, 9)
    layer.eval()
    plain = nn.ConvTranspose2d(3, 6, 3) if kind == "transposed" else nn.Conv2d(3, 6, 3)
    layer(images)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer.train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameters, attributes, family = list(layer.named_parameters()), set(vars(layer)), type(layer)
    (found,), (expected,) = measure(nn.Sequential(layer), images), measure(nn.Sequential(plain), images)
    assert found == nearly(expected)
    assert found["fm_corr_random"] is not None
    assert type(layer) is family
    assert set(vars(layer)) == attributes
    assert [(name, id(value)) for name, value in layer.named_parameters()] == [(n, id(v)) for n, v in parameters]
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_lazy_layers_are_left_out_with_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    model.unused = nn.LazyConv2d(4, 3)
    model.forward = lambda images: model[0](images)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"unused\.weight \(lazy") as caught:
        (record,) = measure(model, torch.randn(1, 3, 9, 9))
    assert record["name"] == "0.weight"
    assert caught[0].filename == __file__


def test_chance_is_measured_under_the_layers_own_settings() -> None:
    layers = (
        nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="same", bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
    )
    for layer in layers:
        images = torch.randn(2, 4, 8, 8)
        (record,) = measure(layer, images, seed=5)
        kernel = module_kernels(layer).kernels[0]
        expected = RandomKernels(kernel, seed=5)
        twin = deepcopy(layer)
        twin.bias = None

        def convolve(weight: torch.Tensor, twin: nn.Module = twin, images: torch.Tensor = images) -> torch.Tensor:
            twin.load_state_dict({"weight": weight})
            with torch.no_grad():
                return twin(images)

        expected.update([convolve(weight) for weight in expected.weights(layer.weight)])
        each = [kernel.filters // kernel.groups] * kernel.groups
        assert record["fm_corr_random"] == pytest.approx(expected.figures(each)[0], rel=1e-5)
        assert record["fm_rank_random"] == pytest.approx(expected.figures(each)[1], rel=1e-5)


def test_chance_is_what_the_layers_own_forward_gives_for_random_kernels() -> None:
    class Same(nn.Conv2d):
        """A layer that pads by itself, as some of timm's do."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(nn.functional.pad(images, (3, 3, 3, 3)), self.weight, self.bias)

    images = torch.randn(2, 3, 8, 8)
    (found,), (expected,) = measure(Same(3, 8, 3), images), measure(nn.Conv2d(3, 8, 3, padding=3), images)
    assert found["fm_corr_random"] == pytest.approx(expected["fm_corr_random"], rel=1e-5)


def test_images_are_convolved_again_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = network(), torch.randn(5, 3, 16, 16)
    whole = measure(model, images)
    monkeypatch.setattr(feature_maps, "_MAP_ELEMENTS", 128 * 64 * 2)
    for record, expected in zip(measure(model, images), whole, strict=True):
        assert record == nearly(expected)


@pytest.mark.parametrize(
    "form",
    [
        lambda images: images,
        lambda images: images.split(2),
        lambda images: iter(images.split(2)),
        lambda images: [(part, torch.zeros(len(part))) for part in images.split(2)],
        lambda images: [[part, torch.zeros(len(part))] for part in images.split(2)],
        lambda images: [{"pixel_values": part, "labels": None} for part in images.split(2)],
        lambda images: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(4)), 2),
    ],
)
@pytest.mark.parametrize("bn_statistics", ["stored", "inputs"])
def test_batches_of_every_usual_form_are_taken(form: Callable[[torch.Tensor], Any], bn_statistics: str) -> None:
    model, images = network(), torch.randn(4, 3, 16, 16)
    expected = measure(model, images.split(2), bn_statistics=bn_statistics)
    if bn_statistics == "inputs" and isinstance(form(images), torch.Tensor):
        expected = measure(model, [images], bn_statistics=bn_statistics)
    for record, other in zip(measure(model, form(images), bn_statistics=bn_statistics), expected, strict=True):
        assert record == nearly(other)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([{"image": torch.zeros(1, 3, 8, 8)}], "batch 1: a dictionary with image; expected 'pixel_values'"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1).long()), r"batch 2: got torch.int64 \[1\]"),
        ([torch.zeros(1, 3, 8, 8), "x"], "batch 2: got str"),
        ([], "expected at least one batch"),
    ],
)
def test_batches_of_another_form_are_named(images: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure(nn.Sequential(nn.Conv2d(3, 4, 3)), images)


def test_the_mean_of_inputs_is_no_similarity() -> None:
    layer, noise = nn.Conv2d(3, 16, 3), torch.randn(8, 3, 24, 24)
    plain = measure(layer, 0.3 * noise)[0]
    for inputs in (3 + 0.3 * noise, 100 + noise):
        (record,) = measure(layer, inputs)
        with torch.no_grad():
            maps = nn.functional.conv2d(inputs.double(), layer.weight.double())
        expected = literal_correlation(maps)
        assert record["fm_corr"] == pytest.approx(literal_fm_corr(maps), rel=1e-3)
        assert record["fm_rank"] == pytest.approx(literal_effective_rank(expected), rel=1e-3)
        assert record["fm_corr"] == pytest.approx(plain["fm_corr"], rel=1e-2)
        assert (record["removable"], record["redundant"], record["dead"]) == (0, 0, 0)
        assert record["fm_cos"] > 0.8  # the paper's figure sees the means alone


def test_constants_on_biases_and_scaled_filters_move_no_figure_of_maps() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)), None
    images = torch.randn(4, 3, 12, 12) + 1
    before = measure(model, images, bn_statistics="inputs")
    with torch.no_grad():
        model[0].bias += torch.arange(6.0)
        model[0].weight *= torch.logspace(-0.3, 0.3, 6).reshape(-1, 1, 1, 1)
        model[3].bias -= 50
    moved = [figure.key for figure in FIGURES if figure.moves_with_scale]
    for record, former in zip(measure(model, images, bn_statistics="inputs"), before, strict=True):
        kept = {key: value for key, value in former.items() if key not in moved}
        found = {key: record[key] for key in kept}
        assert found == {k: pytest.approx(v, rel=2e-3) if isinstance(v, float) else v for k, v in kept.items()}


def test_only_the_layers_that_patterns_choose_are_measured() -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    assert [record["name"] for record in measure(model, images, exclude=["0.*"])] == ["3.weight", "4.weight"]
    assert [record["name"] for record in measure(model, images, include=["0.*"])] == ["0.weight"]
    with pytest.raises(InputError, match="matches no tensor"):
        measure(model, images, include=["5.*"])


def test_the_figure_alone_is_that_of_measure() -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    assert fm_corr_by_layer(model, images) == {r["name"]: r["fm_corr"] for r in measure(model, images)}


def test_one_batch_in_a_dictionary_is_measured_as_its_images() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 8, 8)
    assert measure(model, {"pixel_values": images}) == measure(model, images)
    with pytest.raises(InputError, match=r"for one batch \(images, labels\), pass \[batch\]"):
        measure(model, (images, torch.zeros(4, dtype=torch.long)))


def test_a_kernel_with_nan_is_named_and_not_the_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"0\.weight \[8, 3, 3, 3\]: 1 of 216 values is NaN or Inf"):
        measure(model, torch.randn(4, 3, 12, 12))
