"""A method, an objective, a training option, a mode and an arm of Table 5 are one entry each, seen everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Convsim, Outcome
from forks import run_code
from safetensors.torch import load_file

from convsim_cli.closed_forms import orthogonalize_weight_
from convsim_cli.methods import METHODS, Method
from convsim_cli.minimize import minimize_
from convsim_cli.networks.architectures import build_network
from convsim_cli.objectives import OBJECTIVES, Objective
from convsim_cli.penalty import ConvSimPenalty

ADDED = """
import dataclasses, json, sys
from convsim_cli import methods, objectives

def halve(kernel, weight):
    return weight / 2

methods.METHODS["halve"] = methods.Method("halve", "half of every weight", of_kernel=halve)
objectives.OBJECTIVES["square"] = objectives.Objective(
    "square",
    lambda filters, _: filters.square().sum() / 2,
    lambda filters, _, out: filters.clone() if out is None else out.copy_(filters), True
)
methods.METHODS["square"] = methods.Method("square", "half of the squared norm")
methods.OBJECTIVE_NAMES += ("square",)  # as where the table stands

from convsim_cli.reproduction import published
from convsim_cli.training import config

@dataclasses.dataclass(frozen=True)
class Arguments(config.Arguments):
    warp: int = config.setting(3, "Warp factor.", "Recipe", metavar="N", above=0)

config.Arguments = Arguments
config.MODES["double"] = config.Mode("double", "both at warp speed", frozenset({"warp", "method"}), initializes=True)
twice = {"mode": "double", "method": "halve", "warp": 9}
published.ARMS["twice"] = published.Arm("twice", "controls", twice, {"cnn1": 12.5})

from convsim_cli.cli import app, run
sys.exit(max(run(command) for command in json.loads(sys.argv[1])) if len(sys.argv) > 1 else app(prog_name="convsim"))
"""

WithEntries = Callable[..., Outcome]


@pytest.fixture
def with_entries() -> WithEntries:
    """Run commands, one after the other, in a process whose tables have one more entry each.

    line: what to complete instead, as bash does.
    """

    def call(*commands: tuple[object, ...], line: str | None = None) -> Outcome:
        lines = [json.dumps([[str(argument) for argument in command] for command in commands])] if commands else []
        shell = {"_CONVSIM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"} if line else {}
        return Outcome(*run_code(ADDED, *lines, environment=shell))

    return call


def test_an_option_and_a_mode_are_seen_in_help_arguments_and_checks(tmp_path: Path, with_entries: WithEntries) -> None:
    (tmp_path / "c.json").write_text('{"warp": 0, "mode": "double"}')
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1)
    double = ("--mode", "double", "--method", "orthogonal")
    ended = with_entries(
        ("train", "--help-all"),
        ("train", *double, "--warp", 5, *small, "--lr", 1e-9, "--run-dir", tmp_path, "--name", "x", "-q"),
        ("train", "--warp", 5, *small, "--run-dir", tmp_path),
        ("train", "--config", tmp_path / "c.json", *small, "--run-dir", tmp_path),
        ("train", "--resume", tmp_path / "x", "--warp", 4),
    )
    text = " ".join(ended.out.split())
    assert "--mode NAME Mode: baseline, init, reg, init+reg, rescale, double." in text
    assert "double both at warp speed" in text
    assert "--warp N Warp factor. [default: 3; x>=1]" in text
    assert json.loads((tmp_path / "x" / "args.json").read_text())["warp"] == 5
    weight = load_file(tmp_path / "x" / "last.safetensors")["0.weight"]
    torch.testing.assert_close(weight, orthogonalize_weight_(build_network("cnn:4").state_dict()["0.weight"]))
    errors = [line for line in ended.err.splitlines() if "convsim: error: " in line]
    assert len(errors) == 3
    assert "--warp requires --mode double, got --mode baseline" in errors[0]
    assert "--warp 0: expected a whole number above 0" in errors[1]
    assert "--warp 4: the run" in errors[2]


@pytest.mark.slow
def test_an_arm_is_seen_in_help_and_table_5(data_dir: Path, tmp_path: Path, with_entries: WithEntries) -> None:
    how = ("--archs", "cnn1", "--arms", "twice", "--limit-train", 32, "--limit-test", 16, "--epochs", 1)
    place = ("--data-dir", data_dir, "--run-dir", tmp_path, "-q")
    ended = with_entries(("reproduce", "--help-all"), ("reproduce", "table5", *how, *place))
    assert ended.code == 0, ended.err
    assert "decorrelate, baseline-lr0.1, twice" in " ".join(ended.out.split())
    (row,) = json.loads((tmp_path / "table5.json").read_text())["rows"]
    assert (row["arm"], row["published"]["test_accuracy"]) == ("twice", 12.5)
    assert json.loads((tmp_path / "cnn1-twice-s0" / "args.json").read_text())["warp"] == 9


def test_an_objective_serves_the_library_init_and_train(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch, with_entries: WithEntries
) -> None:
    half_square = Objective(
        "square",
        lambda filters, _: filters.square().sum() / 2,
        lambda filters, _, out: filters.clone() if out is None else out.copy_(filters),
        norm_only_pointwise=True,
    )
    monkeypatch.setitem(OBJECTIVES, "square", half_square)
    monkeypatch.setitem(METHODS, "square", Method("square", "half of the squared norm"))
    weight = torch.nn.Conv2d(3, 4, 3)
    former = weight.weight.detach().clone()
    assert ConvSimPenalty(weight, objective="square")().item() == pytest.approx(former.square().sum().item() / 2)
    minimize_(weight, 1, lr=0.1, optimizer="sgd", objective="square")
    torch.testing.assert_close(weight.weight.detach(), 0.9 * former)
    output = tmp_path / "m.safetensors"
    how = ("--method", "square", "--iterations", 1, "--optimizer", "sgd", "--lr", 0.1)
    assert convsim("init", "--arch", "cnn:4", "-o", output, *how, "--json").document["method"] == "square"
    fresh = build_network("cnn:4").state_dict()["0.weight"]
    torch.testing.assert_close(load_file(output)["0.weight"], 0.9 * fresh)
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1)
    trained = ("train", "--mode", "reg", "--beta", 1, "--lr", 1e-9, *small, "--run-dir", tmp_path, "-q")
    ended = with_entries(("train", "--help-all"), (*trained, "--objective", "square"), (*trained, "--objective", "nay"))
    assert "One of cs, neighbours, kernel, expected, ocnn, srip, orthoreg, square." in " ".join(ended.out.split())
    assert (tmp_path / "cnn4-reg-square-s0" / "summary.json").exists()
    assert "--objective nay: expected cs, neighbours, kernel, expected, ocnn, srip, orthoreg or square" in ended.err


def test_a_method_is_seen_by_init_train_help_completion_and_json(tmp_path: Path, with_entries: WithEntries) -> None:
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1)
    place = ("--run-dir", tmp_path, "--lr", 1e-9, "-q")
    ended = with_entries(
        ("init", "--help"),
        ("init", "--help-all"),
        ("train", "--help"),
        ("init", "--arch", "cnn:4", "-o", tmp_path / "m.safetensors", "--method", "halve", "-q", "--json"),
        ("train", "--mode", "init", "--method", "halve", *small, *place),
        ("init", "--arch", "cnn:4", "-o", tmp_path / "x.safetensors", "--method", "halve", "--lr", 0.1),
        ("init", "--arch", "cnn:4", "-o", tmp_path / "x.safetensors", "--method", "halvf"),
    )
    text = " ".join(ended.out.split())
    assert text.count("dct, decorrelate, halve, square [cs]") == 2  # the help of init and of train
    assert "halve half of every weight" in text
    document = json.loads("{" + ended.out.partition("\n{")[2].partition("\n}\n")[0] + "}")
    assert (document["method"], document["preserve_norm"]) == ("halve", True)
    fresh = build_network("cnn:4").state_dict()["0.weight"]
    assert torch.equal(load_file(tmp_path / "m.safetensors")["0.weight"], fresh / 2)
    trained = tmp_path / "cnn4-init-halve-s0"
    assert json.loads((trained / "args.json").read_text())["method"] == "halve"
    torch.testing.assert_close(load_file(trained / "last.safetensors")["0.weight"], fresh / 2)
    errors = [line for line in ended.err.splitlines() if "convsim: error: " in line]
    assert "--lr has no effect on --method halve, which is a closed form" in errors[0]
    assert errors[1].endswith("halve or square; did you mean 'halve'?")
    offered = with_entries(line="convsim init --method h").out, with_entries(line="convsim train --method h").out
    assert offered == ("halve\n", "halve\n")
