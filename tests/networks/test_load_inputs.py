"""The input that a network takes is found by a dry run, whatever the order of its layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Convsim, same_bits
from torch import Tensor, nn

from convsim_cli.networks.architectures import build_network
from convsim_cli.networks.load import find_input


class BodyFirst(nn.Module):
    """Defines its body before the layer that takes the images."""

    def __init__(self, channels: int, axes: int = 2) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.attention = nn.Conv1d(1, 1, 3, padding=1)
        self.body = nn.Sequential(*(convolution(8, 8, 3, padding=1) for _ in range(2)))
        self.stem = convolution(channels, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(self.stem(images))
        mean = maps.flatten(2).mean(2)
        return mean * self.attention(mean.unsqueeze(1)).squeeze(1)


class Careful(nn.Module):
    """Catches what its layers raise, and counts, draws and keeps what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(8, 8, 3)
        self.first = nn.Conv2d(5, 8, 3)
        self.norm = nn.BatchNorm2d(5)
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.kept = 0, torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.kept = torch.rand(3)
        self.seen = self.seen + 1
        try:
            return self.late(self.first(self.norm(images)))
        except Exception as error:
            raise ValueError("not such images") from error


class Takes(nn.Sequential):
    """Refuses inputs that are not 24 pixels wide."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 24
        return super().forward(images)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 12, 3, groups=2), nn.Conv2d(12, 4, 1))


CASES: list[tuple[Callable[[], nn.Module], tuple[int, int]]] = [
    (lambda: BodyFirst(1), (1, 2)),
    (lambda: BodyFirst(3), (3, 2)),
    (lambda: BodyFirst(5), (5, 2)),
    (lambda: BodyFirst(2, axes=3), (2, 3)),
    (lambda: BodyFirst(4, axes=1), (4, 1)),
    (Careful, (5, 2)),
    (grouped, (6, 2)),
    (lambda: Takes(nn.Conv2d(1, 4, 3)), (1, 2)),
    (lambda: nn.Sequential(nn.ConvTranspose2d(7, 4, 2), nn.Conv2d(4, 4, 3)), (7, 2)),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_first_convolution_that_runs_decides(case: int) -> None:
    make, expected = CASES[case]
    assert find_input(make(), lambda axes: 24) == expected


def test_a_dry_run_leaves_the_network_as_it_was() -> None:
    model = Careful().train()
    model.norm.eval()
    state, modes = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [m.training for m in model.modules()],
    )
    seen, kept, random = model.seen, model.kept, torch.get_rng_state()
    assert find_input(model, lambda axes: 24) == (5, 2)
    assert same_bits(dict(model.state_dict()), state)
    assert [module.training for module in model.modules()] == modes
    assert (model.calls, model.seen is seen, model.kept is kept) == (0, True, True)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["cnn1", "resnet18", "torchvision:densenet121", "torchvision:shufflenet_v2_x0_5"])
def test_usual_networks_take_three_channels(name: str) -> None:
    assert find_input(build_network(name), lambda axes: 64) == (3, 2)


MINE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(64, 8, 3, padding=1)
        self.stem = nn.Conv2d(1, 64, 3, padding=1)

    def forward(self, images):
        return self.body(self.stem(images))

class Any(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)

    def forward(self, images):
        return self.stem(images.repeat(1, 4 // images.shape[1], 1, 1))
"""


def test_measure_runs_a_network_that_defines_its_input_layer_last(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "body_first.py").write_text(MINE)
    how = ("measure", "--arch", "body_first:Net", "--samples", 2, "--input-size", 16, "--json")
    found = convsim(*how)
    assert found.code == 0, found.err
    assert all(layer["fm_cos"] is not None for layer in found.document["layers"])
    wrong = convsim(*how, "--input-channels", 5)
    assert wrong.code == 2
    assert "does not run on inputs [2, 5, 16, 16]" in wrong.error
    assert "try another --input-size, --input or --input-channels" in wrong.error


def test_input_channels_decide_what_a_network_is_given(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "takes_any.py").write_text(MINE)
    how = ("measure", "--arch", "takes_any:Any", "--samples", 2, "--input-size", 16, "--json")
    one, two, four = (convsim(*how, "--input-channels", n).document["layers"][0]["fm_cos"] for n in (1, 2, 4))
    assert len({one, two, four}) == 3
    assert convsim(*how).document["layers"][0]["fm_cos"] == one
    torch.save({"a.weight": torch.randn(4, 3, 3, 3)}, "m.pt")
    assert "--input-channels requires --arch" in convsim("measure", "m.pt", "--input-channels", 3).error
    refused = convsim(*how[:-1], "--input", "digits", "--input-channels", 1)
    assert "--input-channels applies only to synthetic inputs: the images of --input digits have 3" in refused.error


def test_init_decorrelates_on_the_channels_that_the_network_takes(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "decorrelated.py").write_text(MINE)
    how = (
        "--method",
        "decorrelate",
        "--input",
        "natural",
        "--samples",
        4,
        "--input-size",
        16,
        "-o",
        "m.safetensors",
        "--json",
    )
    found = convsim("init", "--arch", "decorrelated:Net", *how)
    assert found.code == 0, found.err
    assert len(found.document["layers"]) == 2
    after = [
        convsim("init", "--arch", "decorrelated:Any", *how, "--probe", "white", *channels).document["layers"][0][
            "after"
        ]
        for channels in ((), ("--input-channels", 1), ("--input-channels", 4))
    ]
    assert after[0] == after[1] != after[2]
    refused = convsim("init", "--arch", "cnn:4", "-o", "x.safetensors", "--input-channels", 3)
    assert "--input-channels requires --method decorrelate, got --method cs" in refused.error
