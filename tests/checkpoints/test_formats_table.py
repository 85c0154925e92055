"""A checkpoint format is one entry in one table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Convsim
from forks import run_code

ADDED = """
import io, json, sys
import torch
from convsim_cli.checkpoints import formats
from convsim_cli.checkpoints.formats import Format


def open_lines(source):
    from convsim_cli.checkpoints.formats import StateDict

    lines = source.path.read_text().splitlines()[1:]
    return StateDict(source.path, {name: torch.tensor(values) for name, values in map(json.loads, lines)})


def write_lines(file, state, record):
    lines = [json.dumps([name, tensor.tolist()]) for name, tensor in state.items()]
    file.write("\\n".join(["LINES", *lines]).encode())


formats.FORMATS += (
    Format("a file of lines", (".lines",), lambda _, start: start.startswith(b"LINES"), open_lines, write_lines),
)
from convsim_cli.cli import run

for command in (
    ["init", "--help"],
    ["init", "--arch", "cnn:4", "-o", "made.lines", "--iterations", "1", "-q"],
    ["measure", "made.lines", "--samples", "1", "-q"],
    ["init", "made.lines", "--iterations", "1", "-q"],
    ["init", "--arch", "cnn:4", "-o", "x.h5"],
    ["measure", "unknown"],
    ["measure", "made.lines", "--key", "a"],
):
    print("=>", run(command))
"""


def test_one_entry_makes_a_format_known_to_open_write_back_errors_and_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unknown").write_bytes(b"unknown")
    monkeypatch.chdir(tmp_path)
    code, out, err = run_code(ADDED)
    assert code == 0, err
    help_text, *ends = out.split("=>")
    assert [end.split()[0] for end in ends] == ["0", "0", "0", "0", "2", "2", "2"]
    assert "A .safetensors, .pt, .pth, .th, .bin, .ckpt or .lines file" in " ".join(help_text.split())
    assert out.count("12.weight") == 3  # init, measure, init
    assert (tmp_path / "made.lines").read_text().startswith("LINES")
    assert (tmp_path / "made.lines.bak").read_text().startswith("LINES")
    [suffix, unknown, key] = [line for line in err.splitlines() if "error" in line]
    assert "x.h5: unknown suffix .h5; name it .safetensors, .pt, .pth, .th, .bin, .ckpt or .lines" in suffix
    assert "not a checkpoint (.safetensors, .pt, .pth, .th, .bin, .ckpt or .lines)" in unknown
    assert "--key applies only to pickled checkpoints; made.lines is a file of lines" in key


@pytest.mark.parametrize("name", ["x.h5", "x", "x.safetensors.old"])
def test_a_name_of_no_known_format_is_refused(
    name: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.randn(4, 3, 3, 3)}, "model.pt")
    for command in (["--arch", "cnn:4"], ["model.pt"]):
        outcome = convsim("init", *command, "-o", name, "--iterations", 1)
        assert outcome.code == 2
        assert ".pt, .pth, .th, .bin or .ckpt" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_file_with_another_suffix_can_still_be_saved_in_place(tmp_path: Path, convsim: Convsim) -> None:
    torch.save({"a.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "model.weights")
    assert convsim("init", tmp_path / "model.weights", "--iterations", 1).code == 0
    assert (tmp_path / "model.weights.bak").exists()
