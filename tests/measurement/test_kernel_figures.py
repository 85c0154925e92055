from __future__ import annotations

from itertools import combinations

import pytest
import torch
from references import literal_normalized_similarity, literal_similarity
from torch import nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel
from convsim_cli.measurement import kernel_figures as module
from convsim_cli.measurement.feature_maps import LayerMaps
from convsim_cli.measurement.figures import FIGURES
from convsim_cli.measurement.kernel_figures import kernel_cosine, measure_layer, measure_weight
from convsim_cli.measurement.synthetic import LayerProbe


def test_kernel_figures_match_their_definitions() -> None:
    weight = torch.randn(6, 3, 3, 2)
    kernel = Kernel("k", (6, 3, 3, 2), 2)
    found = measure_weight(kernel, weight)
    exact = weight.double()
    cosines = [
        nn.functional.cosine_similarity(group[i].flatten(), group[j].flatten(), dim=0).abs()
        for group in exact.chunk(2)
        for i, j in combinations(range(3), 2)
    ]
    assert found["cs"] == pytest.approx(literal_similarity(exact, 2).item(), rel=1e-12)
    assert found["ncs"] == pytest.approx(literal_normalized_similarity(exact, 2).item(), rel=1e-12)
    assert kernel_cosine(kernel, weight) == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-12)
    assert found["norm"] == pytest.approx(exact.norm().item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_kernel_figures_hold_at_the_ends_of_float32(scale: float) -> None:
    weight = torch.randn(4, 2, 3, 3) * scale / 4
    found = measure_weight(Kernel("k", (4, 2, 3, 3)), weight)
    assert found["cs"] == pytest.approx(literal_similarity(weight.double()).item(), rel=1e-10)
    assert found["ncs"] == pytest.approx(literal_normalized_similarity(weight.double()).item(), rel=1e-6)


def test_null_stands_where_no_number_can_be_given_and_nan_never() -> None:
    weight = torch.zeros(3, 2, 3, 3)
    weight[0] = 1
    kernel = Kernel("k", (3, 2, 3, 3))
    assert measure_weight(kernel, weight) == {"cs": 0.0, "ncs": None, "norm": pytest.approx(18**0.5)}
    assert kernel_cosine(kernel, weight) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernel_figures_leave_a_float64_weight_alone(layout: torch.memory_format) -> None:
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64).to(memory_format=layout)
    before = weight.clone()
    measure_weight(Kernel("k", (6, 3, 3, 3)), weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("vanished", [1e-10, 1e-25, 1e-38, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vanished_filters_count_in_cs_and_norm_and_in_no_normalized_figure(dtype: torch.dtype, vanished: float) -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=dtype)
    weight[2] *= vanished
    whole, rest = Kernel("k", (5, 3, 3, 3)), Kernel("k", (4, 3, 3, 3))
    living = weight[[0, 1, 3, 4]]
    found, expected = measure_weight(whole, weight), measure_weight(rest, living)
    assert found["ncs"] == pytest.approx(expected["ncs"], rel=1e-12)
    assert kernel_cosine(whole, weight) == pytest.approx(kernel_cosine(rest, living), rel=1e-12)
    assert found["cs"] == pytest.approx(literal_similarity(weight.double()).item(), rel=1e-10)
    assert found["norm"] == pytest.approx(weight.double().norm().item(), rel=1e-12)


def test_the_filters_that_count_can_be_those_of_another_moment() -> None:
    kernel, weight = Kernel("k", (4, 2, 3, 3)), torch.randn(4, 2, 3, 3)
    living = torch.tensor([[True, True, False, True]])
    rest = weight[[0, 1, 3]]
    assert measure_weight(kernel, weight, living)["ncs"] == pytest.approx(
        literal_normalized_similarity(rest.double()).item(), rel=1e-12
    )
    assert kernel_cosine(kernel, weight, living) == pytest.approx(kernel_cosine(Kernel("k", (3, 2, 3, 3)), rest))


def test_cosines_of_many_filters_are_taken_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, weight = Kernel("k", (10, 2, 3, 3), 2), torch.randn(10, 2, 3, 3)
    whole = kernel_cosine(kernel, weight)
    monkeypatch.setattr(module, "_COSINES", 20)
    assert kernel_cosine(kernel, weight) == pytest.approx(whole, rel=1e-12)


def test_a_kernel_with_nan_is_named_with_the_way_out() -> None:
    weight = torch.randn(4, 2, 3, 3)
    weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(
        InputError, match=r"k \[4, 2, 3, 3\]: 1 of 72 values is NaN or Inf; fix the checkpoint or `exclude`"
    ):
        measure_weight(Kernel("k", (4, 2, 3, 3)), weight)


def test_a_record_has_every_figure_in_the_order_of_the_table() -> None:
    kernel, weight = Kernel("k", (4, 2, 3, 3)), torch.randn(4, 2, 3, 3)
    for maps in (LayerMaps(kernel, weight), LayerProbe(samples=1).look(kernel, weight)):
        record = measure_layer(kernel, weight, maps)
        assert list(record) == ["name", "shape", "groups", "assumed", "filters", *(figure.key for figure in FIGURES)]


def test_figures_of_weights_whose_norm_leaves_float64_are_none() -> None:
    kernel, weight = Kernel("a", (4, 3, 3, 3)), torch.full((4, 3, 3, 3), 1e170, dtype=torch.float64)
    assert measure_weight(kernel, weight) == {"cs": None, "ncs": None, "norm": None}
    assert kernel_cosine(kernel, weight) is None
