"""What belongs to training in a flat file: optimizer state and averaged copies are left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Convsim, same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from convsim_cli.kernels import TensorInfo
from convsim_cli.kernels.guess import non_model_tensors
from convsim_cli.networks.architectures import build_network
from convsim_cli.networks.load import match_names, open_model_checkpoint

LAYERS = {"c.weight": (4, 3, 3, 3), "block.0.conv.weight": (8, 4, 3, 3)}
OPTIMIZERS = [
    "optimizer.state.{}.exp_avg_sq",
    "optimizers.0.state.{}.momentum_buffer",
    "optim.{}",
    "optimG.state.{}",
    "g_optim.{}",
    "opt_state.0.mu.{}",
    "exp_avg.{}",
    "momentum_buffer.{}",
    "state.{}.exp_avg",
    "{}.max_exp_avg_sq",
    "{}.exp_avg_sq_row",
    "{}_exp_avg",
    "adam.m.{}",
    "master_params.{}",
    "{}.grad",
    "{}.velocity",
]
AVERAGES = [
    "model_ema.{}",
    "ema_model.{}",
    "ema.{}",
    "ema.module.{}",
    "ema.model.{}",
    "callbacks.EMA.shadow.{}",
    "ema.ema_model.module.{}",
    "modelEMA.{}",
    "averaged_model.module.{}",
    "swa_model.{}",
    "model_swa.{}",
    "shadow.{}",
    "shadow_params.{}",
    "avg_model.{}",
    "momentum.{}",
    "teacher.{}",
    "target_network.{}",
    "{}_ema",
    "{}.ema",
    "{}.shadow",
]


def infos(names: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("float32", shape) for name, shape in names.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "net."])
@pytest.mark.parametrize("place", OPTIMIZERS + AVERAGES)
def test_what_training_keeps_beside_the_network_is_set_aside(place: str, prefix: str) -> None:
    network = {prefix + name: shape for name, shape in LAYERS.items()}
    suffix = place.startswith("{}")
    kept = {place.format((prefix if suffix else "") + name): shape for name, shape in LAYERS.items()}
    found = non_model_tensors(infos(network | kept))
    assert list(found) == list(kept)
    said = "optimizer state" if place in OPTIMIZERS else "a copy of another tensor"
    assert all(reason.startswith(said) for reason in found.values())


def test_an_average_whose_names_have_lost_their_dots_is_known() -> None:
    network = {f"model.diffusion_model.{name}": shape for name, shape in LAYERS.items()}
    copies = {f"model_ema.diffusion_model{name.replace('.', '')}": shape for name, shape in LAYERS.items()}
    assert list(non_model_tensors(infos(network | copies))) == list(copies)


NETWORKS: dict[str, dict[str, tuple[int, ...]]] = {
    "an average alone": {f"model_ema.{name}": shape for name, shape in LAYERS.items()},
    "other shapes": {"model.c.weight": (4, 3, 3, 3), "model_ema.c.weight": (8, 3, 3, 3)},
    "attention called EMA": {
        "model.2.ema.conv1x1.weight": (8, 8, 1, 1),
        "model.2.ema.conv3x3.weight": (8, 8, 3, 3),
        "model.2.ema.conv.weight": (8, 8, 3, 3),
        "model.3.conv.weight": (8, 8, 3, 3),
        "model.4.ema.conv1x1.weight": (8, 8, 1, 1),
        "model.4.ema.conv3x3.weight": (8, 8, 3, 3),
        "model.4.ema.conv.weight": (8, 8, 1, 1),
    },
    "pooling branches": {"att.avg.fc.weight": (8, 4, 1, 1), "att.max.fc.weight": (8, 4, 1, 1)},
    "two optical branches": {"opt_encoder.c.weight": (8, 4, 3, 3), "sar_encoder.c.weight": (8, 4, 3, 3)},
    "steps": {"steps.0.weight": (8, 4, 3, 3), "step.conv.weight": (8, 4, 3, 3)},
    "slow and fast": {"slow.c.weight": (8, 4, 3, 3), "fast.c.weight": (8, 4, 3, 3)},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_with_such_names_are_kept(kind: str) -> None:
    assert not non_model_tensors(infos(NETWORKS[kind]))


def flat() -> dict[str, Tensor]:
    shape = (4, 3, 3, 3)
    return {
        "model.c.weight": torch.randn(shape),
        "model_ema.c.weight": torch.randn(shape),
        "optimizer.state.c.weight.exp_avg": torch.randn(shape),
        "optimizer.state.c.weight.exp_avg_sq": torch.rand(shape),
    }


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_init_leaves_moments_and_averages_alone(suffix: str, tmp_path: Path, convsim: Convsim) -> None:
    before, path = flat(), tmp_path / f"m.{suffix}"
    save_file(before, path) if suffix == "safetensors" else torch.save(before, path)
    document = convsim("init", path, "--iterations", 5, "--json").document
    after = load_file(path) if suffix == "safetensors" else torch.load(path)
    assert {name for name in before if not same_bits(before[name], after[name])} == {"model.c.weight"}
    assert [layer["name"] for layer in document["layers"]] == ["model.c.weight"]
    assert document["total"]["before"] == document["layers"][0]["before"]["cs"]
    reasons = {entry["name"]: entry["reason"] for entry in document["skipped"]}
    assert reasons["optimizer.state.c.weight.exp_avg_sq"] == "optimizer state, not part of the network"
    assert reasons["model_ema.c.weight"].startswith("a copy of another tensor")
    assert len(convsim("measure", path, "--json").document["layers"]) == 1


@pytest.mark.parametrize(
    ("include", "taken"),
    [
        ("*", ["model.c.weight"]),
        ("*.c.weight", ["model.c.weight"]),
        ("model_ema.*", ["model_ema.c.weight"]),
        ("optimizer.state.c.weight.exp_avg", ["optimizer.state.c.weight.exp_avg"]),
    ],
)
def test_include_takes_what_is_set_aside_if_it_asks_for_nothing_else(
    include: str, taken: list[str], tmp_path: Path, convsim: Convsim
) -> None:
    save_file(flat(), tmp_path / "m.safetensors")
    found = convsim("init", tmp_path / "m.safetensors", "--dry-run", "--include", include, "--json").document
    assert [layer["name"] for layer in found["layers"]] == taken


def test_a_first_layer_is_not_depthwise_for_its_moments_and_averages(tmp_path: Path, convsim: Convsim) -> None:
    weight = torch.randn(8, 1, 3, 3)
    names = ("model.c.weight", "model_ema.c.weight", "optimizer.state.c.weight.exp_avg")
    save_file({name: weight.clone() for name in names}, tmp_path / "m.safetensors")
    (layer,) = convsim("measure", tmp_path / "m.safetensors", "--json").document["layers"]
    assert (layer["name"], layer["groups"]) == ("model.c.weight", 1)


@pytest.mark.parametrize("beside", ["exp_avg.", "optimizer.exp_avg_sq.", "shadow.", "swa_model."])
def test_a_network_takes_its_own_weights_whatever_comes_first_in_the_file(beside: str, tmp_path: Path) -> None:
    state = build_network("cnn:4").state_dict()
    both = {beside + name: tensor.clone() for name, tensor in state.items()} | {f"net.{n}": t for n, t in state.items()}
    torch.save(both, tmp_path / "m.pt")
    model, checkpoint = build_network("cnn:4"), open_model_checkpoint(tmp_path / "m.pt").checkpoint
    assert set(match_names(model, checkpoint).values()) == {f"net.{name}" for name in state}
