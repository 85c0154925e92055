from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Convsim

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_librarys_examples_run_as_they_stand(code: str) -> None:
    found: dict[str, object] = {}
    exec(code, found)
    records = found["records"]
    assert isinstance(records, list)
    assert len(records) == 2


def test_the_main_command_is_the_one_of_the_help(convsim: Convsim) -> None:
    command = "convsim init --arch resnet18 -o model.safetensors"
    assert f"pip install -e . && {command}" in README
    assert command in convsim("--help").out


@pytest.mark.parametrize("command", ["init", "measure", "train", "compare", "reproduce", "plot"])
def test_every_option_that_the_readme_names_exists(command: str, convsim: Convsim) -> None:
    known = set(re.findall(r"--[a-z][\w-]*", convsim(command, "--help").out))
    for line in re.findall(rf"convsim {command} ([^`|\n]*)", README):
        assert set(re.findall(r"--[a-z][\w-]*", line)) <= known, line


def test_the_keys_of_the_example_are_in_the_order_that_a_pipe_gets(convsim: Convsim) -> None:
    columns = convsim("measure", "--arch", "cnn:4", "--samples", 1).out.splitlines()[0].split("\t")
    assert (columns[0], columns[5]) == ("name", "ncs")  # what `cut -f 1,6` in the README takes
