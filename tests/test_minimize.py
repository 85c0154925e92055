from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import same_bits
from references import literal_similarity
from torch import Tensor, nn

from convsim_cli import dct_, minimize, orthogonalize_
from convsim_cli.device import Advance
from convsim_cli.errors import ConvsimWarning, DivergedError, InputError
from convsim_cli.kernels import Kernel, living_filters, module_kernels, weight_of
from convsim_cli.measurement.kernel_figures import measure_weight
from convsim_cli.measurement.synthetic import LayerProbe
from convsim_cli.minimize import (
    Minimization,
    Stack,
    minimize_,
    minimize_kernels,
    minimize_weight_,
    rescale_to,
)
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.similarity import to_filters


def minimize_kernel(
    kernel: Kernel, weight: Tensor, how: Minimization, advance: Advance | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The minimized weight of one layer, and its record."""
    return next(minimize_kernels([(kernel, weight)], how, advance))


def fresh(filters: int = 64, channels: int = 64) -> tuple[Kernel, Tensor]:
    weight = nn.Conv2d(channels, filters, 3).weight.detach()
    return Kernel("conv.weight", tuple(weight.shape)), weight


def literally_projected(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient without its part along each filter: g − ⟨g, K_i⟩ K_i / ‖K_i‖²."""
    along = (gradient * weight).flatten(1).sum(1) / weight.flatten(1).square().sum(1)
    return gradient - along.reshape(-1, *[1] * (weight.ndim - 1)) * weight


def value_while_norms_are_held(objective: str, filters: Tensor, taps: tuple[int, ...]) -> Tensor:
    """The value that is minimized: `ocnn` and `srip` are those of K_i / ‖K_i‖."""
    if objective in ("ocnn", "srip"):
        norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
        filters = filters / torch.where(norms > 0, norms, 1)
    return OBJECTIVES[objective].value(filters, taps)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loop_is_torchs_optimizer_on_the_literally_projected_gradient(
    optimizer: str, preserve_norm: bool, objective: str
) -> None:
    kernel = Kernel("k", (4, 2, 3, 2), groups=2)
    weight = torch.randn(kernel.shape, dtype=torch.float64) / 4
    how = Minimization(7, 0.01, optimizer, preserve_norm, objective=objective)  # type: ignore[arg-type]
    expected = weight.clone().requires_grad_()
    norms = weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    step = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([expected], lr=0.01)
    for _ in range(7):
        step.zero_grad()
        if objective == "cs":
            literal_similarity(expected, 2).backward()
        elif preserve_norm:
            value_while_norms_are_held(objective, kernel.to_filters(expected), kernel.taps).backward()
        else:
            OBJECTIVES[objective].value(kernel.to_filters(expected), kernel.taps).backward()
        if preserve_norm:
            assert expected.grad is not None
            expected.grad = literally_projected(expected.grad, expected.detach())
        step.step()
        if preserve_norm:
            expected.data *= norms / expected.data.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    found, _ = minimize_kernel(kernel, weight, how)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("taps", [(1,), (3, 3), (7, 7), (31,), (2, 3, 2)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_tangent_gradient_is_the_literal_projection(
    objective: str, taps: tuple[int, ...], dtype: torch.dtype, rtol: float
) -> None:
    weight = torch.randn(6, 3, *taps, dtype=dtype)
    weight[4] = 0
    filters, _ = to_filters(weight, 2)
    norms = torch.rand(2, 3, 1, 1, dtype=dtype) + 0.5
    held = filters * norms / torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    held[1, 1] = 0
    norms[1, 1] = 0
    found = torch.empty_like(filters)
    OBJECTIVES[objective].tangent_gradient(filters, taps, norms, found)
    torch.testing.assert_close(filters, held, rtol=rtol, atol=0)
    leaf = filters.clone().requires_grad_()
    value_while_norms_are_held(objective, leaf, taps).backward()
    assert leaf.grad is not None
    expected = literally_projected(leaf.grad.flatten(0, 1), filters.flatten(0, 1)).nan_to_num()
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=0, atol=rtol * leaf.grad.abs().max().item())
    assert not filters[1, 1].any()
    assert not found[1, 1].any()


def test_raw_lowers_cs_a_thousandfold_and_says_that_it_shrank_the_filters() -> None:
    kernel, weight = fresh()
    minimized, record = minimize_kernel(kernel, weight, Minimization())
    assert record["before"]["cs"] > 1000 * record["after"]["cs"]
    assert record["before"]["norm"] > 10 * record["after"]["norm"]
    assert record["after"]["norm"] == pytest.approx(minimized.double().norm().item(), rel=1e-6)


def test_preserve_norm_lowers_similarity_beyond_subtracting_means() -> None:
    kernel, weight = fresh()
    minimized, _ = minimize_kernel(kernel, weight, Minimization(preserve_norm=True))
    torch.testing.assert_close(minimized.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    for probe, fold in (("white", 1.3), ("natural", 2.0)):
        before, after, control = (LayerProbe(probe).fm_corr(kernel, w) for w in (weight, minimized, centred))
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
    with pytest.raises(DivergedError, match=r"conv\.weight: the objective is .*lower `lr`"):
        minimize_kernel(kernel, weight, Minimization(200, lr=1e6, optimizer="sgd"))


@pytest.mark.parametrize("change", [partial(minimize_, iterations=1), orthogonalize_, dct_])
def test_a_module_is_untouched_when_one_of_its_layers_cannot_be_written(change: Callable[..., object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = nn.Parameter(torch.randn(1, 8, 3, 3).expand(8, 8, 3, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        change(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("change", [partial(minimize_, iterations=1), orthogonalize_, dct_])
def test_a_warning_names_the_line_that_called(change: Callable[..., object]) -> None:
    with pytest.warns(UserWarning, match="no convolution kernels") as caught:
        change(nn.Linear(2, 2))
    assert caught[0].filename == __file__


def test_a_module_is_untouched_when_one_of_its_layers_cannot_be_minimized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"1\.weight .* 1 of 144 values is NaN or Inf"):
        minimize_(model, 10)
    assert torch.equal(model[0].weight, before)


def test_every_iteration_is_done_though_the_loss_rises() -> None:
    kernel, weight = fresh(8, 8)
    told: list[int] = []
    minimize_kernel(kernel, weight, Minimization(1000, lr=0.01, preserve_norm=True), told.append)
    assert told == [50 * weight.numel()] * 20


def test_preserve_norm_leaves_pointwise_layers_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3))
    assert [record["name"] for record in minimize_(model, 1)] == ["0.weight", "1.weight"]
    with pytest.warns(ConvsimWarning, match=r"skips 0\.weight \(1×1: its L_CS depends only on norms"):
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
    "wrong",
    [
        {"iterations": -1},
        {"iterations": 1.5},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"optimizer": "lion"},
        {"objective": "kernels"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}`"):
        Minimization(**wrong)


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


def test_a_layers_figures_hold_two_copies_of_its_filters() -> None:
    kernel, weight = fresh()
    assert peak_bytes(lambda: measure_weight(kernel, weight)) <= 3.1 * weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_laid_out_like_its_filters_is_not_written_to(dtype: torch.dtype) -> None:
    kernel, weight = fresh(8, 4)
    weight = weight.to(dtype).to(memory_format=torch.channels_last)
    before = weight.clone()
    minimize_kernel(kernel, weight, Minimization(3))
    assert torch.equal(weight, before)


def fresh_network() -> nn.Sequential:
    """Layers that are stacked on the CPU, and layers of their shapes' company that are not."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 3),
        nn.ConvTranspose2d(16, 16, 3),
        nn.Conv2d(16, 32, 3, groups=2),
        nn.Conv2d(32, 15, 3),
        nn.Conv2d(15, 15, 3),
        nn.Conv2d(15, 15, 3),
        nn.Conv2d(16, 16, 3).double(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layers_minimized_together_have_the_bits_of_each_alone(
    preserve_norm: bool, optimizer: str, objective: str
) -> None:
    how = Minimization(10, 1e-3, optimizer, preserve_norm, objective=objective)  # type: ignore[arg-type]
    model = fresh_network()
    layers = [(kernel, weight_of(model, kernel)) for kernel in module_kernels(model).kernels]
    together = list(minimize_kernels(layers, how))
    assert [record["name"] for _, record in together] == [kernel.name for kernel, _ in layers]
    for (kernel, weight), (found, record) in zip(layers, together, strict=True):
        alone, expected = minimize_kernel(kernel, weight, how)
        assert torch.equal(found, alone)
        assert record == expected


@pytest.fixture
def descents(monkeypatch: pytest.MonkeyPatch) -> list[list[list[str]]]:
    """The names of the layers of each stack of each descent, as they happen."""
    seen: list[list[list[str]]] = []

    original = minimize.descend_

    def descend_(stacks: Sequence[Stack], how: Minimization, advance: Advance | None = None) -> None:
        seen.append([[kernel.name for kernel in stack.kernels] for stack in stacks])
        original(stacks, how, advance)

    monkeypatch.setattr(minimize, "descend_", descend_)
    return seen


def test_small_layers_of_one_shape_are_stacked_and_a_large_layer_is_alone(
    descents: list[list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minimize, "LARGE", 4 * 3 * 16 * 16 * 9)  # three layers of 16×16×3×3
    model = nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(4)], nn.Conv2d(32, 32, 3), nn.Conv2d(16, 16, 3))
    minimize_(model, 1)
    names = [[f"{index}.weight"] for index in range(6)]
    assert descents == [[[*names[0], *names[1], *names[2]]], [names[3]], [names[4]], [names[5]]]


def test_layers_are_read_no_further_ahead_than_they_are_minimized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimize, "LARGE", 4 * 2 * 16 * 16 * 9)
    read = 0

    def layers() -> Iterator[tuple[Kernel, Tensor]]:
        nonlocal read
        for index in range(6):
            read += 1
            yield Kernel(str(index), (16, 16, 3, 3)), torch.randn(16, 16, 3, 3)

    found = minimize_kernels(layers(), Minimization(1))
    counts = [read for _ in found]
    assert counts == [3, 3, 5, 5, 6, 6]


SHARES = (1.0, 1e-10, 0.5, 1e-25, 2.0, 1e-38, 1.0, 0.0)  # of a filter's norm in its layer
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-9}
LIVING, DEAD = [0, 2, 4, 6], [1, 3, 5, 7]


def partly_vanished(dtype: torch.dtype) -> Tensor:
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64) * torch.tensor(SHARES).reshape(-1, 1, 1, 1)
    weight[7] = -0.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_vanished_filters_keep_every_bit_and_change_no_other(
    dtype: torch.dtype, preserve_norm: bool, objective: str
) -> None:
    weight = partly_vanished(dtype)
    how = Minimization(20, preserve_norm=preserve_norm, objective=objective)
    minimized, record = minimize_kernel(Kernel("k", (8, 4, 3, 3)), weight, how)
    assert same_bits(minimized[DEAD], weight[DEAD])
    assert minimized.isfinite().all()
    if objective != "neighbours":  # whose neighbours would be others
        alone, expected = minimize_kernel(Kernel("k", (4, 4, 3, 3)), weight[LIVING].contiguous(), how)
        torch.testing.assert_close(minimized[LIVING], alone, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 10)
        assert record["before"]["ncs"] == pytest.approx(expected["before"]["ncs"], rel=1e-6)
        assert record["after"]["ncs"] == pytest.approx(expected["after"]["ncs"], rel=1e-2)


def test_a_filter_that_is_dead_before_stays_dead_in_the_figures_after() -> None:
    kernel, weight = Kernel("k", (8, 4, 3, 3)), torch.randn(8, 4, 3, 3) / 10
    weight[3] *= 5e-7  # raw minimization brings the others nearer to it than a millionth
    minimized, record = minimize_kernel(kernel, weight, Minimization(200, 0.01))
    assert torch.equal(minimized[3], weight[3])
    assert living_filters(kernel.to_filters(minimized)).all()
    others = [0, 1, 2, 4, 5, 6, 7]
    expected = measure_weight(Kernel("k", (7, 4, 3, 3)), minimized[others])["ncs"]
    assert record["after"]["ncs"] == pytest.approx(expected, rel=1e-6)


def test_rescaling_keeps_every_bit_of_vanished_filters() -> None:
    weight = partly_vanished(torch.float32)
    scaled = rescale_to(Kernel("k", (8, 4, 3, 3)), weight, torch.randn(8, 4, 3, 3))
    assert same_bits(scaled[DEAD], weight[DEAD])
    assert not torch.equal(scaled[0], weight[0])


def test_a_weight_is_minimized_in_place_and_returned() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected, _ = minimize_kernel(Kernel("k", (8, 2, 3, 3), 2), layer.weight, Minimization(20, preserve_norm=True))
    strides = layer.weight.stride()
    assert minimize_weight_(layer.weight, 2, iterations=20, preserve_norm=True) is layer.weight
    assert torch.equal(layer.weight, expected)
    assert layer.weight.stride() == strides
    assert layer.weight.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_weight_is_minimized_for_any_objective(objective: str) -> None:
    weight = torch.randn(8, 4, 3)
    value = OBJECTIVES[objective].value
    before = value(*to_filters(weight))
    minimize_weight_(weight, iterations=100, preserve_norm=True, objective=objective, optimizer="adam", lr=0.01)
    assert value(*to_filters(weight)) < before


@pytest.mark.parametrize(
    ("weight", "settings"),
    [
        (torch.randn(8, 4), {}),
        (torch.ones(8, 4, 3, 3, dtype=torch.int64), {}),
        (torch.randn(8, 4, 3, 3), {"groups": 3}),
        (torch.full((8, 4, 3, 3), torch.nan), {}),
        (torch.randn(8, 4, 3, 3), {"lr": -1.0}),
        (torch.randn(8, 4, 3, 3), {"objective": "cosine"}),
        (torch.randn(8, 4, 3, 3, device="meta"), {}),
    ],
)
def test_a_weight_that_cannot_be_minimized_is_a_value_error_and_untouched(
    weight: Tensor, settings: dict[str, Any]
) -> None:
    version = weight._version
    with pytest.raises(ValueError, match=r"."):
        minimize_weight_(weight, **settings)
    assert weight._version == version


@pytest.mark.parametrize(
    ("shape", "groups", "reason"),
    [((4, 1, 3, 3), 4, "no pairs"), ((1, 4, 3, 3), 1, "no pairs"), ((4, 4, 1, 1), 1, "1×1")],
)
def test_a_weight_with_nothing_to_minimize_is_left_as_it_is_with_a_warning(
    shape: tuple[int, ...], groups: int, reason: str
) -> None:
    weight = torch.randn(shape)
    before = weight.clone()
    with pytest.warns(UserWarning, match=reason) as caught:
        minimize_weight_(weight, groups, preserve_norm=True)
    assert torch.equal(weight, before)
    assert caught[0].filename == __file__


def test_patterns_select_the_layers_of_a_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    before = model[1].weight.detach().clone()
    assert [record["name"] for record in minimize_(model, 1, include=["0.*", "1.*"], exclude=["1.*"])] == ["0.weight"]
    assert torch.equal(model[1].weight, before)
    with pytest.raises(InputError, match="matches no tensor"):
        minimize_(model, 1, exclude=["layer1.*"])


def test_other_objectives_act_on_pointwise_layers_while_norms_are_held() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    before = model[0].weight.detach().clone()
    minimize_(model, 5, preserve_norm=True, objective="kernel")
    assert not torch.equal(model[0].weight, before)


def test_layers_that_cannot_be_minimized_are_named_in_one_warning() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.LazyConv2d(4, 3)
    )
    with pytest.warns(UserWarning, match=r"1\.weight \(parametrized: .*; 2\.weight \(lazy") as caught:
        assert [record["name"] for record in minimize_(model, 1)] == ["0.weight"]
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_kernels_that_share_memory_are_minimized_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3))
    model[1].weight = nn.Parameter(model[0].weight)  # another parameter, of the same values
    (record,) = minimize_(model, 50, lr=0.01, preserve_norm=True)
    found = measure_weight(Kernel("k", (8, 3, 3, 3)), model[0].weight.detach())
    assert record["after"]["ncs"] == pytest.approx(found["ncs"])


@pytest.mark.parametrize("objective", ["srip", "ocnn", "orthoreg", "kernel", "cs"])
def test_held_norms_beyond_float32_are_an_error_and_no_zeros(objective: str) -> None:
    weight = torch.randn(16, 8, 3, 3) * 5e18
    before = weight.clone()
    with pytest.raises(DivergedError):
        minimize_weight_(weight, iterations=50, objective=objective, preserve_norm=True)
    assert torch.equal(weight, before)
