from __future__ import annotations

import math

import pytest
import torch
from conftest import same_bits
from references import literal_dct
from torch import Tensor, nn

from convsim_cli import dct_, measure
from convsim_cli.closed_forms import dct_kernel, dct_method, dct_weight_, orthogonalize_weight_
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.kernels import Kernel
from convsim_cli.measurement.kernel_figures import measure_weight
from convsim_cli.similarity import convolutional_similarity

SHAPES = [  # and groups
    ((18, 4, 3, 3), 1),
    ((20, 4, 3, 3), 1),  # two patterns take one more
    ((4, 8, 3, 3), 1),  # fewer filters than patterns
    ((24, 2, 3, 2), 2),
    ((14, 4, 5), 1),
    ((15, 5, 2, 2, 3), 1),
    ((12, 1, 2, 2), 3),  # several filters of one channel per group: not three channels of a photograph
    ((2, 6, 7, 7), 1),
]


def orthogonal(rows: Tensor) -> bool:
    rows = nn.functional.normalize(rows.double().flatten(1))
    return torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-6)


def summed_power_spectrum(weight: Tensor) -> Tensor:
    """Σ_i Σ_c |FFT(K_i[c])|² at every frequency of a grid."""
    axes = tuple(range(2, weight.ndim))
    return torch.fft.fftn(weight.double(), s=[16] * len(axes), dim=axes).abs().square().sum((0, 1))


def patterns_of(weight: Tensor) -> list[int]:
    """The number of spatial patterns that each filter has."""
    return [int(torch.linalg.matrix_rank(filter.double().flatten(1), rtol=1e-5)) for filter in weight]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_the_kernels_are_those_of_the_literal_assignment(shape: tuple[int, ...], groups: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected = literal_dct(weight, groups)
    torch.testing.assert_close(dct_weight_(weight, groups), expected, rtol=1e-9, atol=1e-12)


def test_three_channels_of_few_filters_are_like_any_others() -> None:
    weight = torch.randn(27, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(dct_weight_(weight.clone()), literal_dct(weight), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("shape", [(28, 3, 3, 3), (40, 3, 3, 3), (24, 3, 2, 2)], ids=str)
def test_three_channels_of_many_filters_are_those_of_photographs(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected = literal_dct(weight, photographs=True)
    torch.testing.assert_close(dct_weight_(weight), expected, rtol=1e-7, atol=1e-10)
    grouped = torch.randn(12, 3, 2, 2, dtype=torch.float64)  # 3 channels of many
    torch.testing.assert_close(dct_weight_(grouped.clone(), 2), literal_dct(grouped, 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("taps", [(3, 3), (7,), (2, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("channels", [3, 8])
def test_the_summed_power_spectrum_is_flat_where_patterns_divide_filters(taps: tuple[int, ...], channels: int) -> None:
    weight = torch.randn(2 * math.prod(taps), channels, *taps, dtype=torch.float64)
    weight /= weight.flatten(1).norm(dim=1).reshape(-1, 1, *[1] * len(taps))
    spectrum = summed_power_spectrum(weight)
    assert spectrum.max() > 1.05 * spectrum.min()
    spectrum = summed_power_spectrum(dct_weight_(weight))
    torch.testing.assert_close(spectrum, torch.full_like(spectrum, 2 * math.prod(taps)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("taps", [(3, 3), (5,), (2, 2, 2), (7, 7)], ids=str)
def test_kernels_are_orthogonal_up_to_as_many_as_there_are_directions(taps: tuple[int, ...]) -> None:
    for filters in (2, 2 * math.prod(taps) + 1, 4 * math.prod(taps)):
        found = dct_weight_(torch.randn(filters, 4, *taps))
        assert orthogonal(found)
        assert patterns_of(found) == [1] * filters


@pytest.mark.parametrize("channels", [3, 4])
def test_every_filter_keeps_its_norm(channels: int) -> None:
    weight = torch.randn(16, channels, 3, 3) * torch.logspace(-2, 2, 16).reshape(-1, 1, 1, 1)
    found = dct_weight_(weight.clone())
    torch.testing.assert_close(found.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-6, atol=0)


def test_normalized_similarity_falls_as_500_iterations_make_it_fall() -> None:
    kernel, weight = Kernel("k", (64, 64, 3, 3)), nn.Conv2d(64, 64, 3).weight.detach()
    assert measure_weight(kernel, weight)["ncs"] > 0.99
    assert measure_weight(kernel, dct_weight_(weight))["ncs"] < 0.963  # 500 iterations: 0.958


@pytest.mark.parametrize(("shape", "groups"), [((6, 4, 1, 1), 1), ((6, 4, 1), 2), ((12, 2, 2, 2), 1)], ids=str)
def test_one_tap_and_more_filters_than_directions_are_orthogonal(shape: tuple[int, ...], groups: int) -> None:
    weight = torch.randn(shape)
    assert dct_method(Kernel("k", shape, groups)) == "orthogonal"
    assert torch.equal(dct_weight_(weight.clone(), groups), orthogonalize_weight_(weight.clone(), groups))


@pytest.mark.parametrize(("channels", "taps"), [(1, 2), (2, 2), (1, 3)])
def test_many_filters_of_few_taps_stay_as_different_as_they_were(channels: int, taps: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(channels, 32, taps, padding=1, bias=False)
    inputs = torch.randn(16, channels, 256)
    (before,) = measure(nn.Sequential(layer), inputs)
    dct_weight_(layer.weight.data)
    (after,) = measure(nn.Sequential(layer), inputs)
    assert after["fm_corr"] < before["fm_corr"] + 0.01
    assert after["fm_rank"] > before["fm_rank"] - 0.01
    assert after["removable"] <= before["removable"] + 1


@pytest.mark.parametrize(
    ("kernel", "method"),
    [
        (Kernel("k", (36, 4, 3, 3)), "dct"),
        (Kernel("k", (37, 4, 3, 3)), "orthogonal"),
        (Kernel("k", (64, 3, 3, 3)), "dct"),
        (Kernel("k", (64, 1, 3, 3)), "orthogonal"),
        (Kernel("k", (6, 8, 2, 2), groups=3, transposed=True), "dct"),  # 8 filters in each group, of 2 channels
        (Kernel("k", (6, 9, 2, 2), groups=3, transposed=True), "orthogonal"),
        (Kernel("k", (36, 4, 3, 3), groups=3), "dct"),
        (Kernel("k", (8, 8, 1, 1)), "orthogonal"),
    ],
    ids=str,
)
def test_the_method_of_a_layer_follows_from_its_shape(kernel: Kernel, method: str) -> None:
    assert dct_method(kernel) == method


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 1e-38, 1e-10])
def test_dead_filters_stay_bit_identical_and_change_nothing(share: float, dtype: torch.dtype, channels: int) -> None:
    weight = torch.randn(20, channels, 3, 3, dtype=torch.float64)
    weight[[2, 5]] *= share
    weight = weight.to(dtype)
    found = dct_weight_(weight.clone())
    assert same_bits(found[[2, 5]], weight[[2, 5]])
    living = [index for index in range(20) if index not in (2, 5)]
    torch.testing.assert_close(found[living], dct_weight_(weight[living].clone()))


def test_filters_that_lack_a_pattern_get_orthogonal_weights_in_it() -> None:
    weight = torch.randn(18, 4, 1, 1).expand(18, 4, 3, 3).contiguous()  # constant: all but the mean have no share
    weight[[3, 7, 9]] = weight[1].clone()
    found = dct_weight_(weight.clone())
    assert orthogonal(found)
    assert torch.equal(found, dct_weight_(weight.clone()))
    torch.manual_seed(5)
    assert torch.equal(found, dct_weight_(weight.clone()))


def test_equal_filters_of_three_channels_all_get_a_direction() -> None:
    weight = torch.randn(1, 3, 1, 1).expand(45, 3, 3, 3).contiguous()
    found = dct_weight_(weight.clone())
    assert found.isfinite().all()
    assert patterns_of(found) == [1] * 45
    torch.testing.assert_close(found.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    assert torch.linalg.matrix_rank(found.double().flatten(1), rtol=1e-5) == 27


def test_a_filter_without_a_pattern_among_others_gets_a_direction() -> None:
    weight = torch.randn(45, 3, 3, 3)
    weight[:10] = torch.randn(10, 3, 1, 1)  # a pattern takes five
    assert patterns_of(dct_weight_(weight.clone())) == [1] * 45
    assert not (dct_weight_(weight.clone()) == weight).flatten(1).all(1).any()


def test_rounding_of_equal_shares_does_not_change_the_assignment() -> None:
    weight = torch.randn(18, 4, 1, 1, dtype=torch.float64).expand(18, 4, 3, 3).contiguous()
    moved = weight * (1 + 1e-9 * torch.randn(18, 4, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(dct_weight_(moved), dct_weight_(weight), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float64_and_cast_back(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 4, 3, 3).to(dtype)
    assert torch.equal(dct_kernel(Kernel("k", (12, 4, 3, 3)), weight), literal_dct(weight).float().to(dtype))


def test_the_scale_of_a_layer_does_not_matter() -> None:
    weight = torch.randn(12, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(1e-30 * dct_weight_(weight.clone()), dct_weight_(1e-30 * weight), rtol=1e-9, atol=0)


def test_filters_without_pairs_are_left_alone_with_a_warning() -> None:
    weight = torch.randn(4, 1, 3, 3)
    with pytest.warns(UserWarning, match="depthwise: one filter per group, no pairs"):
        assert torch.equal(dct_weight_(weight.clone(), 4), weight)


def test_a_weight_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 to 5 axes, none of them empty, got torch.float32 \[3\]"):
        dct_weight_(torch.randn(3))
    with pytest.raises(ValueError, match="2 groups do not divide the 3 filters"):
        dct_weight_(torch.randn(3, 2, 3), groups=2)
    with pytest.raises(InputError, match="1 of 12 values"):
        dct_weight_(torch.tensor([[[1.0, 2, 3], [4, 5, 6]], [[1, torch.inf, 3], [3, 2, 1]]]))


def test_a_model_is_changed_layer_by_layer_with_a_record_of_each() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3),
        nn.Conv2d(40, 8, 1),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ConvTranspose2d(12, 6, 2),
        nn.Conv2d(6, 64, 2),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[int] = []
    with pytest.warns(ConvsimWarning, match=r"skips 3\.weight \(depthwise: one filter per group, no pairs\)$"):
        records = dct_(model, exclude=["5.*"], advance=told.append)
    assert {record["name"]: record["method"] for record in records} == {
        "0.weight": "dct",
        "1.weight": "orthogonal",
        "2.weight": "dct",
        "4.weight": "dct",
    }
    assert told == [1, 1, 1, 1]
    after = model.state_dict()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {record["name"] for record in records}
    torch.testing.assert_close(after["2.weight"], literal_dct(before["2.weight"], 2).float())
    transposed = literal_dct(before["4.weight"].transpose(0, 1)).transpose(0, 1).float()
    torch.testing.assert_close(after["4.weight"], transposed)
    for record in records:
        assert record["after"]["norm"] == pytest.approx(record["before"]["norm"], rel=1e-6)
    assert convolutional_similarity(after["0.weight"]) < convolutional_similarity(before["0.weight"])


def test_a_model_is_untouched_when_one_layer_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"1\.weight .* 1 of 288 values"):
        dct_(model)
    assert torch.equal(model[0].weight, before)
