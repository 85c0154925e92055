"""The closed forms on a checkpoint: `init --method orthogonal` and `--method decorrelate`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.closed_forms import decorrelate_, orthogonalize_
from convsim_cli.errors import InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.networks.architectures import build_network

DECORRELATE = ("--method", "decorrelate", "--input")
KERNELS = ("0.weight", "4.weight", "8.weight", "12.weight")


def norms(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].flatten(1).double().norm(dim=1) for name in KERNELS])


def test_orthogonal_is_the_closed_form_of_the_library_on_any_checkpoint(tmp_path: Path, convsim: Convsim) -> None:
    model = build_network("cnn:8")
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(former, tmp_path / "m.safetensors")
    document = convsim(
        "init", tmp_path / "m.safetensors", "--method", "orthogonal", "--probe", "white", "--json"
    ).document
    assert (document["method"], document["iterations"], document["lr"]) == ("orthogonal", 0, None)
    assert document["preserve_norm"] is True
    assert "fm_corr" in document["layers"][0]["after"]
    records = orthogonalize_(model)
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert [layer["after"]["cs"] for layer in document["layers"]] == [record["after"]["cs"] for record in records]
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["convsim.method"] == "orthogonal"


def test_decorrelate_is_the_closed_form_of_the_library(tmp_path: Path, convsim: Convsim) -> None:
    model = build_network("cnn:8")
    digits = ("--method", "decorrelate", "--input", "digits", "--samples", 100)
    output = tmp_path / "m.safetensors"
    document = convsim("init", "--arch", "cnn:8", *digits, "-o", output, "--json").document
    assert (document["method"], document["iterations"], document["lr"]) == ("decorrelate", 0, None)
    assert document["preserve_norm"] is True
    assert [layer["name"] for layer in document["layers"]] == list(KERNELS)
    assert document["layers"][0]["before"]["norm"] == pytest.approx(document["layers"][0]["after"]["norm"])
    assert document["total"]["before"] != document["total"]["after"]
    data = load_dataset("digits", tmp_path)
    decorrelate_(model, data.normalize(data.train.images[:100]))
    assert all(torch.equal(tensor, load_file(output)[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_decorrelate_keeps_types_names_and_dead_filters_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {f"net.{name}": tensor.clone() for name, tensor in build_network("cnn:8").state_dict().items()}
    for name in KERNELS:
        state[f"net.{name}"] = state[f"net.{name}"].to(dtype)
    state["net.4.weight"][3] *= 0 if dtype == torch.float16 else 1e-20 / 3
    save_file(state, tmp_path / "m.safetensors")
    init_checkpoint(tmp_path / "m.safetensors", arch="cnn:8", method="decorrelate", input="white", samples=8)
    found = load_file(tmp_path / "m.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in state.items()}
    assert torch.equal(found["net.4.weight"][3], state["net.4.weight"][3])
    assert not torch.equal(found["net.4.weight"][2], state["net.4.weight"][2])
    before, after = ({k: s[f"net.{k}"] for k in KERNELS} for s in (state, found))
    torch.testing.assert_close(norms(after), norms(before), rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-9)


def test_a_dry_run_of_decorrelate_names_it_and_changes_nothing(convsim: Convsim) -> None:
    document = convsim("init", "--arch", "cnn:4", *DECORRELATE, "white", "--dry-run", "--json").document
    assert (document["method"], document["output"]) == ("decorrelate", None)
    assert "after" not in document["layers"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--method", "orthogonal", "--preserve-norm"),
            "--method orthogonal already keeps every filter's norm; remove",
        ),
        (
            (*DECORRELATE, "white", "--iterations", 5),
            "--iterations has no effect on --method decorrelate",
        ),
        (("--method", "orthogonal", "--lr", 0.1), "--lr has no effect on --method orthogonal"),
        (("--method", "orthogonal", "--optimizer", "sgd"), "--optimizer has no effect on --method orthogonal"),
        (("--method", "decorrelate"), "--method decorrelate requires --input, for instance cifar10"),
        ((*DECORRELATE, "nowhere"), "'nowhere'"),
        ((*DECORRELATE, "white", "--mean", "0,0,0"), "--mean and --std normalize images"),
        (("--input-size", 16), "--input-size requires --method decorrelate, got --method cs"),
        (
            (*DECORRELATE, "white", "--input-size", 4),
            "does not run on inputs .256, 3, 4, 4.* try another --input-size",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(
    options: tuple[object, ...], said: str, tmp_path: Path, convsim: Convsim
) -> None:
    outcome = convsim("init", "--arch", "cnn:4", "-o", tmp_path / "m.safetensors", *options)
    assert outcome.code == 2
    assert re.search(said, outcome.error), outcome.error
    assert not (tmp_path / "m.safetensors").exists()


def test_decorrelate_needs_the_network(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="`method` decorrelate requires `arch`: the inputs run through"):
        init_checkpoint(tmp_path / "m.safetensors", method="decorrelate", input="white")
