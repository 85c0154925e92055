from __future__ import annotations

import warnings

import pytest
import torch
from references import literal_fm_corr, literal_map_figures
from torch import nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel
from convsim_cli.measurement import feature_maps, synthetic
from convsim_cli.measurement.kernel_figures import measure_layer
from convsim_cli.measurement.synthetic import LayerProbe, make_inputs


@pytest.mark.parametrize(("groups", "taps"), [(1, (3, 3)), (2, (5, 2)), (1, (4,)), (1, (2, 3, 2))])
def test_a_layer_alone_is_probed_under_full_padding(
    groups: int, taps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = layers[len(taps) - 1](4, 6, taps, groups=groups, padding=tuple(k - 1 for k in taps), bias=False)  # type: ignore[arg-type]
    kernel = Kernel("k", tuple(layer.weight.shape), groups)
    inputs = make_inputs("white", 16, 4, (8,) * len(taps), seed=3)
    with torch.no_grad():
        expected = literal_map_figures(layer(inputs), groups)
    monkeypatch.setattr(feature_maps, "_MAP_ELEMENTS", 6 * 400)  # several chunks
    found = LayerProbe("white", side=8, seed=3).look(kernel, layer.weight.detach()).paper
    assert (found.fm_cos, found.fm_inner2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e38), (torch.float32, 1e-38), (torch.float64, 1e-60)])
def test_a_layer_of_any_scale_is_probed(dtype: torch.dtype, scale: float) -> None:
    kernel, weight = Kernel("k", (4, 2, 3, 3)), torch.rand(4, 2, 3, 3, dtype=dtype)
    exact, found = (LayerProbe().look(kernel, w) for w in (weight, weight * scale))
    assert found.paper.fm_cos == pytest.approx(exact.paper.fm_cos, rel=1e-5)
    assert found.fm_corr() == pytest.approx(exact.fm_corr(), rel=1e-5)
    assert found.alive.all()
    assert found.paper.fm_inner2 == pytest.approx(exact.paper.fm_inner2 * scale**4, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    kernel, weight = Kernel("k", (8, 4, 3, 3)), torch.randn(8, 4, 3, 3).to(dtype)
    same = (measure_layer(kernel, each, LayerProbe(samples=2).look(kernel, each)) for each in (weight, weight.float()))
    assert next(same) == next(same)


def test_a_figure_beyond_float64_is_null() -> None:
    kernel, weight = Kernel("k", (4, 2, 3, 3)), torch.rand(4, 2, 3, 3, dtype=torch.float64)
    found = LayerProbe(samples=2).look(kernel, weight * 1e200).paper
    assert found.fm_inner2 is None
    assert found.fm_cos == LayerProbe(samples=2).look(kernel, weight).paper.fm_cos


def test_inputs_of_a_single_natural_pixel_are_zero_and_give_null() -> None:
    assert LayerProbe("natural", side=1).fm_corr(Kernel("k", (4, 2, 3, 3)), torch.rand(4, 2, 3, 3)) is None


def test_fm_corr_alone_is_that_of_the_whole_record() -> None:
    kernel, weight = Kernel("k", (6, 2, 3, 3)), torch.randn(6, 2, 3, 3)
    weight[1] *= 1e-9
    probe = LayerProbe("natural", samples=3)
    assert probe.fm_corr(kernel, weight) == probe.look(kernel, weight).fm_corr()
    alive = weight.clone()
    alive[1] = torch.randn(2, 3, 3)
    living = torch.tensor([[True, False, True, True, True, True]])
    assert probe.fm_corr(kernel, alive, living) == pytest.approx(probe.fm_corr(kernel, weight), rel=1e-5)


def test_inputs_are_made_once_for_layers_that_take_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(synthetic, "make_inputs", lambda *how: made.append(how[2]) or make_inputs(*how))
    probe = LayerProbe("natural", samples=1, side=4)
    for channels in (2, 2, 3):
        kernel = Kernel("k", (4, channels, 3, 3))
        probe.fm_corr(kernel, torch.randn(kernel.shape))
        probe.look(kernel, torch.randn(kernel.shape))
    assert made == [2, 3]


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("name", ["white", "uniform", "natural", "features"])
def test_inputs_that_are_too_large_together_are_the_same_ones(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, weight, made = Kernel("k", (6, channels, 3, 3)), torch.randn(6, channels, 3, 3), []
    whole = LayerProbe(name, samples=7, side=8, seed=2).look(kernel, weight)
    monkeypatch.setattr(synthetic, "_KEPT", 5 * 8 * 64)
    monkeypatch.setattr(synthetic, "_MADE_AT_ONCE", 2 * 8 * 64)
    monkeypatch.setattr(synthetic, "make_inputs", lambda *how: made.append(how[1]) or make_inputs(*how))
    parts = LayerProbe(name, samples=7, side=8, seed=2).look(kernel, weight)
    assert made == ([7] if channels == 3 else [2, 2, 2, 1] * 2)  # once more for chance
    for key in ("correlation", "fm_corr"):
        torch.testing.assert_close(getattr(parts, key)(), getattr(whole, key)(), rtol=1e-5, atol=1e-6)
    assert parts.chance.figures([6]) == pytest.approx(whole.chance.figures([6]), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 300_000, 1, 2), (300_000, 2, 1, 1)])
def test_a_layer_of_which_one_input_takes_gigabytes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"k \[.*\]: one input and its maps would take 1\.[23] GB; lower `input_size`"):
        LayerProbe().look(Kernel("k", shape), torch.ones(shape))
    small = LayerProbe(side=1).fm_corr(Kernel("k", (2, 300_000, 1, 2)), torch.ones(2, 300_000, 1, 2))
    assert small == pytest.approx(1)


def test_features_are_rectified_and_scaled_by_the_batch_norm_before() -> None:
    weight = torch.randn(10, 4, 3, 3)
    kernel, noise = Kernel("k", (10, 4, 3, 3), 2), make_inputs("natural", 3, 8, (12, 12), seed=1)
    gain, shift = torch.rand(8) + 0.5, torch.randn(8)
    probe = LayerProbe("features", samples=3, side=12, seed=1)
    for norm, inputs in (
        (None, noise.relu()),
        ((gain, shift), (noise * gain.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)).relu()),
    ):
        maps = nn.functional.conv2d(inputs, weight, padding=1, groups=2)
        assert probe.look(kernel, weight, norm).fm_corr() == pytest.approx(literal_fm_corr(maps, 2), rel=1e-4)


@pytest.mark.parametrize("taps", [(4,), (2, 4), (3, 6), (2, 3, 4)])
def test_features_of_even_kernels_have_the_padding_same(taps: tuple[int, ...]) -> None:
    weight, noise = torch.randn(4, 2, *taps), make_inputs("natural", 3, 4, (9,) * len(taps), seed=1)
    torch.set_warn_always(True)  # of even kernels torch warns once, and a warning is an error here
    try:
        found = LayerProbe("features", samples=3, side=9, seed=1).fm_corr(Kernel("k", tuple(weight.shape), 2), weight)
    finally:
        torch.set_warn_always(False)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(taps) - 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        maps = convolve(noise.relu(), weight, padding="same", groups=2)
    assert found == pytest.approx(literal_fm_corr(maps, 2), rel=1e-4)


def test_first_layers_features_have_the_correlated_channels_of_photographs() -> None:
    kernel, weight = Kernel("k", (3, 3, 1, 1)), torch.eye(3).reshape(3, 3, 1, 1)
    found = LayerProbe("features", samples=64).look(kernel, weight).correlation()[0]
    assert found[~torch.eye(3, dtype=torch.bool)].mean() == pytest.approx(0.85, abs=0.01)
    gray = LayerProbe("features", samples=64).look(Kernel("k", (2, 1, 1, 1)), torch.ones(2, 1, 1, 1))
    assert gray.moments.mean.abs().max() < 1e-3 < 0.9 < gray.moments.variance.min()


def test_chance_is_that_of_the_batch_norm_before_each_layer() -> None:
    kernel, probe = Kernel("k", (8, 8, 3, 3)), LayerProbe("features", samples=2)
    norms = (torch.ones(8), torch.zeros(8)), (torch.ones(8), torch.linspace(-4, 4, 8))
    first, second = (probe.look(kernel, torch.randn(8, 8, 3, 3), norm).chance.figures([8]) for norm in norms)
    assert first != second
    assert first == probe.look(kernel, torch.randn(8, 8, 3, 3)).chance.figures([8])
