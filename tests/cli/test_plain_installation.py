"""Without any extra, the first example of every help runs as it is shown, in the order of the commands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import Convsim

from convsim_cli.cli import COMMANDS
from convsim_cli.inputs.datasets import DATASETS
from convsim_cli.inputs.images import Dataset, Split

PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
MODULES = {"scikit-learn": "sklearn"}  # by distribution, where the names differ
SHORTER = {  # than the example by itself
    "init": ("--iterations", "2"),
    "train": ("--limit-train", "20", "--limit-test", "10"),
}


def extras() -> dict[str, str]:
    """Each extra of pyproject.toml for users, with the module that it brings."""
    section = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lines = re.findall(r'^(\w+) = \["([\w-]+)"\]$', section, re.MULTILINE)
    return {extra: MODULES.get(distribution, distribution) for extra, distribution in lines}


def examples(command: str, convsim: Convsim) -> list[list[str]]:
    """The examples of a command's help as arguments."""
    text = convsim(command, "--help").out.replace("\\\n", "")
    return [shlex.split(line, comments=True) for line in re.findall(r"^ +convsim (.*)", text, re.MULTILINE)]


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without extras, in an empty folder, with a few black images as CIFAR-10."""
    for module in extras().values():
        for name in {module, *(name for name in sys.modules if name.startswith(f"{module}."))}:
            monkeypatch.setitem(sys.modules, name, None)
    split = Split(torch.zeros(40, 32, 32, 3, dtype=torch.uint8), torch.arange(40) % 10)
    monkeypatch.setitem(DATASETS, "cifar10", lambda _: Dataset("cifar10", split, split, 10, (0.5,) * 3, (0.3,) * 3))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("plain", "few_steps")
def test_the_first_example_of_every_help_runs_without_an_extra(convsim: Convsim) -> None:
    for command in (function.__name__ for function in COMMANDS):
        first, *_ = examples(command, convsim)
        outcome = convsim(*first, *SHORTER.get(command, ()))
        assert outcome.code == 0, (first, outcome.err)
        if command == "train":  # of which `compare` and `plot` show several
            assert convsim(*first, *SHORTER["train"], "--mode", "rescale", "--factor", 0.5, "--name", "cnn1-init-s0")
    assert Path("curves.png").is_file()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("demo", ("train", "--dataset", "digits")),
        ("hub", ("measure", "hf://owner/repo")),
        ("tensorboard", ("train", "--tensorboard")),
        ("timm", ("measure", "--arch", "timm:resnet18")),
    ],
)
def test_a_missing_extra_is_named_as_from_an_index_and_in_a_clone(
    extra: str, arguments: tuple[str, ...], convsim: Convsim
) -> None:
    assert extra in extras()
    outcome = convsim(*arguments)
    assert outcome.code == 2
    assert f"not installed: pip install 'convsim[{extra}]', or in a clone pip install -e '.[{extra}]'" in outcome.error
    assert not list(Path().iterdir())
