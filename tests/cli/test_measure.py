from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file

from convsim_cli import measure
from convsim_cli.experiments.networks import build_network
from convsim_cli.probes import make_inputs

LAYER = ("name", "shape", "groups", "assumed", "cs", "ncs", "kernel_cos", "fm_cos", "fm_inner2", "norm", "dead")


def make(path: Path) -> None:
    save_file({"a.weight": torch.randn(8, 3, 3, 3), "b.weight": torch.randn(4, 8, 5, 3)}, path)


def test_the_json_document_has_its_keys_in_their_order(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    document = convsim("measure", tmp_path / "m.safetensors", "--json").document
    assert tuple(document) == ("schema", "command", "source", "input", "layers", "skipped", "total")
    assert document["input"] == "white"
    assert all(tuple(layer) == LAYER for layer in document["layers"])
    assert document["total"]["cs"] == pytest.approx(sum(layer["cs"] for layer in document["layers"]))


def test_several_checkpoints_stand_side_by_side(tmp_path: Path, convsim: Convsim) -> None:
    for name in ("one", "two"):
        make(tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    documents = convsim("measure", *paths, "--json").document["checkpoints"]
    assert [document["source"] for document in documents] == [str(path) for path in paths]
    rows = convsim("measure", *paths).rows
    assert [(row["name"], Path(row["source"]).stem) for row in rows] == [
        ("a.weight", "one"),
        ("a.weight", "two"),
        ("b.weight", "one"),
        ("b.weight", "two"),
    ]


def test_csv_is_the_same_table_with_commas(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    outcome = convsim("measure", tmp_path / "m.safetensors", "--csv")
    assert list(csv.DictReader(io.StringIO(outcome.out))) == convsim("measure", tmp_path / "m.safetensors").rows


def test_without_a_checkpoint_it_takes_the_folders_model_else_a_fresh_cnn1(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = convsim("measure", "--samples", 1)
    assert "a fresh cnn1" in outcome.err
    assert len(outcome.rows) == 4
    make(tmp_path / "model.safetensors")
    outcome = convsim("measure", "--samples", 1)
    assert "measuring model.safetensors" in outcome.err
    assert len(outcome.rows) == 2


def test_with_arch_real_outputs_count_as_in_the_library(convsim: Convsim) -> None:
    document = convsim(
        "measure", "--arch", "cnn:8", "--input", "natural", "--samples", 4, "--seed", 5, "--json"
    ).document
    assert document["layers"] == measure(build_network("cnn:8", seed=5), make_inputs("natural", 4, 3, (32, 32), seed=5))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, convsim: Convsim) -> None:
    make(tmp_path / "m.safetensors")
    first, second = (
        convsim("measure", tmp_path / "m.safetensors", "--input", "natural", "--json").out for _ in range(2)
    )
    assert first == second


def test_a_data_set_gives_real_activations_and_the_test_accuracy(convsim: Convsim) -> None:
    document = convsim("measure", "--arch", "cnn:8", "--input", "digits", "--json").document
    assert 0 <= document["total"]["accuracy"] <= 100
    assert all(layer["fm_cos"] is not None for layer in document["layers"])


def test_a_file_without_kernels_or_with_nan_is_named(tmp_path: Path, convsim: Convsim) -> None:
    torch.save({"linear.weight": torch.randn(4, 4)}, tmp_path / "linear.pt")
    outcome = convsim("measure", tmp_path / "linear.pt")
    assert outcome.code == 2
    assert f"{tmp_path / 'linear.pt'}: no convolution kernels" in outcome.error
    save_file({"a": torch.full((4, 3, 3, 3), torch.nan)}, tmp_path / "nan.safetensors")
    outcome = convsim("measure", tmp_path / "nan.safetensors")
    assert outcome.code == 2
    assert f"{tmp_path / 'nan.safetensors'}: a [4, 3, 3, 3]: 108 of 108 values" in outcome.error


@pytest.mark.parametrize("scale", [1e38, 1e-38])
def test_kernels_at_the_ends_of_float32_are_measured_in_valid_json(
    scale: float, tmp_path: Path, convsim: Convsim
) -> None:
    save_file({"a": torch.rand(4, 3, 3, 3) * scale}, tmp_path / "m.safetensors")
    document = convsim("measure", tmp_path / "m.safetensors", "--json").document
    assert all(document["layers"][0][key] is not None for key in ("cs", "ncs", "kernel_cos", "fm_cos", "norm"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "cnn1", "--input", "wite"], "did you mean 'white'"),
        (["m.safetensors", "--input", "digits"], "needs --arch"),
        (["m.safetensors", "--input", "noise"], "known are"),
        (["m.safetensors", "--arch", "cnn1"], "does not fit --arch"),
        (["--arch", "cnn1", "--input", "cifar10", "--data-dir", "nowhere"], "--data-dir"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], said: str, convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m.safetensors")
    if "nowhere" in arguments:
        monkeypatch.setattr(
            "torchvision.datasets.CIFAR10.download", lambda self: (_ for _ in ()).throw(OSError("no network"))
        )
    outcome = convsim("measure", *arguments)
    assert outcome.code == 2
    assert said in outcome.error
