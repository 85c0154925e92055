from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from references import literal_similarity
from torch import Tensor, nn

from convsim_cli import minimize_
from convsim_cli.errors import DivergedError, InputError
from convsim_cli.kernels import Kernel
from convsim_cli.measurement.kernel_figures import kernel_figures
from convsim_cli.measurement.layer_probe import LayerProbe
from convsim_cli.minimize import Minimization, minimize_kernel, rescale_to


def fresh(filters: int = 64, channels: int = 64) -> tuple[Kernel, Tensor]:
    weight = nn.Conv2d(channels, filters, 3).weight.detach()
    return Kernel("conv.weight", tuple(weight.shape)), weight


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_the_loop_matches_torchs_optimizer_on_the_literal_equation(optimizer: str, preserve_norm: bool) -> None:
    kernel = Kernel("k", (4, 2, 3, 2), groups=2)
    weight = torch.randn(kernel.shape, dtype=torch.float64)
    how = Minimization(7, 0.01, optimizer, preserve_norm)  # type: ignore[arg-type]
    expected = weight.clone().requires_grad_()
    norms = weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    step = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([expected], lr=0.01)
    for _ in range(7):
        step.zero_grad()
        literal_similarity(expected, 2).backward()
        if preserve_norm:
            assert expected.grad is not None
            along = (expected.grad * expected.detach()).sum((1, 2, 3), keepdim=True) / norms**2
            expected.grad -= along * expected.detach()
        step.step()
        if preserve_norm:
            expected.data *= norms / expected.data.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    found, _ = minimize_kernel(kernel, weight, how)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


def test_raw_lowers_cs_a_thousandfold_and_says_that_it_shrank_the_filters() -> None:
    kernel, weight = fresh()
    minimized, record = minimize_kernel(kernel, weight, Minimization())
    assert record["before"]["cs"] > 1000 * record["after"]["cs"]
    assert record["before"]["norm"] > 10 * record["after"]["norm"]
    assert record["after"]["norm"] == pytest.approx(minimized.double().norm().item(), rel=1e-6)


def test_preserve_norm_lowers_feature_map_similarity_where_subtracting_means_does_not() -> None:
    kernel, weight = fresh()
    minimized, _ = minimize_kernel(kernel, weight, Minimization(preserve_norm=True))
    torch.testing.assert_close(minimized.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    for probe, fold in (("white", 1.3), ("natural", 2.0)):
        before, after, control = (LayerProbe(probe).fm_cos(kernel, w) for w in (weight, minimized, centred))
        assert before > fold * after
        assert before < 1.05 * control


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_minimized_in_float32_and_cast_back(dtype: torch.dtype) -> None:
    kernel, weight = fresh(16, 8)
    half = weight.to(dtype)
    minimized, _ = minimize_kernel(kernel, half, Minimization(20))
    exact, _ = minimize_kernel(kernel, half.float(), Minimization(20))
    assert minimized.dtype == dtype
    assert torch.equal(minimized, exact.to(dtype))
    assert torch.equal(half, weight.to(dtype))


def test_a_zero_filter_stays_zero_and_harms_nobody() -> None:
    kernel, weight = fresh(8, 4)
    weight[3] = 0
    for preserve_norm in (False, True):
        minimized, record = minimize_kernel(kernel, weight, Minimization(100, preserve_norm=preserve_norm))
        assert not minimized[3].any()
        assert minimized.isfinite().all()
        assert record["after"]["cs"] < record["before"]["cs"]


def test_a_diverging_layer_is_named() -> None:
    kernel, weight = fresh(8, 4)
    with pytest.raises(DivergedError, match=r"conv\.weight: L_CS is .*lower --lr"):
        minimize_kernel(kernel, weight, Minimization(200, lr=1e6, optimizer="sgd"))


def test_a_module_is_untouched_when_one_of_its_layers_cannot_be_minimized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"1\.weight .* 1 of 144 values are NaN or Inf"):
        minimize_(model, 10)
    assert torch.equal(model[0].weight, before)


def test_tol_stops_a_layer_that_has_converged_and_progress_still_ends_at_the_total() -> None:
    kernel, weight = fresh(8, 4)
    told: list[int] = []
    stopped, _ = minimize_kernel(kernel, weight, Minimization(1000, preserve_norm=True, tol=0.01), told.append)
    full, _ = minimize_kernel(kernel, weight, Minimization(1000, preserve_norm=True, tol=0), told.append)
    assert sum(told) == 2000
    assert 20 < len(told) < 40
    assert not torch.equal(stopped, full)


def test_without_tol_every_iteration_is_done_though_the_loss_rises() -> None:
    kernel, weight = fresh(8, 8)
    told: list[int] = []
    minimize_kernel(kernel, weight, Minimization(1000, lr=0.01, preserve_norm=True), told.append)
    assert told == [50] * 20


def test_pointwise_layers_are_included_raw_and_left_alone_under_preserve_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3))
    assert [record["name"] for record in minimize_(model, 1)] == ["0.weight", "1.weight"]
    assert [record["name"] for record in minimize_(model, 1, preserve_norm=True)] == ["1.weight"]


def test_minimizing_leaves_no_gradient_and_keeps_parameters_trainable() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    weight = model[0].weight
    minimize_(model, 5)
    assert model[0].weight is weight
    assert weight.requires_grad
    assert weight.grad is None


def test_rescaling_keeps_directions_and_takes_the_other_norms() -> None:
    kernel, weight = fresh(8, 4)
    other = torch.randn_like(weight)
    other[2] = 0
    scaled = rescale_to(kernel, weight, other)
    torch.testing.assert_close(scaled.flatten(1).norm(dim=1), other.flatten(1).norm(dim=1))
    cosines = nn.functional.cosine_similarity(scaled.flatten(1), weight.flatten(1))
    torch.testing.assert_close(cosines[[0, 1, 3]], torch.ones(3))


@pytest.mark.parametrize(
    "wrong", [{"iterations": -1}, {"lr": 0.0}, {"lr": float("nan")}, {"tol": -0.1}, {"optimizer": "lion"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected iterations"):
        Minimization(**wrong)  # type: ignore[arg-type]


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that torch held at once of what it allocated in a call, temporaries included."""
    function()  # what is kept between calls is there from now on
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events: Any = profile.profiler
    return max(accumulate(e.nbytes() for e in events.kineto_results.events() if e.name() == "[memory]"))


@pytest.mark.parametrize("preserve_norm", [False, True])
def test_minimizing_a_layer_holds_few_copies_of_it(preserve_norm: bool) -> None:
    kernel, weight = fresh()
    peak = peak_bytes(lambda: minimize_kernel(kernel, weight, Minimization(2, preserve_norm=preserve_norm)))
    assert peak <= 4.5 * weight.nbytes  # the filters, their gradient, Adam's two moments, and the Gram products


def test_the_figures_of_a_layer_hold_its_filters_in_float32_and_float64_alone() -> None:
    kernel, weight = fresh()
    assert peak_bytes(lambda: kernel_figures(kernel, weight)) <= 3.1 * weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_laid_out_like_its_filters_is_not_written_to(dtype: torch.dtype) -> None:
    kernel, weight = fresh(8, 4)
    weight = weight.to(dtype).to(memory_format=torch.channels_last)
    before = weight.clone()
    minimize_kernel(kernel, weight, Minimization(3))
    assert torch.equal(weight, before)
