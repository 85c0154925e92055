from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from conftest import same_bits
from torch import nn

from convsim_cli.layers import convolve_with, side_effect_free


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


class Stateful(nn.Sequential):
    """Counts its calls in a buffer, by chance, and replaces another one."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += torch.rand(1)
        self.last = images.mean()
        result: torch.Tensor = super().forward(images)
        return result


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_model_is_left_as_it_was_whatever_its_forward_does(scripted: bool, error: type[BaseException] | None) -> None:
    model = nn.Sequential(torch.jit.script(nn.BatchNorm2d(3)) if scripted else Stateful())
    model[0].train()
    buffers, values = dict(model.named_buffers()), deepcopy(model.state_dict())
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    with nullcontext() if error is None else pytest.raises(error), side_effect_free(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.randn(2, 3, 8, 8)).requires_grad
        model[0].train()
        model(torch.randn(2, 3, 8, 8))
        if error:
            raise error
    assert [module.training for module in model.modules()] == modes
    assert scripted or all(found is buffers[name] for name, found in model.named_buffers())
    assert same_bits(dict(model.state_dict()), values)
    assert torch.equal(torch.get_rng_state(), random)
