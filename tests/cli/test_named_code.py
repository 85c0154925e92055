"""What a file names is never run: a person has to repeat the name of a callable that `args.json` holds."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Convsim, Start

from convsim_cli.errors import InputError
from convsim_cli.networks.architectures import names_code
from convsim_cli.training.launch import open_to_resume, read_config

SMALL = ("--dataset", "digits", "--epochs", 1, "--limit-train", 60, "--limit-test", 30, "-q")
MODULE = """\
from pathlib import Path
from convsim_cli.networks.architectures import cnn
Path("it-ran").touch()
def payload(num_classes): return cnn(4, num_classes)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module that leaves a file where it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("evil", None)


def forge(arch: str, folder: Path = Path("run")) -> Path:
    """A run's folder that came from elsewhere."""
    folder.mkdir()
    path = folder / "args.json"
    path.write_text(json.dumps({"arch": arch, "dataset": "digits", "epochs": 1, "limit_train": 60, "limit_test": 30}))
    return path


@pytest.mark.parametrize("arch", ["evil:payload", "os:abort", "code:interact", "hf://owner/repo", "timm:hf-hub:a/b"])
@pytest.mark.parametrize("option", ["--resume", "--config"])
def test_a_file_s_network_is_named_and_not_run(option: str, arch: str, here: Path, convsim: Convsim) -> None:
    config = forge(arch)
    given = config.parent if option == "--resume" else config
    outcome = convsim("train", option, given)
    assert outcome.code == 2
    assert f"run/args.json: names the network {arch}, whose code would run; if you trust it" in outcome.error
    assert outcome.error.endswith(f"repeat its name: convsim train {option} {given} --arch {arch}")
    assert {path.name for path in here.iterdir()} == {"evil.py", "run"}
    assert [path.name for path in config.parent.iterdir()] == ["args.json"]


@pytest.mark.parametrize("option", ["--resume", "--config"])
@pytest.mark.usefixtures("here")
def test_the_command_that_is_named_runs_it(option: str, convsim: Convsim) -> None:
    config = forge("evil:payload", Path("a run"))
    outcome = convsim("train", option, config.parent if option == "--resume" else config)
    program, *command = shlex.split(outcome.error.rpartition("repeat its name: ")[2])
    assert (program, convsim(*command).code) == ("convsim", 0)
    assert Path("it-ran").exists()


@pytest.mark.usefixtures("here")
def test_a_name_cannot_hide_in_the_command_to_type(convsim: Convsim) -> None:
    forge("os:abort; touch x\n'$(touch y)'")
    outcome = convsim("train", "--resume", "run")
    assert outcome.err.count("\n") == 1
    typed = shlex.split(outcome.error.rpartition("repeat its name: ")[2])
    assert (len(typed), typed[:-1]) == (6, ["convsim", "train", "--resume", "run", "--arch"])


@pytest.mark.usefixtures("here")
def test_another_network_is_refused_with_resume_and_taken_with_config(convsim: Convsim) -> None:
    forge("evil:payload")
    outcome = convsim("train", "--resume", "run", "--arch", "cnn:4")
    assert (outcome.code, "--arch cnn:4: the run run has evil:payload" in outcome.error) == (2, True)
    assert convsim("train", "--config", "run/args.json", "--arch", "cnn:4", "--name", "new", "-q").code == 0
    assert json.loads(Path("runs/new/args.json").read_text())["arch"] == "cnn:4"
    assert not Path("it-ran").exists()


@pytest.mark.usefixtures("here")
def test_the_library_refuses_it_too() -> None:
    config = forge("evil:payload")
    for call in (lambda: open_to_resume(config.parent, {}), lambda: read_config(config)):
        with pytest.raises(InputError, match="names the network evil:payload, whose code would run"):
            call()
    assert open_to_resume(config.parent, {"arch": "evil:payload"}).arguments.arch == "evil:payload"
    assert "arch" not in read_config(config, {"arch"})


@pytest.mark.usefixtures("here")
def test_commands_that_only_read_runs_import_nothing(convsim: Convsim) -> None:
    assert convsim("train", "--arch", "cnn:4", *SMALL, "--name", "a").code == 0
    config = Path("runs/a/args.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"arch": "evil:payload"}))
    assert convsim("compare", "runs/a").code == 0
    assert convsim("plot", "runs/a").code == 0
    assert convsim("measure", "runs/a/last.safetensors").code == 0
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("arch", ["cnn1", "cnn:4", "resnet18", "torchvision:resnet18", "timm:resnet18.a1_in1k"])
def test_networks_of_the_libraries_need_no_repeating(arch: str) -> None:
    assert not names_code(arch)


def test_the_resume_line_of_your_own_network_repeats_it(here: Path, convsim: Convsim, start: Start) -> None:
    process = start("train", "--arch", "evil:payload", *SMALL, "--epochs", 100_000, "--name", "mine")
    while not (here / "runs" / "mine" / "results.csv").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "resume with: convsim train --resume runs/mine --arch evil:payload" in said
    taken = convsim("train", "--arch", "evil:payload", *SMALL, "--name", "mine")
    assert "resume it with: convsim train --resume runs/mine --arch evil:payload, or" in taken.error
