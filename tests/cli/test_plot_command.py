from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
from conftest import Convsim
from matplotlib.figure import Figure

from convsim_cli.plots import Curve, draw_runs

SMALL = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 60, "--limit-test", 30, "--batch-size", 20)


def test_runs_are_drawn_as_a_png(tmp_path: Path, convsim: Convsim) -> None:
    for name in ("a", "b"):
        convsim("train", *SMALL, "--epochs", 2, "--run-dir", tmp_path, "--name", name, "-q")
    outcome = convsim("plot", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "x.png", "--json")
    assert outcome.document["output"] == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'x.png'}" in outcome.err


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Curve], str]]:
    """The curves and the titles of the figures that are drawn."""
    found: list[tuple[list[Curve], str]] = []

    def draw(curves: list[Curve], title: str) -> Figure:
        found.append((curves, title))
        return draw_runs(curves, title)

    monkeypatch.setattr("convsim_cli.cli.plot_command.draw_runs", draw)
    return found


def test_seeds_are_one_curve_and_runs_are_named_by_what_differs(
    tmp_path: Path, convsim: Convsim, drawn: list[tuple[list[Curve], str]]
) -> None:
    convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path / "runs", "--seeds", 3, "-q")
    convsim("train", *SMALL, "--epochs", 2, "--run-dir", tmp_path / "runs", "--lr", 0.1, "--name", "fast", "-q")
    outcome = convsim("plot", tmp_path / "runs", "-o", tmp_path / "x.png", "--json")
    assert [(curve.label, len(curve.histories)) for curve in drawn[0][0]] == [
        ("lr=0.01 (n = 3)", 3),
        ("lr=0.1 (n = 1)", 1),
    ]
    assert drawn[0][1] == "cnn:4, digits, first 30 test images, first 60 training images"
    assert len(outcome.document["runs"]) == 4
    assert convsim("plot", *(tmp_path / "runs").glob("*-s[012]"), "-o", tmp_path / "x.png").code == 0
    assert [curve.label for curve in drawn[1][0]] == ["mode=baseline"]
    assert drawn[1][1].endswith("first 60 training images, 1 epoch, mean ± standard deviation of 3 seeds")


def test_runs_that_differ_in_nothing_are_named_by_their_folders(
    tmp_path: Path, convsim: Convsim, drawn: list[tuple[list[Curve], str]]
) -> None:
    convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--name", "a", "-q")
    for copy in ("b", "more/a"):
        copytree(tmp_path / "a", tmp_path / copy)
    assert convsim("plot", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "x.png").code == 0
    assert convsim("plot", tmp_path / "a", tmp_path / "more/a", "-o", tmp_path / "x.png").code == 0
    assert [[curve.label for curve in curves] for curves, _ in drawn] == [
        ["a", "b"],
        [str(tmp_path / "a"), str(tmp_path / "more/a")],
    ]
    assert drawn[0][1].endswith("1 epoch, seed 0")
    convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--name", "c", "--seed", 1, "-q")
    convsim("plot", *(tmp_path / name for name in "abc"), "-o", tmp_path / "x.png")
    assert drawn[2][1].endswith("1 epoch")  # no curve is a mean


def test_runs_on_different_test_images_are_drawn_with_a_warning(tmp_path: Path, convsim: Convsim) -> None:
    convsim("train", *SMALL, "--epochs", 1, "--run-dir", tmp_path, "--name", "a", "-q")
    assert "different images" not in convsim("plot", tmp_path, "-o", tmp_path / "x.png").err
    convsim("train", *SMALL, "--limit-test", 20, "--epochs", 1, "--run-dir", tmp_path, "--name", "b", "-q")
    said = "these runs were tested on different images: digits, first 20 test images; digits, first 30 test images"
    assert said in convsim("plot", tmp_path, "-o", tmp_path / "x.png").err


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim("plot", tmp_path, "-o", tmp_path / "x.png")
    assert (outcome.code, "not a run's folder" in outcome.error) == (2, True)
    assert not list(tmp_path.iterdir())
