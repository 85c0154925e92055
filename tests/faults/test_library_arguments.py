"""Wrong arguments of library calls: one line each, which says what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import convsim_cli
from convsim_cli import (
    ConvSimPenalty,
    TurnMonitor,
    convolutional_similarity,
    dct_,
    decorrelate_,
    measure,
    minimize_,
    minimize_weight_,
    orthogonalize_,
)
from convsim_cli.closed_forms import dct_weight_, orthogonalize_weight_
from convsim_cli.errors import InputError

IMAGES = torch.randn(2, 3, 8, 8)
Call = Callable[[Any], Any]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == said


WITH_MODEL: dict[str, Call] = {
    "ConvSimPenalty": ConvSimPenalty,
    "TurnMonitor": TurnMonitor,
    "measure": lambda model: measure(model, IMAGES),
    "minimize_": minimize_,
    "orthogonalize_": orthogonalize_,
    "dct_": dct_,
    "decorrelate_": lambda model: decorrelate_(model, IMAGES),
}
MODELS: dict[str, tuple[Any, str]] = {
    "None": (None, "None"),
    "parameters": (network().parameters(), "a generator"),
    "state_dict": (network().state_dict(), "an OrderedDict"),
    "class": (nn.Conv2d, "the class Conv2d"),
}


@pytest.mark.parametrize(("model", "found"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("call", WITH_MODEL.values(), ids=WITH_MODEL)
def test_what_is_no_module_is_named(call: Call, model: Any, found: str) -> None:
    refused(lambda: call(model), f"`model` is {found}; expected a torch.nn.Module")


@pytest.mark.parametrize(
    "call", [convolutional_similarity, minimize_weight_, orthogonalize_weight_, dct_weight_], ids=lambda f: f.__name__
)
def test_what_is_no_weight_is_named(call: Call) -> None:
    layer = nn.Conv2d(3, 4, 3)
    refused(lambda: call(layer), "expected a torch.Tensor, got Conv2d")
    refused(lambda: call(layer.weight.detach().numpy()), "expected a torch.Tensor, got ndarray")
