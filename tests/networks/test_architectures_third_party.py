"""Other people's networks by name, through `init` and `measure` as a user runs them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from torch import nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import module_kernels
from convsim_cli.networks.architectures import build_network, find_network

MINE = textwrap.dedent("""
    from torch import nn
    import torch

    class UNet(nn.Module):
        def __init__(self, num_classes=3):
            super().__init__()
            self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.middle = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
            self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2)
            self.head = nn.Conv2d(6, num_classes, 1)

        def forward(self, images):
            return self.head(self.up(torch.relu(self.middle(torch.relu(self.down(images))))))

    def audio():
        return nn.Sequential(nn.Conv1d(1, 8, 9, stride=4), nn.ReLU(), nn.Conv1d(8, 8, 3))

    def video():
        return nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, (1, 3, 3)))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice, self.never = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, images):
            return self.twice(self.twice(self.once(images)))

    def normed():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
                             nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3))

    def number():
        return 3

    def fails():
        raise RuntimeError("my own\\nfailure")

    def takes(width):
        return nn.Conv2d(3, width, 3)

    def lazily():
        from beside import net
        return net()

    def prints():
        print("building")
        return Printing()

    class Printing(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3))

        def forward(self, images):
            print("forward")
            return self[0](images)

    class Asserting(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3))

        def forward(self, images):
            assert images.shape[-1] == 5, "expected 5 pixels"

    class Lazy(nn.Sequential):
        def __init__(self):
            super().__init__(nn.LazyConv2d(8, 3))

    def half():
        return nn.Sequential(nn.Conv2d(3, 8, 3)).half()

    def double():
        return nn.Sequential(nn.Conv2d(3, 8, 3)).double()
""")

NAMES = (
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:regnet_y_400mf",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:googlenet",
    "timm:convnext_atto",
    "mine:UNet",
    "mine:audio",
    "mine:video",
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder has the user's own module in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    yield
    for name in ("mine", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("arch", NAMES)
def test_networks_by_name_go_through_init_and_measure(arch: str, convsim: Convsim) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    size = () if arch in ("mine:audio", "mine:video") else ("--input-size", 64)
    made = convsim("init", "--arch", arch, "-o", "model.safetensors", "--iterations", 3, "--json")
    assert made.code == 0, made.err
    layers = made.document["layers"]
    assert layers
    assert all(layer["after"]["cs"] < layer["before"]["cs"] for layer in layers)
    found = convsim("measure", "model.safetensors", "--arch", arch, "--samples", 1, *size, "--json")
    assert found.code == 0, found.err
    measured = {layer["name"]: layer for layer in found.document["layers"]}
    assert {layer["name"] for layer in layers} <= set(measured)
    assert not any(layer["assumed"] for layer in measured.values())
    for layer in layers:  # the file that init wrote is what is measured
        assert measured[layer["name"]]["cs"] == pytest.approx(layer["after"]["cs"], rel=1e-5)


def test_grouped_and_transposed_layers_are_told_from_the_module() -> None:
    selection = module_kernels(build_network("torchvision:mobilenet_v3_small"))
    assert any(skipped.reason == "depthwise: one filter per group, no pairs" for skipped in selection.skipped)
    assert {kernel.groups for kernel in module_kernels(build_network("torchvision:resnext50_32x4d")).kernels} == {1, 32}
    unet = {kernel.name: kernel for kernel in module_kernels(build_network("mine:UNet")).kernels}
    assert (unet["up.weight"].transposed, unet["up.weight"].groups, unet["up.weight"].filters) == (True, 2, 6)
    assert unet["middle.weight"].groups == 2


def test_layers_that_are_called_twice_or_never_are_said(convsim: Convsim) -> None:
    found = convsim("measure", "--arch", "mine:Tied", "--input-size", 8, "--json")
    assert [layer["calls"] for layer in found.document["layers"]] == [1, 2, 0]
    assert found.document["layers"][2]["fm_cos"] is None
    assert "no inputs reach these layers, so they have no feature maps: never.weight" in found.err
    assert "called more than once, every call counts: twice.weight (2 times)" in found.err


def test_parametrized_weights_are_measured(convsim: Convsim) -> None:
    found = convsim("measure", "--arch", "mine:normed", "--input-size", 16, "--json").document
    assert [layer["name"] for layer in found["layers"]] == ["0.weight", "1.weight", "2.weight"]
    assert all(layer["fm_cos"] is not None for layer in found["layers"])
    assert found["skipped"] == []


def test_the_number_of_classes_goes_where_it_is_taken() -> None:
    assert build_network("torchvision:resnet18", classes=7).fc.out_features == 7  # type: ignore[union-attr]
    assert build_network("torchvision:resnet18").fc.out_features == 1000  # type: ignore[union-attr]
    assert build_network("mine:UNet", classes=5).head.out_channels == 5  # type: ignore[union-attr]
    assert isinstance(build_network("mine:audio", classes=5), nn.Module)  # takes none


def test_a_users_network_repeats_with_its_seed() -> None:
    first, second = (build_network("mine:UNet", seed=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("torchvision:resnet81", "unknown network torchvision:resnet81: did you mean 'torchvision:resnet18'"),
        ("nowhere:Net", "cannot import nowhere"),
        ("mine:Unet", "mine has no callable Unet; did you mean 'mine:UNet'"),
        ("mine:number", "returns a int; expected a torch.nn.Module"),
        ("resnet19", "unknown network 'resnet19': did you mean 'resnet18'"),
        ("mine:fails", "--arch mine:fails: calling fails raised RuntimeError: my own failure"),
        ("mine:takes", "calling takes raised TypeError: takes() missing 1 required positional argument: 'width'"),
        ("mine:Asserting", "does not run on inputs [16, 3, 224, 224] (expected 5 pixels)"),
        ("mine:Lazy", "--arch mine:Lazy: has lazy layers without weights; run it on an input once"),
        ("torn:net", "--arch torn:net: importing torn raised SyntaxError: "),
        ("wrong:net", "--arch wrong:net: importing wrong raised KeyError: 'x'"),
        ("leaves:net", "--arch leaves:net: importing leaves raised SystemExit"),
        ("./mine.py:UNet", "write mine:UNet"),
        ("mine.py:UNet", "write mine:UNet"),
        ("sub/mine:UNet", "write sub.mine:UNet"),
        ("torchvison:resnet18", "cannot import torchvison (No module named 'torchvison'); did you mean torchvision:"),
    ],
)
def test_a_wrong_name_is_one_line_that_helps(arch: str, message: str, convsim: Convsim) -> None:
    for name, text in (("torn", "def net(:"), ("wrong", "raise KeyError('x')"), ("leaves", "raise SystemExit")):
        Path(f"{name}.py").write_text(text)
    outcome = convsim("measure", "--arch", arch)
    assert outcome.code == 2
    assert message in outcome.error


def test_an_unknown_timm_network_gets_a_suggestion() -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="unknown network timm:resnet17: did you mean 'timm:resnet"):
        find_network("timm:resnet17")


def test_without_timm_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, convsim: Convsim) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    outcome = convsim("init", "--arch", "timm:resnet18", "-o", "x.safetensors")
    assert outcome.code == 2
    assert "not installed: pip install 'convsim[timm]'" in outcome.error


def test_a_checkpoint_of_another_network_is_one_line(convsim: Convsim) -> None:
    convsim("init", "--arch", "mine:UNet", "-o", "unet.safetensors", "--iterations", 1)
    outcome = convsim("measure", "unet.safetensors", "--arch", "torchvision:resnet18")
    assert outcome.code == 2
    assert "does not fit --arch: 102 of 122 tensors missing (conv1.weight, " in outcome.error
    assert "8 unexpected (down.bias, " in outcome.error


def test_inputs_that_a_network_cannot_take_are_one_line(convsim: Convsim) -> None:
    outcome = convsim("measure", "--arch", "torchvision:squeezenet1_1", "--input-size", 4)
    assert outcome.code == 2
    assert "--arch torchvision:squeezenet1_1: does not run on inputs [16, 3, 4, 4]" in outcome.error


def test_a_users_callable_is_imported_from_here_and_prints_to_stderr(convsim: Convsim) -> None:
    Path("beside.py").write_text("from mine import prints as net")
    found = convsim("measure", "--arch", "mine:lazily", "--input-size", 8, "--json")
    assert found.code == 0, found.err
    assert len(found.document["layers"]) == 1
    assert "building" in found.err
    assert "forward" in found.err


@pytest.mark.parametrize("arch", ["mine:half", "mine:double"])
def test_networks_in_other_precisions_are_measured_in_float32(arch: str, convsim: Convsim) -> None:
    found = convsim("measure", "--arch", arch, "--input-size", 8, "--samples", 2, "--json")
    assert found.code == 0, found.err
    assert found.document["layers"][0]["fm_cos"] > 0


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_logits_are_built_without_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    taken = {}
    monkeypatch.setattr(models, "get_model_builder", lambda _: lambda **options: taken.update(options) or nn.Identity())
    build_network(f"torchvision:{name}")
    assert taken == {"aux_logits": False}


def test_a_list_of_known_names_is_cut_short() -> None:
    with pytest.raises(InputError, match=r"choose from (\w+, ){12}… \(\d+ in all\)$"):
        find_network("torchvision:zzzzzz")
