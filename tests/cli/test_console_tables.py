"""Tables fit the terminal: whole numbers and names, without the least important columns, or stacked."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convsim
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import save_file

from convsim_cli.cli import reproduce_command as reproduction_tables
from convsim_cli.cli import run
from convsim_cli.cli.compare_command import HEADERS, LEAST, screen_table
from convsim_cli.cli.console import EDGES, GAP, Console, Progress, fitting_columns
from convsim_cli.cli.train_command import RunScreen
from convsim_cli.training.config import Arguments
from convsim_cli.training.run import Run

WIDTHS = (80, 100, 140)
STYLE = re.compile(r"\x1b\[[0-9;]*m")
Terminal = Callable[[int], Callable[[], list[str]]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Make stdout a terminal of a width; what that gives returns the lines that were written so far."""
    monkeypatch.delenv("COLUMNS", raising=False)
    opened = []

    def of_width(width: int) -> Callable[[], list[str]]:
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        stream = os.fdopen(writer, "w")
        opened.append((reader, stream))
        monkeypatch.setattr("sys.stdout", stream)
        os.set_blocking(reader, False)

        def lines() -> list[str]:
            stream.flush()
            text = b""
            while True:
                try:
                    text += os.read(reader, 65536)
                except BlockingIOError:
                    return [line.rstrip("\r") for line in STYLE.sub("", text.decode()).split("\n")]

        return lines

    yield of_width
    for reader, stream in opened:
        stream.close()
        os.close(reader)


def numerical_rows() -> list[dict[str, Any]]:
    figures = {"reduction_frequency": 71.62, "cos_before": 0.1234, "cos_after": 0.2345}
    figures |= {f"{key}_{part}": 12.345 for key in ("correlation", "decrease", "increase") for part in ("mean", "std")}
    return [
        {"N": n, "optimizer": "Adam", **dict.fromkeys(("published", "measured", "fixed_norms"), figures)}
        for n in (3, 9)
    ]


def trained_rows() -> list[dict[str, Any]]:
    keys = ("best_test_accuracy", "last_test_accuracy", "mean_last5_test_accuracy", "last_train_accuracy")
    found: dict[str, Any] = dict.fromkeys(keys, 79.1634) | {f"{key}_std": 0.4321 for key in keys}
    found |= {"epochs_to_99": 45.5, "cs": 1.234567, "seconds": 4000.0, "epochs": 30, "diverged": 0, "gain": 3.21}
    row = {"arch": "cnn1", "arm": "init-norm-rescaled", "seed": 0, "iterations": 500, "lr": 0.01, "batch_size": 512}
    row |= {"published": {"test_accuracy": 79.16, "gain": 4.5}, "measured": {**found, "baseline": found, "init": found}}
    return [{**row, "cs": [900.0, 1.5]}]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["numerical", *reproduction_tables.EXPERIMENT_TABLES])
def test_a_table_of_the_paper_fits_the_terminal_with_whole_cells(name: str, width: int, terminal: Terminal) -> None:
    if name == "numerical":
        columns, rows = reproduction_tables.numerical_table(numerical_rows())
    else:
        columns, rows = reproduction_tables.EXPERIMENT_TABLES[name](trained_rows())
    lines = terminal(width)
    Console().table(columns, rows, reproduction_tables.LEAST)
    check(lines(), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_compared_groups_fit_the_terminal(width: int, terminal: Terminal) -> None:
    spread = {"mean": 79.1634, "std": 0.4321}
    interval = {"mean": 5.1234, "low": -10.1234, "high": 12.3456, "p": 0.0123, "p_holm": 0.0246}
    group = {"group": "init-norm, lr=0.03", "n": 5, "epochs": 30, "epochs_to_accuracy": {**spread, "reached": 5}}
    group |= dict.fromkeys(HEADERS, spread) | {"difference": dict.fromkeys(HEADERS, interval)}
    lines = terminal(width)
    Console().table(*screen_table([group, group], 60.0), LEAST)
    shown = lines()
    check(shown, width)
    assert any("+5.12 [-10.12, +12.35]" in line for line in shown)


def check(lines: list[str], width: int) -> None:
    """No line is longer than the screen, none was wrapped, and no cell was cut."""
    assert lines
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    header, *rows = (line for line in lines if line.strip())
    assert header.strip()
    assert all(row.strip()[0] != "±" for row in rows)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("first", "second"):
        weight = torch.randn(4, 3, 3, 3)
        state = {"stage.layer1.0.conv1.weight": weight, "stage.layer1.0.conv2.weight": torch.randn(8, 4, 3, 3)}
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / "first.safetensors", tmp_path / "second.safetensors"


@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_command_shows_fits_the_terminal(
    width: int, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.chdir(files[0].parent)
    small = ("--limit-train", "20", "--limit-test", "10", "--epochs", "1", "--arch", "cnn:4", "--dataset", "digits")
    for command in (
        ("init", "first.safetensors", "-o", "new.safetensors", "--iterations", "1", "--probe", "natural"),
        ("init", "first.safetensors", "--dry-run"),
        ("measure", "first.safetensors", "--samples", "1", "--top", "2"),
        ("measure", "first.safetensors", "second.safetensors", "--samples", "1"),
        ("train", *small, "--seeds", "2"),
    ):
        lines = terminal(width)
        assert run([*command]) == 0
        shown = lines()
        check(shown, width)
        if command[0] != "train":
            assert any("stage.layer1.0.conv1.weight" in line for line in shown)


def test_columns_that_do_not_fit_are_named_and_wide_shows_them(
    files: tuple[Path, Path], terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = terminal(80)
    assert run(["measure", str(files[0]), "--samples", "1"]) == 0
    said = capsys.readouterr().err
    assert "hidden to fit 80 characters: " in said
    assert "(--wide shows all)" in said
    header = next(line for line in lines() if "removable" in line).split()
    assert header.count("random") == 2  # chance, of the correlation and of the rank, is never left out
    assert {"filters", "fm_corr", "fm_rank", "removable"} <= {*header}
    assert "kernel_cos" in said and "kernel_cos" not in header
    lines = terminal(80)
    assert run(["measure", str(files[0]), "--samples", "1", "--wide"]) == 0
    assert "hidden to fit" not in capsys.readouterr().err
    assert any("kernel_cos" in line and len(line) > 80 for line in lines())


def test_a_row_that_no_choice_of_columns_fits_is_stacked(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = terminal(80)
    Console().table(["run", "arguments"], [["r" * 70, "a" * 90], ["short", "b"]])
    first = [f"run        {'r' * 70}", f"arguments  {'a' * 90}", ""]
    assert lines() == [*first, "run        short", "arguments  b", ""]
    assert "one line per value" in capsys.readouterr().err


def test_a_name_that_leaves_no_room_stands_on_a_line_of_its_own(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = terminal(80)
    Console().table(["run", "epochs", "accuracy"], [["r" * 70, 30, 79.16], ["short", 5, 1.5]], ["epochs"])
    header, rule, *rows = (line.rstrip() for line in lines() if line.strip())
    assert (header.split(), set(rule.strip())) == (["epochs", "accuracy"], {"─"})  # there is room for both again
    assert [row.split() for row in rows] == [["r" * 70], ["30", "79.16"], ["short"], ["5", "1.5"]]
    assert capsys.readouterr().err == ""


def test_the_main_figures_are_the_last_that_a_narrow_terminal_shows(
    files: tuple[Path, Path], terminal: Terminal
) -> None:
    lines = terminal(60)
    assert run(["measure", str(files[0]), "--samples", "1"]) == 0
    text = " ".join(lines())
    assert all(word in text for word in ("filters", "fm_rank", "random", "removable", "stage.layer1.0.conv1.weight"))


def test_a_comparison_in_80_columns_keeps_what_changed(
    terminal: Terminal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_name in ("before", "after"):
        folder = tmp_path / ("r" * 60) / run_name
        folder.mkdir(parents=True)
        name = "module.backbone.stage.layer1.0.conv1.weight"
        save_file({name: torch.randn(16, 3, 3, 3)}, folder / "last.safetensors")
    paths = [str(tmp_path / ("r" * 60) / run_name / "last.safetensors") for run_name in ("before", "after")]
    lines = terminal(80)
    assert run(["measure", *paths, "--samples", "1"]) == 0
    shown = [line.rstrip() for line in lines() if line.strip()]
    check(shown, 80)
    rule = next(index for index, line in enumerate(shown) if "─" in line)
    header = " ".join(shown[:rule]).split()
    assert header.count("change") == 2
    assert {"filters", "fm_corr", "fm_rank", "removable", "norm", "turned"} <= {*header}
    labels = [line.split() for line in shown[rule + 1 :: 2]]
    assert labels == [[name, "before/last.safetensors"], [name, "after/last.safetensors"]]
    said = capsys.readouterr().err
    assert all(f"{key}_random" in said for key in ("fm_corr", "fm_rank"))  # which are about equal
    closing = (
        r"after/last.safetensors against before/last.safetensors: median turned \d+°, norm [+−]\d+ %, fm_corr [+−]"
    )
    assert re.search(closing, " ".join(said.split()))


def test_a_comparison_with_minute_changes_still_fits(
    terminal: Terminal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"layer{number}.weight": 1e-4 * torch.randn(64, 16, 3, 3) for number in range(4)}
    save_file(state, tmp_path / "one.safetensors")
    moved = {name: weight * (1 + 1e-3 * torch.randn_like(weight)) for name, weight in state.items()}
    save_file(moved, tmp_path / "two.safetensors")
    lines = terminal(80)
    assert run(["measure", *(str(tmp_path / f"{name}.safetensors") for name in ("one", "two")), "--samples", "1"]) == 0
    check(lines(), 80)
    assert "one line per value" not in capsys.readouterr().err


@given(some.lists(some.integers(1, 40), min_size=1, max_size=9), some.integers(10, 200), some.data())
def test_the_columns_chosen_fit_and_no_group_went_in_vain(
    widths: list[int], screen: int, data: some.DataObject
) -> None:
    order = data.draw(some.permutations(range(1, len(widths))))
    least = [[index] for index in order]

    def needs(kept: list[int]) -> int:
        return sum(widths[index] for index in kept) + GAP * (len(kept) - 1) + EDGES

    kept = fitting_columns(widths, least, screen)
    gone = len(widths) - len(kept or [0])
    if kept is None:
        assert needs([0]) > screen
    else:
        assert needs(kept) <= screen
        assert sorted({*range(len(widths))} - {*kept}) == sorted(order[:gone])
        assert not gone or needs(sorted([*kept, order[gone - 1]])) > screen


def test_the_line_to_resume_a_stopped_run_is_printed_after_its_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, convsim: Convsim
) -> None:
    ended: list[bool] = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    @contextmanager
    def bar(*_: object) -> Iterator[Progress]:
        try:
            yield Progress()
        finally:
            ended.append(True)

    monkeypatch.setattr("convsim_cli.training.trainer.Trainer.run_epoch", interrupted)
    monkeypatch.setattr(Console, "progress", bar)
    warn = Console.warn
    monkeypatch.setattr(Console, "warn", lambda self, message: (ended.append(False), warn(self, message))[1])
    small = ("--limit-train", 60, "--limit-test", 10, "--epochs", 1, "--arch", "cnn:4", "--dataset", "digits")
    stopped = convsim("train", *small, "--run-dir", tmp_path, "--name", "a" * 60)
    assert stopped.code == 130
    assert f"--resume {tmp_path / ('a' * 60)}\n" in stopped.err
    assert ended == [True, False]


@pytest.mark.parametrize("validation", [{}, {"validation_accuracy": 99.5, "validation_loss": 1.0}])
@pytest.mark.parametrize(("width", "full"), [(80, False), (100, False), (160, True)])
def test_every_epoch_of_a_run_is_a_line_of_one_form_that_fits_the_terminal(
    width: int, full: bool, validation: dict[str, float], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = terminal(width)
    monkeypatch.setattr("sys.stderr", sys.stdout)
    monkeypatch.setattr(Console, "live", False)
    screen = RunScreen(Console())
    screen.runs.append(Run(Path("run"), Arguments(epochs=100)))
    for epoch in range(1, 101):
        figures = {"train_loss": 2.3 / epoch, "train_accuracy": float(epoch), "test_loss": 1.5, "test_accuracy": 9.87}
        screen.epoch({"epoch": epoch, **figures, **validation, "cs": 12345.6 + epoch, "seconds": 98.76})
    said = [line for line in lines() if line]
    assert [line.split()[1] for line in said] == [f"{epoch}/100" for epoch in range(1, 101)]
    assert all(len(line) <= width and line.endswith(" left") for line in said)
    assert len({re.sub(r"[0-9.]+ (s|min|h)\b|[0-9. ]", "", line) for line in said}) == 1
    assert all(("L_CS" in line) == full for line in said)


@pytest.mark.parametrize("width", WIDTHS)
def test_notes_wrap_at_words_on_a_terminal(
    width: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"runs/{'r' * 150}/model.safetensors"
    sentence = f"not shown: {', '.join(['fm_rank_random', 'cs'] * 12)} (--wide shows all); wrote {path}"
    Console().note(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"
    lines = terminal(width)
    monkeypatch.setattr("sys.stderr", sys.stdout)
    Console().note(sentence)
    said = [line for line in lines() if line]
    assert " ".join(said) == sentence
    assert path in said
    assert all(len(line) <= width for line in said if line != path)


COMMANDS_TO_COPY = (
    f"convsim init '{'my runs/' * 8}last.safetensors' --recover",
    "convsim train --resume runs/cnn1-init-s0 --data-dir /data/cifar-10 --devices 4 --seeds 5",
    "pip install 'convsim[timm]'",
    "pip install -e '.[timm]'",
    """python -c "import sys, numpy, torch; torch.save(numpy.load(sys.argv[1]), sys.argv[2])" a.npy a.pt""",
)


@pytest.mark.parametrize("command", COMMANDS_TO_COPY)
def test_errors_and_warnings_wrap_at_words_but_never_in_a_command(
    command: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = f"this checkpoint cannot be used here and must be repaired before any training: {command}, or similar"
    lines = terminal(80)
    monkeypatch.setattr("sys.stderr", sys.stdout)
    Console().warn(sentence)
    said = [line for line in lines() if line]
    assert " ".join(said) == f"convsim: warning: {sentence}"
    assert any(command in line for line in said)
    assert all(len(line) <= 80 for line in said if command not in line)
    assert run(["measure", "--input", f"no/{'such folder/' * 12}"]) == 2
    assert max(len(line) for line in lines()) <= 80


LONG = (["group", "mean", "difference"], [["a" * 70, "1.5", "+0.25"], ["b" * 70, "2.5", "+7.75"]])


def test_names_above_their_rows_keep_their_own_values_in_any_encoding(terminal: Terminal) -> None:
    def shown(encoding: str) -> list[list[str]]:
        lines = terminal(80)
        sys.stdout.reconfigure(encoding=encoding)  # type: ignore[union-attr]
        Console().table(*LONG)
        return [line.split() for line in lines() if line.strip() and not set(line) <= set(" ─-")]

    for encoding in ("ascii", "latin-1", "utf-8"):
        found = shown(encoding)
        assert found == [["mean", "difference"], ["a" * 70], ["1.5", "+0.25"], ["b" * 70], ["2.5", "+7.75"]]


def test_a_table_without_rows_is_its_header_on_a_narrow_terminal(terminal: Terminal) -> None:
    lines = terminal(36)
    Console(quiet=True).table(["name", "b" * 15, "c" * 15], [])
    assert not any("+0" in line for line in lines())


def test_the_estimate_of_an_experiment_fits_80_columns(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"arch": "cnn1", "batch_size": 512, "runs": 5, "finished": 0, "epochs": 500, "epochs_done": 0}
    row |= {"seconds_per_epoch": 30.25, "seconds": 15125.0}
    content = {"rows": [row, {**row, "arch": "cnn2", "seconds_per_epoch": 76.5}], "runs": 10, "finished": 0}
    content |= {"epochs": 1000, "epochs_done": 0, "seconds": 53375.0, "not_estimated": "saves"}
    monkeypatch.setattr("convsim_cli.reproduction.experiments.estimate_experiment", lambda *_: content)
    lines = terminal(80)
    assert run(["reproduce", "table5", "--dry-run", "-q"]) == 0
    shown = [line for line in lines() if line.strip()]
    assert [line.split()[0] for line in shown[-2:]] == ["cnn1", "cnn2"]
    assert max(map(len, shown)) <= 80
