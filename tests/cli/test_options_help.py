"""A command's `--help` fits one screen; `--help-all` shows every option."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import Convsim
from typer.main import get_command

from convsim_cli.cli import COMMANDS, app
from convsim_cli.measurement.figures import FIGURES
from convsim_cli.methods import METHODS, OBJECTIVE_NAMES
from convsim_cli.reproduction.published import ARMS
from convsim_cli.training.config import MODES

NAMES = [command.__name__ for command in COMMANDS]


def options(command: str) -> list[Any]:
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    return [parameter for parameter in parameters if parameter.param_type_name == "option"]


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("command", NAMES)
def test_help_fits_a_screen_and_names_help_all(command: str, convsim: Convsim) -> None:
    lines = convsim(command, "--help").out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    headline = next(number for number, line in enumerate(lines) if line.startswith("Options (--help-all explains them"))
    assert any(line.strip() == "Examples:" for line in lines[:headline])
    assert convsim(command, "-h").out.splitlines() == lines


@pytest.mark.parametrize("command", NAMES)
def test_help_all_shows_every_option_with_all_of_its_help(command: str, convsim: Convsim) -> None:
    text = convsim(command, "--help-all").out
    assert max(map(len, text.splitlines())) <= 80
    shown, found = words(text), options(command)
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(["--help", *(max(option.opts, key=len) for option in found)])
    assert all(words(option.help) in shown for option in found)


@pytest.mark.parametrize("command", NAMES)
def test_help_says_how_many_more_options_help_all_shows(command: str, convsim: Convsim) -> None:
    text = convsim(command, "--help").out
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)
    (more,) = re.findall(r"explains them, and (\d+) more\):", text)
    assert len(listed) + int(more) == len(options(command)) + 1  # --help itself


@pytest.mark.parametrize("command", ["init", "train"])
def test_help_all_explains_every_method_and_mode(command: str, convsim: Convsim) -> None:
    text = words(convsim(command, "--help-all").out)
    for table in [METHODS, MODES] if command == "train" else [METHODS]:
        assert all(f"{name} {words(entry.meaning)}" in text for name, entry in table.items())
    assert command == "init" or f"One of {', '.join(OBJECTIVE_NAMES)}." in text


def test_help_all_lists_the_arms_and_breaks_no_name_at_a_hyphen(convsim: Convsim) -> None:
    text = convsim("reproduce", "--help-all").out
    assert all(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in ARMS)


def test_figures_are_explained_with_their_units(convsim: Convsim) -> None:
    explained = convsim("measure", "--figures")
    assert (explained.code, explained.err) == (0, "")
    assert max(map(len, explained.out.splitlines())) <= 80
    for figure in FIGURES:
        (line,) = re.findall(rf"^{figure.key} +(\S.*(?:\n .*)*)", explained.out, re.MULTILINE)
        moves = "; depends on the scale of the weights" if figure.moves_with_scale else ""
        unit = f" [{figure.unit}]" if figure.unit else ""
        assert words(line) == words(f"{figure.meaning}{moves}{unit}")
