"""Trained weights are told from fresh ones, and from what Algorithm 1 leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.checkpoints.formats import StateDict, open_checkpoint
from convsim_cli.kernels import Kernel
from convsim_cli.networks.architectures import build_network
from convsim_cli.networks.load import looks_trained, norm_spread

FRESH = (
    *("cnn1", "cnn2", "cnn:8", "resnet18"),
    *("torchvision:alexnet", "torchvision:squeezenet1_1", "torchvision:resnet18"),
    *("torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5"),
    *("torchvision:mnasnet0_5", "torchvision:googlenet", "torchvision:regnet_y_400mf", "torchvision:efficientnet_b0"),
    *("torchvision:densenet121", "timm:resnet10t", "timm:mobilenetv3_small_050", "timm:convnext_atto"),
    *("timm:efficientnet_lite0", "timm:ghostnet_100", "timm:edgenext_xx_small", "timm:repvgg_a0", "timm:tinynet_e"),
    *("timm:mobilevit_xxs", "timm:resnetv2_50"),
)


def trained(**state: Tensor) -> bool:
    return looks_trained(StateDict(Path("model.pt"), state))


def without_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(("_tracked", "running_mean"))}


def test_a_counter_or_a_running_mean_that_has_moved_is_evidence() -> None:
    fresh = {"bn.running_mean": torch.zeros(4), "bn.num_batches_tracked": torch.tensor(0)}
    assert not trained(**fresh)
    assert trained(**fresh | {"bn.num_batches_tracked": torch.tensor(5)})
    assert trained(**fresh | {"bn.running_mean": torch.ones(4)})
    assert trained(**{"bn.running_mean": torch.ones(4)})
    assert not trained(weight=torch.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("arch", FRESH)
def test_a_fresh_network_does_not_look_trained_even_without_its_batch_norm(arch: str) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    state = build_network(arch).state_dict()
    assert not trained(**state)
    assert not trained(**without_batch_norm(state))


@pytest.mark.parametrize("name", ["resnet20_cifar10.th", "espnet_decoder.pth"])
def test_a_trained_network_shows_in_the_norms_of_its_filters_alone(name: str, checkpoint_dir: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_dir / name)
    state = {name: checkpoint.load(name) for name in checkpoint.tensors}
    assert trained(**without_batch_norm(state))


@pytest.mark.parametrize("preserve_norm", [False, True])
def test_what_init_writes_does_not_look_trained(preserve_norm: bool, tmp_path: Path) -> None:
    fresh, path = tmp_path / "fresh.pt", tmp_path / "model.pt"
    torch.save({"conv.weight": torch.randn(128, 64, 3, 3) / 24}, fresh)
    init_checkpoint(fresh, path, iterations=400, preserve_norm=preserve_norm)
    assert not looks_trained(open_checkpoint(path))


def test_a_record_of_init_says_that_a_spread_is_not_of_training(tmp_path: Path) -> None:
    weight = torch.randn(64, 16, 3, 3) * torch.linspace(0.1, 2, 64)[:, None, None, None]
    for record, expected in ((None, True), ({"convsim.layers": "weight"}, False)):
        save_file({"weight": weight}, tmp_path / "model.safetensors", record)
        assert looks_trained(open_checkpoint(tmp_path / "model.safetensors")) == expected


def test_the_spread_is_that_of_the_norms_against_independent_weights() -> None:
    weight = torch.randn(4096, 4, 3, 3, dtype=torch.float64)
    kernel = Kernel("weight", tuple(weight.shape))
    assert norm_spread(kernel, weight) == pytest.approx(1, abs=0.04)
    norms = torch.linspace(0.5, 1.5, 4096, dtype=torch.float64)  # their coefficient of variation is 1 / √12
    spread = norm_spread(
        kernel, weight / weight.flatten(1).norm(dim=1)[:, None, None, None] * norms[:, None, None, None]
    )
    assert spread == pytest.approx((72 / 12) ** 0.5, rel=1e-3)
    assert norm_spread(kernel, weight[:7].clone().fill_(torch.nan)) is None
