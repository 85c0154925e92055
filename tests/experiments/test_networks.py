from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convsim_cli.errors import InputError
from convsim_cli.experiments.networks import build_network, count_parameters, load_weights
from convsim_cli.kernels import module_kernels
from convsim_cli.state_dict import StateDict


@pytest.mark.parametrize(
    ("name", "parameters"), [("cnn1", 118_858), ("cnn2", 458_890), ("cnn:512", 7_143_946), ("resnet18", 11_173_962)]
)
def test_parameters_are_those_the_paper_publishes(name: str, parameters: int) -> None:
    assert count_parameters(build_network(name)) == parameters


def test_networks_repeat_with_their_seed_and_leave_the_callers_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (build_network("cnn:8", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize("name", ["cnn:8", "resnet18"])
def test_networks_take_32x32_images(name: str) -> None:
    model = build_network(name, classes=7).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_pooling_before_leaky_relu_is_the_same_to_the_bit() -> None:
    model = build_network("cnn:8")
    layers = list(model.children())
    published = torch.nn.Sequential(*layers[:2], layers[3], layers[2], *layers[4:])  # as Table 4 has its first block
    published[2], published[3] = layers[3], layers[2]
    images = torch.randn(4, 3, 32, 32)
    swapped = torch.nn.Sequential(layers[0], layers[1], torch.nn.LeakyReLU(0.2), torch.nn.MaxPool2d(2, 2), *layers[4:])
    assert torch.equal(model(images), swapped(images))
    gradients = []
    for network in (model, swapped):
        network.zero_grad()
        network(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_weights_load_through_any_prefix() -> None:
    source, target = build_network("cnn:8", seed=1), build_network("cnn:8", seed=2)
    state = {f"module.net.{name}": tensor for name, tensor in source.state_dict().items()}
    names = load_weights(target, StateDict(Path("file"), state))
    assert names["0.weight"] == "module.net.0.weight"
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_what_does_not_fit_is_listed() -> None:
    state = build_network("cnn:4").state_dict()
    del state["17.bias"]
    with pytest.raises(
        InputError, match=r"1 of .* missing \(17.bias\).*0.weight is \[4, 3, 3, 3\], expected \[8, 3, 3, 3\]"
    ):
        load_weights(build_network("cnn:8"), StateDict(Path("file"), state))


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'cnn2'"):
        build_network("cnn3x2")
    with pytest.raises(InputError, match="unknown network 'cnn:0'"):
        build_network("cnn:0")


def test_every_convolution_of_resnet18_forms_pairs() -> None:
    selection = module_kernels(build_network("resnet18"))
    assert len(selection.kernels) == 20
    assert not selection.skipped
