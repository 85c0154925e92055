"""Pretrained networks by name, from the caches that torchvision and timm fill; the network is out of reach here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file, save_file
from torchvision import models

from convsim_cli.networks.architectures import build_network

SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"  # as torchvision names it in its cache


@pytest.fixture
def torchvision_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights of SqueezeNet in torchvision's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    state = models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, folder / SQUEEZENET)
    return state


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights anywhere, and a network that cannot be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # which keeps the proxies that it was made with
    hub = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)


@pytest.fixture
def timm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights of a small network in the Hugging Face cache that timm reads."""
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    stored = tmp_path / "hf" / "models--timm--resnet10t.c3_in1k"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    folder = stored / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    state = timm.create_model("resnet10t").state_dict()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 1000}))
    return dict(state)


def test_pretrained_weights_of_torchvision_are_minimized_and_measured(
    torchvision_cache: dict[str, torch.Tensor], tmp_path: Path, convsim: Convsim
) -> None:
    name, arch = "features.3.expand3x3.weight", "torchvision:squeezenet1_1"
    made = convsim("init", "--arch", arch, "--pretrained", "-o", tmp_path / "m.safetensors", "--iterations", 0, "-q")
    assert made.code == 0, made.err
    assert torch.equal(load_file(tmp_path / "m.safetensors")[name], torchvision_cache[name])
    found = convsim("measure", "--arch", arch, "--pretrained", "--samples", 1, "--input-size", 32, "--json")
    assert found.code == 0, found.err
    norms = {layer["name"]: layer["norm"] for layer in found.document["layers"]}
    assert norms[name] == pytest.approx(torchvision_cache[name].norm().item(), rel=1e-5)


def test_pretrained_weights_of_timm_are_read_from_its_cache(timm_cache: dict[str, torch.Tensor]) -> None:
    model = build_network("timm:resnet10t.c3_in1k", pretrained=True)
    assert all(torch.equal(tensor, timm_cache[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnet10t"])
def test_another_number_of_classes_keeps_all_layers_but_the_last(arch: str, request: pytest.FixtureRequest) -> None:
    cached = request.getfixturevalue("torchvision_cache" if arch.startswith("torchvision") else "timm_cache")
    state = build_network(arch, 10, pretrained=True).state_dict()
    fresh = [name for name, tensor in state.items() if not torch.equal(tensor, cached[name])]
    assert fresh
    assert all(state[name].shape != cached[name].shape for name in fresh)


def test_a_run_starts_from_pretrained_weights_and_says_so_in_its_arguments(
    torchvision_cache: dict[str, torch.Tensor], tmp_path: Path, convsim: Convsim
) -> None:
    how = ("--arch", "torchvision:squeezenet1_1", "--pretrained", "--dataset", "digits", "--lr", 1e-30, "--epochs", 1)
    small = ("--limit-train", 4, "--limit-test", 4, "--run-dir", tmp_path, "--name", "x", "-q")
    assert convsim("train", *how, *small).code == 0
    name = "features.3.expand3x3.weight"
    assert torch.equal(load_file(tmp_path / "x" / "last.safetensors")[name], torchvision_cache[name])
    assert json.loads((tmp_path / "x" / "args.json").read_text())["pretrained"] is True


@pytest.mark.usefixtures("empty_caches")
@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnet10t.c3_in1k"])
def test_without_a_network_one_line_says_what_to_fetch(arch: str, convsim: Convsim) -> None:
    failed = convsim("measure", "--arch", arch, "--pretrained")
    assert failed.code == 1
    assert f"{arch} cannot be fetched" in failed.error
    assert ("squeezenet1_1-b8a52dc0.pth in " if "torchvision" in arch else "HF_HOME") in failed.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("measure", "--arch", "cnn1", "--pretrained"), "--pretrained requires --arch torchvision:NAME or timm:NAME"),
        (("measure", "--arch", "torchvision:resnet19"), "did you mean 'torchvision:resnet18'?"),
        (("measure", "--arch", "timm:resnet10"), "did you mean 'timm:resnet10t'?"),
        (("measure", "--arch", "resnet50"), "did you mean 'torchvision:resnet50'?"),
        (("measure", "--arch", "resnet18.pth"), "convsim measure resnet18.pth"),
        (("measure", "--arch", "json:lod"), "did you mean 'json:load'?"),
    ],
)
def test_a_name_that_cannot_be_used_is_answered_with_one_that_can(
    arguments: tuple[str, ...], message: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = convsim(*arguments)
    assert failed.code == 2
    assert message in failed.error


def test_a_checkpoint_has_weights_of_its_own(tmp_path: Path, convsim: Convsim) -> None:
    save_file(build_network("torchvision:squeezenet1_1").state_dict(), tmp_path / "m.safetensors")
    how = ("--arch", "torchvision:squeezenet1_1", "--pretrained")
    assert "which has weights of its own" in convsim("measure", tmp_path / "m.safetensors", *how).error
    assert "choose one" in convsim("train", *how, "--weights", tmp_path / "m.safetensors").error


def test_a_name_of_pretrained_weights_without_the_flag_is_warned_about(convsim: Convsim, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    made = convsim("init", "--arch", "timm:resnet10t.c3_in1k", "-o", tmp_path / "m.safetensors", "--iterations", 0)
    assert made.err.count("names pretrained weights, but without --pretrained its weights are random") == 1
