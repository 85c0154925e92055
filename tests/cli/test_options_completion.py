"""What a shell offers after <TAB>."""

from __future__ import annotations

import pytest

from convsim_cli.cli.options import complete_arch
from convsim_cli.cli.reproduce_command import complete_arms, complete_experiment
from convsim_cli.reproduction.experiments import find_experiment
from convsim_cli.reproduction.published import choose_arms


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
