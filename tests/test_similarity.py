from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import (
    literal_similarity,
    pairwise_similarity,
    similarity_by_convolution,
)
from torch import Tensor

from convsim_cli import similarity
from convsim_cli.similarity import (
    convolutional_similarity,
    fft_shape,
    power_spectra,
    similarity_gradient,
    spectra,
    to_filters,
    unit_impulse,
)

TAPS = [(1,), (2,), (3,), (5,), (7,), (1, 1), (2, 2), (3, 1), (3, 3), (5, 3), (4, 2), (1, 1, 1), (2, 3, 2)]
LAYERS = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (3, 2, 1), (5, 3, 1), (4, 1, 2), (4, 2, 2), (3, 1, 3)]


@pytest.fixture(params=[None, False, True], ids=["by cost", "Gram", "FFT"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(similarity, "fft_is_cheaper", lambda *_: request.param)


def relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item()
    return (found - expected).norm().item() / scale if scale else found.norm().item()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("taps", TAPS, ids=str)
@pytest.mark.parametrize(("filters", "channels", "groups"), LAYERS)
def test_value_and_gradient_match_the_literal_equation_10(
    taps: tuple[int, ...], filters: int, channels: int, groups: int
) -> None:
    weight = torch.randn(filters, channels, *taps, dtype=torch.float64, requires_grad=True)
    expected = literal_similarity(weight, groups)
    value = convolutional_similarity(weight, groups)
    assert relative(value, expected) < 1e-10
    expected_gradient = torch.zeros_like(weight)
    if expected.requires_grad:  # a single filter has no pairs, and no graph
        (expected_gradient,) = torch.autograd.grad(expected, weight)
    (gradient,) = torch.autograd.grad(value, weight)
    assert relative(gradient, expected_gradient) < 1e-10


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("taps", [(3,), (2, 2), (3, 1), (2, 1, 2)], ids=str)
def test_first_and_second_derivatives_pass_torchs_own_checks(taps: tuple[int, ...]) -> None:
    weight = torch.randn(4, 2, *taps, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: convolutional_similarity(w, 2), weight)
    assert torch.autograd.gradgradcheck(lambda w: convolutional_similarity(w, 2), weight)


@pytest.mark.slow
@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("count", [2, 20])
def test_float32_holds_when_one_filter_is_a_million_times_larger(count: int) -> None:
    weight = torch.randn(count, 3, 3, 3) * torch.logspace(-3, 3, count).reshape(-1, 1, 1, 1)
    weight = weight[torch.randperm(count)].requires_grad_()
    expected, expected_gradient = pairwise_similarity(weight.detach())
    value = convolutional_similarity(weight)
    value.backward()
    assert weight.grad is not None
    assert relative(value.double(), expected) < 1e-5
    for found, exact in zip(weight.grad.double(), expected_gradient, strict=True):
        assert relative(found, exact) < 1e-5


def test_both_routes_and_both_layouts_give_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 8, 5, 5, dtype=torch.float64)
    values = []
    for cheaper in (True, False):
        monkeypatch.setattr(similarity, "fft_is_cheaper", lambda *_, cheaper=cheaper: cheaper)
        values += [
            convolutional_similarity(weight),
            convolutional_similarity(weight.contiguous(memory_format=torch.channels_last)),
        ]
    assert all(relative(value, values[0]) < 1e-12 for value in values)


@pytest.mark.parametrize("size", [1, 3])
def test_a_gradient_is_laid_out_as_the_filters_are(size: int) -> None:
    filters = torch.randn(2, 6, size * size, 5, dtype=torch.float64)
    taps_last = filters.mT.contiguous().mT  # the view of a contiguous weight
    found, expected = (similarity_gradient(each, (size, size)) for each in (taps_last, filters))
    assert found.mT.is_contiguous()
    assert expected.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 4, 7, 2), (6, 4, 5)])
def test_a_gradient_that_is_written_to_given_memory_is_the_same(shape: tuple[int, ...]) -> None:
    filters, taps = to_filters(torch.randn(shape), 2)
    given = torch.full_like(filters, float("nan"))
    assert similarity_gradient(filters, taps, out=given).data_ptr() == given.data_ptr()
    assert torch.equal(given, similarity_gradient(filters, taps))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("taps", [(13,), (31,), (64,), (7, 7), (11, 3), (8, 6), (17, 2), (4, 3, 5)], ids=str)
@pytest.mark.parametrize(("filters", "groups"), [(2, 1), (4, 2)])
def test_large_kernels_match_the_sum_over_lags_of_equation_10(taps: tuple[int, ...], filters: int, groups: int) -> None:
    weight = torch.randn(filters, 2, *taps, dtype=torch.float64, requires_grad=True)
    expected = similarity_by_convolution(weight, groups)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    value = convolutional_similarity(weight, groups)
    (gradient,) = torch.autograd.grad(value, weight)
    assert relative(value, expected) < 1e-10
    assert relative(gradient, expected_gradient) < 1e-10


@given(st.lists(st.integers(1, 400), min_size=1, max_size=3).map(tuple))
def test_an_fft_has_the_smallest_5_smooth_length_that_holds_all_lags(taps: tuple[int, ...]) -> None:
    smooth = [2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6)]
    assert fft_shape(taps) == tuple(min(length for length in smooth if length >= 2 * k - 1) for k in taps)


@pytest.mark.parametrize("taps", [(1,), (2,), (5,), (31,), (3, 4), (7, 7), (2, 3, 2)], ids=str)
def test_power_spectra_have_the_inner_products_of_autocorrelations(taps: tuple[int, ...]) -> None:
    filters, _ = to_filters(torch.randn(3, 2, *taps, dtype=torch.float64))
    power = power_spectra(spectra(filters, taps), taps).sum(-1)[0]
    lags = similarity.autocorrelation(filters, taps)[0]
    torch.testing.assert_close(power @ power.T, lags @ lags.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(power @ unit_impulse(filters, taps), lags[:, 0], rtol=1e-12, atol=1e-12)


def test_large_kernels_take_the_fft_and_small_ones_the_gram_product() -> None:
    def fft(*shape: int) -> bool:
        return similarity.fft_is_cheaper(shape[1], shape[2:], "cpu")

    assert fft(8, 8, 31, 31)
    assert fft(64, 3, 11, 11)
    assert fft(96, 1, 7, 7)
    assert not fft(64, 3, 7, 7)
    assert not fft(64, 64, 3, 3)
    assert not fft(512, 2048, 1, 1)


def test_accelerators_take_the_fft_only_for_a_large_lag_matrix() -> None:
    assert not similarity.fft_is_cheaper(3, (7, 7), "cuda")
    assert not similarity.fft_is_cheaper(1, (7, 7), "cuda")
    assert similarity.fft_is_cheaper(1, (31, 31), "cuda")


@pytest.mark.parametrize("count", [1, 2, 128, 129, 300])
def test_the_sums_of_others_are_the_same_by_matrix_and_by_cumulative_sums(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    autocorrelations = torch.rand(2, count, 5, dtype=torch.float64)
    found = []
    for few in (0, count):
        monkeypatch.setattr(similarity, "FEW_FILTERS", few)
        found.append(similarity.twice_the_others(autocorrelations))
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)
    literal = 2 * (autocorrelations.sum(1, keepdim=True) - autocorrelations)
    torch.testing.assert_close(found[0], literal, rtol=1e-10, atol=1e-12)


def test_folding_by_a_matrix_as_accelerators_do_matches_folding_by_index() -> None:
    filters, taps = to_filters(torch.randn(4, 3, 3, 2, dtype=torch.float64))
    gram = (filters @ filters.mT).flatten(-2)
    folded = gram @ similarity.lag_matrix(filters, taps)
    torch.testing.assert_close(folded, similarity.autocorrelation(filters, taps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_with_half_gradients(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 4, 3, 3).to(dtype).requires_grad_()
    value = convolutional_similarity(weight)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, convolutional_similarity(weight.detach().float()))
    assert weight.grad is not None
    assert weight.grad.dtype == dtype


def test_autocast_does_not_touch_value_or_gradient() -> None:
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    (plain,) = torch.autograd.grad(convolutional_similarity(weight), weight)
    with torch.autocast("cpu", torch.bfloat16):
        value = convolutional_similarity(weight)
        (cast,) = torch.autograd.grad(value, weight)
    assert torch.equal(value, convolutional_similarity(weight))
    assert torch.equal(cast, plain)


def test_transforms_hold_at_any_scale_of_float32() -> None:
    weight = 1e9 * torch.randn(2, 6, 3, 3, 3)
    assert torch.func.vmap(convolutional_similarity)(weight).isposinf().all()
    expected = torch.func.grad(convolutional_similarity)(weight[0].double()).float()
    torch.testing.assert_close(torch.func.grad(convolutional_similarity)(weight[0]), expected, rtol=1e-4, atol=0)


def test_layout_has_no_copy_for_channels_last_weights() -> None:
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert to_filters(weight)[0].data_ptr() == weight.data_ptr()


def test_gradient_needs_no_graph() -> None:
    filters, taps = to_filters(torch.randn(4, 3, 3, 3, requires_grad=True))
    with torch.no_grad():
        assert not similarity_gradient(filters, taps).requires_grad


def test_constants_made_in_inference_mode_serve_training_too() -> None:
    weight = torch.randn(4, 3, 2, 4, requires_grad=True)  # of taps that no other test has
    with torch.inference_mode():
        convolutional_similarity(weight)
    (gradient,) = torch.autograd.grad(convolutional_similarity(weight), weight, create_graph=True)
    gradient.square().sum().backward()  # keeps the constants for its own backward pass
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("weight", "groups", "said"),
    [
        (torch.zeros(4, 4), 1, r"\[4, 4\]"),
        (torch.zeros(4, 4, 3, dtype=torch.int8), 1, "int8"),
        (torch.zeros(4, 4, 3, dtype=torch.complex64), 1, "float64, got torch.complex64"),
        (torch.zeros(4, 4, 3, dtype=torch.float8_e4m3fn), 1, "float8_e4m3fn"),
        (torch.zeros(4, 0, 3), 1, r"none of them empty, got torch.float32 \[4, 0, 3\]"),
        (torch.zeros(4, 4, 3, 0), 1, r"\[4, 4, 3, 0\]"),
        (torch.zeros(0, 4, 3), 1, r"\[0, 4, 3\]"),
        (torch.zeros(4, 4, 3), 3, "3 groups do not divide the 4 filters"),
    ],
)
def test_wrong_input_is_refused_with_what_was_got(weight: Tensor, groups: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convolutional_similarity(weight, groups)
