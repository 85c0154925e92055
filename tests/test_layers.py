from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from convsim_cli.layers import convolve_with


def test_a_layer_convolves_with_the_lent_weight_and_without_its_bias() -> None:
    layer, images = nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)
    weight = torch.randn(4, 3, 3, 3)
    expected = nn.functional.conv2d(images, weight, stride=2, padding=1)
    assert torch.equal(convolve_with(layer, weight, (images,), {}), expected)
    assert torch.equal(convolve_with(layer, weight, (), {"input": images}), expected)


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_layer_that_fails_has_its_own_weight_and_bias_back(parametrized: bool) -> None:
    layer = nn.Conv2d(3, 4, 3)
    if parametrized:
        nn.utils.parametrizations.weight_norm(layer)
    own, kind = dict(layer.named_parameters()), type(layer)
    weight, state = layer.weight.detach().clone(), deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError):
        convolve_with(layer, torch.randn(4, 3, 3, 3), (torch.randn(2, 5, 9, 9),), {})
    assert type(layer) is kind
    assert list(layer.state_dict()) == list(state)
    assert all(found is own[name] for name, found in layer.named_parameters())
    assert torch.equal(layer.weight, weight)
