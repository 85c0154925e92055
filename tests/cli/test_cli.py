from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Convsim, Start
from forks import Program, run_code
from safetensors.torch import save_file
from typer.main import get_command

from convsim_cli.cli import SPINS, app, run
from convsim_cli.cli.console import duration, printable, remaining, shape, show
from convsim_cli.errors import quoted

COMMANDS = ("init", "measure", "train", "compare", "reproduce")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command, "-h"] for command in COMMANDS)], ids=" ".join
)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from convsim_cli.cli import run; assert run({arguments}) == 0; assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_documented_with_examples_that_parse(command: str, convsim: Convsim) -> None:
    text = convsim(command, "--help-all").out
    examples = re.findall(r"convsim (\w+) (.*?)(?:  +#.*| \| .*)?$", text.split("Examples:")[1], re.MULTILINE)
    assert len(examples) >= 4
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    for name, arguments in examples:
        assert name == command
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", arguments)) <= options
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert all(parameter.help for parameter in parameters)


def test_unknown_commands_and_options_get_a_suggestion_in_one_line(convsim: Convsim) -> None:
    outcome = convsim("mesure")
    assert outcome.code == 2
    assert "measure" in outcome.error
    outcome = convsim("measure", "--inptu", "white")
    assert outcome.code == 2
    assert "--input" in outcome.error


def test_an_unforeseen_failure_is_one_line_and_exit_1(convsim: Convsim, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("convsim_cli.checkpoint_measure.open_model_checkpoint", fail)
    outcome = convsim("measure", "--arch", "cnn1")
    assert outcome.code == 1
    assert "RuntimeError: first line second line" in outcome.error
    monkeypatch.setenv("CONVSIM_DEBUG", "1")
    with pytest.raises(RuntimeError):
        run(["measure", "--arch", "cnn1"])


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """Run convsim with both streams on a pseudo-terminal and return what it drew."""
    parent, child = pty.openpty()
    process = Program(*arguments, stdout=child, stderr=child, environment=environment)
    os.close(child)
    drawn = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        drawn += piece
    os.close(parent)
    assert process.wait() == 0
    return drawn.decode()


def test_a_narrow_terminal_cuts_neither_names_nor_numbers(tmp_path: Path) -> None:
    name = "a.very.long.name." * 6 + "[bold]weight\x1b[31m"
    save_file({name: torch.randn(4, 3, 3, 3)}, tmp_path / "m.safetensors")
    for kind in ("xterm", "dumb"):
        command = ["measure", "-q", str(tmp_path / "m.safetensors")]
        drawn = on_a_terminal(command, COLUMNS="40", NO_COLOR="1", TERM=kind)
        assert "a.very.long.name." * 6 + "[bold]weight\\x1b[31m" in drawn
        assert "…" not in drawn
        assert "4×3×3×3" in drawn
    assert "\x1b[" not in drawn


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path, start: Start) -> None:
    long = "layer" * 60  # a few rows more than a pipe holds
    save_file({f"{long}.{i}.weight": torch.randn(2, 2, 1, 1) for i in range(300)}, tmp_path / "m.safetensors")
    how = (tmp_path / "m.safetensors", "--samples", 1, "--input-size", 2, "-q")
    process = start("measure", *how, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("name\t")
    process.stdout.close()  # as `head -n 1` does
    assert (process.wait(), process.communicate()[1]) == (0, "")


@pytest.mark.parametrize(
    "page", [("--version",), ("init", "--help"), ("train", "--help-all"), ("measure", "--figures")]
)
def test_a_page_that_nobody_reads_is_no_failure(page: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    shown = subprocess.run([sys.executable, "-m", "convsim_cli", *page], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (shown.returncode, shown.stderr) == (0, b"")


def test_a_path_in_a_command_to_copy_is_an_argument() -> None:
    assert [quoted(path) for path in ("a.pt", "-a.pt", Path("a b/-c"))] == ["a.pt", "./-a.pt", "'a b/-c'"]


def test_no_time_is_estimated_before_a_twentieth_is_done() -> None:
    assert [remaining(done, 100, 10) for done in (0, 4, 5, 50)] == [
        "0 %",
        "4 %",
        "5 %, 3 min 10 s left",
        "50 %, 10 s left",
    ]


def test_a_bar_shows_the_share_that_is_done_and_the_time_left(tmp_path: Path) -> None:
    save_file({"a": torch.randn(32, 16, 3, 3)}, tmp_path / "m.safetensors")
    how = ["--iterations", "1000", "-o", str(tmp_path / "n.safetensors")]
    drawn = on_a_terminal(["init", str(tmp_path / "m.safetensors"), *how], TERM="xterm", COLUMNS="100")
    assert re.search(r"\d+ %, \d+ s left", drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("measure", "model.safetensors", "modle.safetensors"), "modle.safetensors: no such file; did you mean model"),
        (("init", "modle.safetensors"), "modle.safetensors: no such file; did you mean model.safetensors?"),
        (("measure", "--arch", "cnn1", "--input", "photos/"), "--input photos/: no such folder"),
        (("init", "--arch", "cnn1", "--method", "decorrelate", "--input", "no/photos"), "no/photos: no such folder"),
    ],
)
def test_a_wrong_path_is_reported_before_torch_is_imported(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.randn(4, 3, 3, 3)}, tmp_path / "model.safetensors")
    code = f"import sys; from convsim_cli.cli import run; print(run({arguments!r}), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["2", "False"]
    assert message in ended.stderr.splitlines()[-1]


def test_waiting_threads_sleep_unless_the_user_set_how_they_wait() -> None:
    code = "import os; from convsim_cli.cli import share_cores; share_cores(); print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run_code(code)[1] == f"{SPINS}\n"
    for name, value, found in (("OMP_WAIT_POLICY", "active", "None"), ("GOMP_SPINCOUNT", "7", "7")):
        assert run_code(code, environment={name: value})[1] == f"{found}\n"


def test_work_goes_on_when_nobody_reads_stderr(tmp_path: Path, start: Start) -> None:
    save_file({"a": torch.randn(4, 3, 3, 3)}, tmp_path / "m.safetensors")
    process = start("init", tmp_path / "m.safetensors", "--iterations", 1)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "m.safetensors.bak").exists()


def test_without_a_command_the_help_is_shown_as_it_is(convsim: Convsim) -> None:
    assert convsim().out == convsim("--help").out
    assert convsim().code == 0


def test_a_terminal_without_unicode_still_gets_its_table(start: Start) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    process = start("measure", "--arch", "cnn:2", "--samples", 1, "-q", stdout=subprocess.PIPE, environment=ascii_only)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "2\\xd73\\xd73\\xd73" in out


def test_an_error_spells_out_control_characters(tmp_path: Path, convsim: Convsim) -> None:
    save_file({"a\x1b\nb": torch.full((4, 3, 3, 3), torch.nan)}, tmp_path / "m.safetensors")
    assert "a\\x1b\\nb" in convsim("measure", tmp_path / "m.safetensors").error


def test_cells_and_durations_read_as_people_write_them() -> None:
    cells = [show(cell, 4) for cell in (None, True, 3, 1234567.0, 0.000123456, "x")]
    assert cells == ["", "true", "3", "1.235e+06", "0.0001235", "x"]
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3700)] == ["0 s", "59 s", "1 min 1 s", "1 h 1 min"]
    assert shape([64, 3, 3]) == "64×3×3"
    assert printable("a\tb\x1b") == "a\\tb\\x1b"


CUT_SHORT = """
import sys
import convsim_cli.cli
def cut_short(*_, **__):
    exec("raise KeyboardInterrupt")  # as where dataclasses and others make code while a library is imported
convsim_cli.cli.app = cut_short
convsim_cli.cli.main()
"""


def test_an_interruption_ends_with_130_wherever_it_comes(tmp_path: Path) -> None:
    (tmp_path / "cut_short.py").write_text(CUT_SHORT)
    command = [sys.executable, "-m", "cut_short"]  # with -m, Python would end itself by a signal
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=path)
    assert (ended.returncode, ended.stderr) == (130, "convsim: interrupted\n")


WARNED = """
import typer, warnings
import convsim_cli.cli
typer.Typer.__call__ = lambda *_, **__: warnings.warn("two\\nlines")
convsim_cli.cli.main()
"""


def test_a_warning_of_a_library_is_one_line() -> None:
    assert run_code(WARNED) == (0, "", "convsim: warning: two lines\n")


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        ("init", "`lr`: expected a number above 0, got -1", "--lr: expected a number above 0, got -1"),
        ("train", "lower `init_lr` or `beta`", "lower --init-lr or --beta"),
        ("measure", "`input` and `num_classes`", "--input and --num-classes"),
        ("measure", "a name of nothing, `such_as_this`", "a name of nothing, such_as_this"),
        ("init", "name a `checkpoint`", "name a CHECKPOINT"),
    ],
)
def test_arguments_in_an_error_of_the_library_are_shown_as_options(command: str, message: str, shown: str) -> None:
    from convsim_cli.cli import find_command
    from convsim_cli.cli.options import with_options

    assert with_options(message, find_command([command])) == shown


def test_no_line_of_the_main_help_is_longer_than_80_characters(convsim: Convsim) -> None:
    assert max(map(len, convsim("--help").out.splitlines())) <= 80


@pytest.mark.slow
def test_a_terminal_that_is_closed_does_not_end_a_training(tmp_path: Path) -> None:
    small = ["--dataset", "digits", "--arch", "cnn:4", "--epochs", "3", "--limit-test", "20"]
    command = [sys.executable, "-m", "convsim_cli", "train", *small, "--run-dir", str(tmp_path), "--name", "a"]
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdout=child, stderr=child, env=os.environ | {"TERM": "xterm"})
    os.close(child)
    drawn = b""
    while b"epoch 2/3" not in drawn:
        drawn += os.read(parent, 65536)
    os.close(parent)
    process.wait()  # the table at the end has no place to go
    assert (tmp_path / "a" / "summary.json").exists()
