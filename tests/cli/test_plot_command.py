from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Convsim

from convsim_cli.plots import Curve, draw_runs

SMALL = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 60, "--limit-test", 30, "--batch-size", 20)


def test_runs_are_drawn_as_a_png(tmp_path: Path, convsim: Convsim) -> None:
    for name in ("a", "b"):
        convsim("train", *SMALL, "--epochs", 2, "--run-dir", tmp_path, "--name", name, "-q")
    outcome = convsim("plot", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "x.png", "--json")
    assert outcome.document["output"] == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'x.png'}" in outcome.err


def test_seeds_are_one_curve_and_other_runs_keep_their_names(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Curve] = []
    drawing = "convsim_cli.cli.plot_command.draw_runs"
    monkeypatch.setattr(drawing, lambda curves: draw_runs([*curves, *(drawn.extend(curves) or [])]))
    convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path / "runs", "--seeds", 3, "-q")
    convsim("train", *SMALL, "--epochs", 2, "--run-dir", tmp_path / "runs", "--lr", 0.1, "--name", "fast", "-q")
    outcome = convsim("plot", tmp_path / "runs", "-o", tmp_path / "x.png", "--json")
    assert [(curve.label, len(curve.histories)) for curve in drawn] == [("lr=0.01 (n = 3)", 3), ("fast", 1)]
    assert len(outcome.document["runs"]) == 4


def test_a_folder_that_is_no_run_and_a_missing_extra_are_one_line(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = convsim("plot", tmp_path, "-o", tmp_path / "x.png")
    assert (outcome.code, "not a run's folder" in outcome.error) == (2, True)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (("plot", tmp_path), ("reproduce", "figure1", "--run-dir", tmp_path)):
        outcome = convsim(*arguments)
        assert outcome.code == 2
        assert "pip install 'convsim[plot]'" in outcome.error
    assert not list(tmp_path.iterdir())
