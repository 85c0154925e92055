"""A parameter of several names is changed under each of them, wherever the checkpoint holds it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MINE = """
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.b.weight = self.a.weight

    def forward(self, images):
        return self.c(self.b(self.a(images)))

class Viewed(Tied):
    def __init__(self):
        super().__init__()
        self.register_buffer("flat", self.a.weight.detach().view(-1))
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], nn.Module]]:
    """What makes the user's network; the current folder has it too."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine").Tied
    sys.modules.pop("mine", None)


def copies(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """A state dict that holds the shared kernels twice, each with memory of its own."""
    return {name: tensor.clone() for name, tensor in make().state_dict().items()}


def save_shards(state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    shards = {name: f"{number % 2}.safetensors" for number, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: tensor for name, tensor in state.items() if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def load(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["new.safetensors", "new.pt"])
def test_in_a_new_file_every_name_has_the_new_kernels(name: str, make: Any, tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim("init", "--arch", "mine:Tied", "-o", name, "--iterations", 3, "--json")
    assert [layer["name"] for layer in outcome.document["layers"]] == ["a.weight", "c.weight"]
    saved, first = load(tmp_path / name), outcome.document["layers"][0]
    assert torch.equal(saved["a.weight"], saved["b.weight"])
    assert saved["b.weight"].double().norm().item() == pytest.approx(first["after"]["norm"], rel=1e-12)
    assert first["after"]["cs"] < first["before"]["cs"]
    network = make()
    network.load_state_dict(saved)
    assert torch.equal(network.a.weight, saved["a.weight"])


@pytest.mark.parametrize("prefix", ["", "module.", "net._orig_mod."])
@pytest.mark.parametrize("name", ["old.safetensors", "old.pt", "shards"])
def test_in_an_existing_file_every_name_has_the_new_kernels(
    name: str, prefix: str, make: Any, tmp_path: Path, convsim: Convsim
) -> None:
    state = {prefix + key: tensor for key, tensor in copies(make).items()}
    if name == "shards":
        save_shards(state, tmp_path / name)
    else:
        save_file(state, name) if name.endswith("s") else torch.save(state, name)
    assert convsim("init", name, "--arch", "mine:Tied", "--iterations", 3).code == 0
    saved = load(tmp_path / name)
    assert saved.keys() == state.keys()
    assert torch.equal(saved[f"{prefix}a.weight"], saved[f"{prefix}b.weight"])
    assert not torch.equal(saved[f"{prefix}a.weight"], state[f"{prefix}a.weight"])
    assert torch.equal(saved[f"{prefix}a.bias"], state[f"{prefix}a.bias"])
    measured = convsim("measure", name, "--arch", "mine:Tied", "--input-size", 8, "--json").document
    assert [layer["name"] for layer in measured["layers"]] == [f"{prefix}a.weight", f"{prefix}c.weight"]


@pytest.mark.parametrize("name", ["old.safetensors", "old.pt"])
def test_copies_of_one_parameter_that_differ_are_refused_by_their_names(
    name: str, make: Any, tmp_path: Path, convsim: Convsim
) -> None:
    state = copies(make)
    state["b.weight"][0, 0, 0, 0] += 1
    save_file(state, name) if name.endswith("s") else torch.save(state, name)
    before = (tmp_path / name).read_bytes()
    for command in (("init",), ("measure",)):
        outcome = convsim(*command, name, "--arch", "mine:Tied")
        assert outcome.code == 2
        assert f"{name}: a.weight and b.weight are one parameter of the network, but differ" in outcome.error
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.usefixtures("make")
def test_a_kernel_that_is_saved_in_another_shape_as_well_is_refused(convsim: Convsim) -> None:
    outcome = convsim("init", "--arch", "mine:Viewed", "-o", "x.pt", "--iterations", 1)
    assert "a.weight: shares memory with flat, a tensor of another shape; exclude it" in outcome.error
    exclude = ("--exclude", "[ab].*")
    assert convsim("init", "--arch", "mine:Viewed", "-o", "x.pt", "--iterations", 1, *exclude).code == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("0.", "0._orig_mod.", 1),
        lambda name: name.replace("4.", "4.module._checkpoint_wrapped_module.", 1),
        lambda name: f"model.{name}".replace("model.", "model._fsdp_wrapped_module.", 1),
    ],
)
def test_wrappers_names_are_ignored_and_kept_in_the_file(
    wrap: Callable[[str], str], tmp_path: Path, convsim: Convsim
) -> None:
    convsim("init", "--arch", "cnn:4", "-o", tmp_path / "plain.pt", "--iterations", 0)
    state = {wrap(name): tensor for name, tensor in torch.load(tmp_path / "plain.pt", weights_only=True).items()}
    torch.save(state, tmp_path / "wrapped.pt")
    outcome = convsim("init", tmp_path / "wrapped.pt", "--arch", "cnn:4", "--iterations", 1, "--json")
    assert outcome.code == 0, outcome.err
    assert "no place" not in outcome.err
    assert [layer["name"] for layer in outcome.document["layers"]] == [wrap(f"{n}.weight") for n in (0, 4, 8, 12)]
    assert list(torch.load(tmp_path / "wrapped.pt", weights_only=True)) == list(state)
