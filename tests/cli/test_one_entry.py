"""An objective, a training option, a training mode and an arm of Table 5 are one entry each, seen everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file

from convsim_cli.closed_forms import orthogonalize_weight_
from convsim_cli.minimize import minimize_
from convsim_cli.networks.architectures import build_network
from convsim_cli.objectives import OBJECTIVES, Objective
from convsim_cli.penalty import ConvSimPenalty

ADDED = """
import dataclasses, json, sys
from convsim_cli.reproduction import published
from convsim_cli.training import config

@dataclasses.dataclass(frozen=True)
class Arguments(config.Arguments):
    warp: int = config.setting(3, "Warp factor.", "Recipe", above=0)

config.Arguments = Arguments
config.MODES["double"] = config.Mode("double", "orthogonal filters", frozenset({"warp"}), directions="orthogonal")
published.ARMS["twice"] = published.Arm("twice", "controls", {"mode": "double", "warp": 9}, {"cnn1": 12.5})

from convsim_cli.cli import run
sys.exit(max(run(command) for command in json.loads(sys.argv[1])))
"""
Ended = subprocess.CompletedProcess[str]


@pytest.fixture
def with_entries() -> Callable[..., Ended]:
    """Run commands, one after the other, in a process whose tables have one more entry each."""

    def call(*commands: tuple[object, ...]) -> Ended:
        lines = json.dumps([[str(argument) for argument in command] for command in commands])
        return subprocess.run([sys.executable, "-c", ADDED, lines], capture_output=True, text=True, check=False)

    return call


def test_an_option_and_a_mode_are_seen_in_help_arguments_and_checks(
    tmp_path: Path, with_entries: Callable[..., Ended]
) -> None:
    (tmp_path / "c.json").write_text('{"warp": 0, "mode": "double"}')
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1)
    ended = with_entries(
        ("train", "--help"),
        ("train", "--mode", "double", "--warp", 5, *small, "--lr", 1e-9, "--run-dir", tmp_path, "--name", "x", "-q"),
        ("train", "--warp", 5, *small, "--run-dir", tmp_path),
        ("train", "--config", tmp_path / "c.json", *small, "--run-dir", tmp_path),
        ("train", "--resume", tmp_path / "x", "--warp", 4),
    )
    text = " ".join(ended.stdout.split())
    assert "baseline|init|reg|init+reg|rescale|orthogonal|decorrelate|double" in text
    assert "double: orthogonal filters" in text
    assert "--warp N double: warp factor. [default: 3; x>=1]" in text
    assert json.loads((tmp_path / "x" / "args.json").read_text())["warp"] == 5
    weight = load_file(tmp_path / "x" / "last.safetensors")["0.weight"]
    torch.testing.assert_close(weight, orthogonalize_weight_(build_network("cnn:4").state_dict()["0.weight"]))
    errors = [line for line in ended.stderr.splitlines() if "convsim: error: " in line]
    assert len(errors) == 3
    assert "--warp goes with --mode double, got --mode baseline" in errors[0]
    assert "--warp 0: expected a number above 0" in errors[1]
    assert "--warp 4: the run" in errors[2]


def test_an_arm_is_seen_in_help_and_table_5(data_dir: Path, tmp_path: Path, with_entries: Callable[..., Ended]) -> None:
    how = ("--archs", "cnn1", "--arms", "twice", "--limit-train", 32, "--limit-test", 16, "--epochs", 1)
    place = ("--data-dir", data_dir, "--run-dir", tmp_path, "-q")
    ended = with_entries(("reproduce", "--help"), ("reproduce", "table5", *how, *place))
    assert ended.returncode == 0, ended.stderr
    assert "decorrelate, baseline-lr0.1, twice" in " ".join(ended.stdout.split())
    (row,) = json.loads((tmp_path / "table5.json").read_text())["rows"]
    assert (row["arm"], row["published"]["test_accuracy"]) == ("twice", 12.5)
    assert json.loads((tmp_path / "cnn1-twice-s0" / "args.json").read_text())["warp"] == 9


def test_an_objective_serves_the_library_init_and_train(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_square = Objective(
        "square",
        "half of the squared norm",
        lambda filters, _: filters.square().sum() / 2,
        lambda filters, _, out: filters.clone() if out is None else out.copy_(filters),
        norm_only_pointwise=True,
    )
    monkeypatch.setitem(OBJECTIVES, "square", half_square)
    weight = torch.nn.Conv2d(3, 4, 3)
    former = weight.weight.detach().clone()
    assert ConvSimPenalty(weight, objective="square")().item() == pytest.approx(former.square().sum().item() / 2)
    minimize_(weight, 1, lr=0.1, optimizer="sgd", objective="square")
    torch.testing.assert_close(weight.weight.detach(), 0.9 * former)
    output = tmp_path / "m.safetensors"
    how = ("--objective", "square", "--iterations", 1, "--optimizer", "sgd", "--lr", 0.1)
    assert convsim("init", "--arch", "cnn:4", "-o", output, *how, "--json").document["objective"] == "square"
    torch.testing.assert_close(load_file(output)["0.weight"], 0.9 * build_network("cnn:4").state_dict()["0.weight"])
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1)
    trained = ("train", "--mode", "reg", "--beta", 1, "--lr", 1e-9, *small, "--run-dir", tmp_path, "-q")
    assert convsim(*trained, "--objective", "square").code == 0
    assert "known are" in convsim(*trained, "--objective", "nothing of the kind").error


@pytest.mark.parametrize("command", ["init", "train"])
def test_help_names_every_objective(command: str, convsim: Convsim) -> None:
    text = convsim(command, "--help").out
    assert all(name in text for name in OBJECTIVES)
