from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.measurement.kernel_figures import measure_weight
from convsim_cli.minimize import minimize_
from convsim_cli.networks.architectures import build_network
from convsim_cli.penalty import SimilarityHold
from convsim_cli.similarity import convolutional_similarity
from convsim_cli.training.config import Arguments
from convsim_cli.training.trainer import Trainer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.02),
    "nesterov": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
}


def network() -> nn.Sequential:
    """Dense, grouped, transposed and single-tap kernels, in float64."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(3)),
    )


def ncs(weight: Tensor, groups: int = 1) -> Tensor:
    """L_CS of the filters at norm 1, over the number of pairs."""
    directions = nn.functional.normalize(weight.flatten(1), eps=0).view(weight.shape)
    each = len(weight) // groups
    return convolutional_similarity(directions, groups) / (groups * each * (each - 1) / 2)


def gradient_of_ncs(model: nn.Sequential, index: int) -> Tensor:
    """∂ncs/∂weight by autograd through the definition."""
    layer: Any = model[index]
    weight = layer.weight.detach().clone().requires_grad_()
    seen = weight.transpose(0, 1) if layer.transposed else weight
    (gradient,) = torch.autograd.grad(ncs(seen, layer.groups), weight)
    return gradient


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_the_optimizers_without_its_part_that_raises_ncs(optimizer: str, layout: torch.memory_format) -> None:
    model = network()
    images, labels = torch.randn(8, 3, 6, 6).double(), torch.arange(8) % 3
    model(images.float())
    model.double().to(memory_format=layout)  # type: ignore[call-overload]
    free, hold = OPTIMIZERS[optimizer](model.parameters()), SimilarityHold(model)
    removed = 0
    for _ in range(6):
        free.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        twin = copy.deepcopy(model)
        for parameter, own in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.grad = own.grad.clone()  # type: ignore[union-attr]
        without = OPTIMIZERS[optimizer](twin.parameters())
        without.load_state_dict(copy.deepcopy(free.state_dict()))
        without.step()
        former = copy.deepcopy(model)
        with hold():
            free.step()
        for index, layer in enumerate(model):
            if not hasattr(layer, "weight"):
                continue
            was, found, expected = former[index].weight, layer.weight, twin[index].weight  # type: ignore[union-attr]
            step = (expected - was).detach()
            if index in (0, 2, 4):
                g = gradient_of_ncs(former, index)
                along = (step * g).sum().clamp_min(0)
                removed += bool(along > 0)
                step = step - along / g.square().sum() * g
                assert ((found - was) * g).sum() <= 1e-12 * step.norm() * g.norm()
            torch.testing.assert_close(found - was, step, rtol=1e-7, atol=1e-13)
    assert 0 < removed < 18  # some steps are corrected, and some left as they are


def test_ncs_does_not_rise_to_first_order() -> None:
    def rise(length: float, held: bool) -> float:
        """What a step of that length, straight up the gradient and a little to the side, does to ncs."""
        layer = nn.Conv2d(6, 8, 3).double()
        with torch.no_grad():
            layer.weight.copy_(start)
        before = ncs(layer.weight.detach())
        hold = SimilarityHold(layer) if held else None
        direction = gradient / gradient.norm() + 0.5 * side / side.norm()
        with hold() if hold else torch.no_grad(), torch.no_grad():
            layer.weight += length * direction
        return (ncs(layer.weight.detach()) - before).item() / length

    start, side = torch.randn(8, 6, 3, 3).double(), torch.randn(8, 6, 3, 3).double()
    gradient = torch.autograd.grad(ncs(leaf := start.clone().requires_grad_()), leaf)[0]
    free, held = ([rise(length, held) for length in (1e-2, 1e-3, 1e-4)] for held in (False, True))
    assert free[2] > 0.5 * gradient.norm()
    assert abs(held[2]) < 0.02 * abs(held[0]) + 1e-9  # vanishes with the length of the step: second order


def test_frozen_kernels_and_those_without_a_gradient_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[1].weight.zero_()
        with SimilarityHold(model)():
            for layer in model:
                layer.weight += 1  # type: ignore[operator]
    assert (model[1].weight == 1).all()


def test_a_layer_that_cannot_be_held_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.warns(UserWarning, match=r"skips 1\.weight .*parametrized"):
        SimilarityHold(model)


def mean_ncs(model: nn.Module) -> float:
    kernels = module_kernels(model).kernels
    figures = [measure_weight(kernel, weight_of(model, kernel))["ncs"] for kernel in kernels]
    return sum(figures) / len(figures)


def test_similarity_stays_low_in_training_with_momentum(tmp_path: Any) -> None:
    data = load_dataset("digits", tmp_path).limited(100, 20)
    ncs = []
    for hold in (False, True):
        model = build_network("cnn:16")
        minimize_(model, 100, preserve_norm=True, lr=0.01)
        start = mean_ncs(model)
        arguments = Arguments(momentum=0.9, lr=0.05, batch_size=20)
        trainer = Trainer(model, data, replace(arguments, hold_similarity=hold), torch.device("cpu"))
        for _ in range(4):
            trainer.run_epoch()
        ncs.append(mean_ncs(model) - start)
    assert ncs[1] < 0.5 * ncs[0]
