"""Models that hold no kernels, layers that are left out, and layers that are another than when a monitor was made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from convsim_cli import (
    ConvSimPenalty,
    ConvsimWarning,
    InputError,
    TurnMonitor,
    dct_,
    decorrelate_,
    measure,
    minimize_,
    orthogonalize_,
)

CALLS: dict[str, Callable[[Any], Any]] = {
    "TurnMonitor": lambda model: TurnMonitor(model).rows(),
    "measure": lambda model: measure(model, torch.randn(2, 3, 8, 8)),
    "minimize_": minimize_,
    "orthogonalize_": orthogonalize_,
    "dct_": dct_,
    "decorrelate_": lambda model: decorrelate_(model, torch.randn(2, 3, 8, 8)),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_without_kernels_is_warned_of_once(call: Callable[[Any], Any]) -> None:
    with pytest.warns(ConvsimWarning, match="^the model has no convolution kernels that form pairs$") as caught:
        assert call(nn.Sequential(nn.ReLU())) == []
    assert len(caught) == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_why_no_kernel_forms_pairs_is_told(call: Callable[[Any], Any]) -> None:
    with pytest.warns(ConvsimWarning, match=r"form pairs; skipped: 0\.weight \(depthwise: one filter per group"):
        assert call(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3))) == []


def test_the_penalty_warns_of_nothing_beside_its_error() -> None:
    with pytest.raises(InputError, match=r"no convolution kernels that form pairs; skipped: 0\.weight \(lazy"):
        ConvSimPenalty(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_a_monitor_warns_of_layers_that_it_leaves_out_as_the_penalty_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    said = []
    for call in (TurnMonitor, ConvSimPenalty):
        with pytest.warns(UserWarning, match=r"convsim skips 1\.weight \(lazy") as caught:
            call(model)
        said += [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert said[0] == said[1]


def test_a_monitor_watches_the_layers_that_patterns_choose() -> None:
    model = network()
    assert [row["layer"] for row in TurnMonitor(model, include=["0.*"]).rows()] == ["0.weight"]
    assert [row["layer"] for row in TurnMonitor(model, exclude=["0.*"]).rows()] == ["2.weight"]
    with pytest.raises(InputError, match="matches no tensor"):
        TurnMonitor(model, include=["layer9.*"])


@pytest.mark.parametrize("every", [1.5, "2", None, True, -1])
def test_a_monitor_takes_a_whole_number_of_steps(every: Any) -> None:
    with pytest.raises(InputError, match=r"^`every` is .*; expected a number of steps, 1 or more$"):
        TurnMonitor(network(), every=every)


def test_a_layer_of_another_width_is_named_by_the_monitor() -> None:
    model = network()
    turned = TurnMonitor(model, every=2)
    model[2] = nn.Conv2d(4, 3, 3)
    said = r"^2\.weight: its shape is \[3, 4, 3, 3\], and was \[4, 4, 3, 3\] when the TurnMonitor was created"
    for call in (turned, turned.rows):
        with pytest.raises(InputError, match=said):
            call()  # type: ignore[operator]


def test_a_state_of_another_network_is_refused_and_changes_nothing() -> None:
    model = network()
    turned = TurnMonitor(model)
    for other in (nn.Sequential(nn.Conv2d(3, 5, 3)), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3))):
        with pytest.raises(
            InputError, match=r"^`state` is of another network: it contains [01]\.weight, torch.float32 \["
        ):
            turned.load_state(TurnMonitor(other).state())
    turned.load_state(copy.deepcopy(turned.state()))
    assert turned.rows()[0]["turned"] == pytest.approx(0, abs=1e-3)


def test_a_monitor_is_not_made_of_a_model_without_values() -> None:
    with pytest.raises(InputError, match=r"^0\.weight is on the meta device and has no values"):
        TurnMonitor(network().to("meta"))
