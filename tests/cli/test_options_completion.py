"""What a shell offers after <TAB>."""

from __future__ import annotations

import pytest
from forks import run_code

from convsim_cli.cli.options import complete_arch
from convsim_cli.cli.reproduce_command import complete_arms, complete_experiment
from convsim_cli.measurement.figures import FIGURES, shown_keys
from convsim_cli.methods import METHODS, OBJECTIVE_NAMES
from convsim_cli.reproduction.experiments import find_experiment
from convsim_cli.reproduction.published import ALL, ARMS, SETS, choose_arms
from convsim_cli.settings import INPUTS
from convsim_cli.training.config import MODES


def completed(words: str) -> list[str]:
    """What bash offers at the end of a command line."""
    position = str(len(words.split(" ")) - 1)
    line = {"_CONVSIM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
    code, out, _ = run_code("from convsim_cli.cli import app; app(prog_name='convsim')", environment=line)
    assert code == 0
    return out.splitlines()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("convsim measure --sort ", [f"{sign}{key}" for key in shown_keys() for sign in ("", "-")]),
        ("convsim measure --sort fm_", [figure.key for figure in FIGURES if figure.key.startswith("fm_")]),
        ("convsim train --objective ", [*OBJECTIVE_NAMES]),
        ("convsim train --method ", [*METHODS]),
        ("convsim init m.pt --method or", ["orthoreg", "orthogonal"]),
        ("convsim train --mode ", [*MODES]),
        ("convsim reproduce table5 --arms ", [*SETS, ALL, *ARMS]),
        ("convsim init --input ", [*INPUTS]),
        ("convsim train --dataset cif", ["cifar10", "cifar100"]),
        ("convsim measure --input ci", ["cifar10", "cifar100"]),
        ("convsim init --probe ", ["white", "uniform", "natural"]),
        ("convsim init --arch cnn", ["cnn1", "cnn2", "cnn:"]),
    ],
)
def test_the_values_of_an_option_are_completed(words: str, offered: list[str]) -> None:
    assert completed(words) == offered


def test_networks_are_completed_and_those_of_a_library_once_it_is_named() -> None:
    assert complete_arch("cn") == ["cnn1", "cnn2", "cnn:"]
    assert "torchvision:" in complete_arch("")
    assert "torchvision:resnet18" in complete_arch("torchvision:res")


def test_experiments_are_completed_with_names_that_can_be_run() -> None:
    assert complete_experiment("table") == ["table1", "table2", "table3", "table6", "table5"]
    for name in complete_experiment("figure"):
        assert find_experiment(name).name == name


@pytest.mark.parametrize("begun", ["", "baseline,ini", "reg,contr"])
def test_arms_are_completed_item_by_item(begun: str) -> None:
    offered = complete_arms(begun)
    assert offered
    for line in offered:
        assert line.startswith(begun)
        assert choose_arms(tuple(line.split(",")))
