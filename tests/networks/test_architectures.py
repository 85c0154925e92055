from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Convsim
from torch import nn

from convsim_cli.checkpoints.formats import StateDict
from convsim_cli.errors import InputError
from convsim_cli.kernels import module_kernels
from convsim_cli.networks.architectures import build_network, count_parameters
from convsim_cli.networks.load import load_weights


@pytest.mark.parametrize(
    ("name", "parameters"), [("cnn1", 118_858), ("cnn2", 458_890), ("cnn:512", 7_143_946), ("resnet18", 11_173_962)]
)
def test_parameters_are_those_the_paper_publishes(name: str, parameters: int) -> None:
    assert count_parameters(build_network(name)) == parameters


def test_networks_repeat_with_their_seed_alone() -> None:
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


def test_a_file_of_a_larger_network_is_loaded_with_a_warning(tmp_path: Path, convsim: Convsim) -> None:
    larger = build_network("torchvision:resnet34", classes=10)
    torch.save(larger.state_dict(), tmp_path / "r34.pt")
    how = ("--arch", "torchvision:resnet18", "--num-classes", 10)
    outcome = convsim("init", tmp_path / "r34.pt", *how, "--dry-run", "-q", "--include", "conv1*")
    assert outcome.code == 0
    said = "--arch torchvision:resnet18 has no place for 80 of its tensors (layer1.2.conv1.weight, "
    assert f"convsim: warning: {tmp_path / 'r34.pt'}: {said}" in outcome.err
    assert "they are left unchanged" in outcome.err


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_quantized_weights_are_not_taken_for_weights(
    dtype: torch.dtype, tmp_path: Path, convsim: Convsim
) -> None:
    state = {
        name: tensor.to(dtype) if tensor.ndim == 4 else tensor
        for name, tensor in build_network("cnn:4").state_dict().items()
    }
    torch.save(state, tmp_path / "codes.pt")
    kind = str(dtype).removeprefix("torch.")
    for command in (("measure",), ("init", "--iterations", 1)):
        outcome = convsim(*command, tmp_path / "codes.pt", "--arch", "cnn:4")
        assert outcome.code == 2
        assert f"0.weight is {kind}: dequantize it first, and 3 others like it" in outcome.error


def test_of_several_copies_the_average_is_not_taken() -> None:
    source, average, target = (build_network("cnn:4", seed=seed) for seed in (1, 2, 3))
    state = {f"ema_model.{name}": tensor for name, tensor in average.state_dict().items()}
    state |= {f"online.{name}": tensor for name, tensor in source.state_dict().items()}
    checkpoint = StateDict(Path("file"), state)
    assert load_weights(target, checkpoint)["0.weight"] == "online.0.weight"
    assert checkpoint.notes == ["file: loaded the tensors under online.; those under ema_model. would fit as well"]
    checkpoint = StateDict(Path("file"), state | source.state_dict())
    assert load_weights(target, checkpoint)["0.weight"] == "0.weight"
    assert "loaded the tensors without a prefix; those under " in checkpoint.notes[0]


def test_a_tied_weight_may_be_in_the_file_under_one_of_its_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    state = {f"model.{name}": torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    del state["model.0.weight"]
    names = load_weights(model, StateDict(Path("file"), state))
    assert names["0.weight"] == names["1.weight"] == "model.1.weight"
    assert torch.equal(model[0].weight, state["model.1.weight"])
    assert [kernel.name for kernel in module_kernels(model, names=names).kernels] == ["model.1.weight"]


def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path, convsim: Convsim) -> None:
    torch.save(build_network("cnn:4").state_dict(), tmp_path / "model.pt")
    outcome = convsim("measure", tmp_path / "model.pt", "--num-classes", 5)
    assert "--num-classes requires --arch" in outcome.error
    outcome = convsim("measure", "--arch", "cnn:4", "--key", "ema")
    assert "--key applies only to a checkpoint; --arch alone creates a new network" in outcome.error
