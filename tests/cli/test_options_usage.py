"""What the parser refuses is said as convsim says everything else: the value found, and what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file
from typer.main import get_command

from convsim_cli.cli import app


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "--optimizer", "foo"), "--optimizer foo: expected adam or sgd"),
        (("init", "--optimizer=adan"), "--optimizer adan: expected adam or sgd; did you mean 'adam'?"),
        (("measure", "--samples", "x"), "--samples x: expected a whole number"),
        (("measure", "--samples", 0), "--samples 0: expected 1 or more"),
        (("measure", "--threshold", 2), "--threshold 2: expected at most 1"),
        (("init", "--lr", "fast"), "--lr fast: expected a number"),
        (("reproduce",), "Missing argument 'NAME'. See convsim reproduce --help"),
        (("--json", "measure", "x.pt"), "--json goes behind the command: convsim measure --json"),
        (("version",), "No such command 'version': expected init, measure, train, compare, reproduce or plot"),
        (("init", "--no-such"), "No such option: --no-such"),
    ],
)
def test_a_refused_value_is_named_with_what_was_expected(
    arguments: tuple[object, ...], said: str, convsim: Convsim
) -> None:
    failed = convsim(*arguments)
    assert failed.code == 2
    assert failed.error.startswith(f"convsim: error: {said}")


DIGITS = "1" * 5000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("m.safetensors", "--groups", "a=2", "--groups", "a=4"), "--groups 'a=4': the same glob has 2 groups above"),
        (("m.safetensors", "--groups", f"a={DIGITS}"), "--groups 'a=111"),
        (("m.safetensors", "--device", f"cuda:{DIGITS}"), "--device cuda:111"),
        (("--arch", "cnn:4", "--input-size", 3_000_000_000), "not enough memory"),
        (("--arch", "cnn:4", "--samples", (1 << 63) - 1), "not enough memory"),
        (("--arch", "cnn:4", "--num-classes", (1 << 63) - 1), "not enough memory"),
        (("--arch", "cnn:4", "--num-classes", 1 << 59), "not enough memory"),
        (("--arch", "cnn:4", "--input-channels", (1 << 63) - 1), "not enough memory"),
        (("m.safetensors", "--input-size", 3_000_000_000), "a [4, 4, 3, 3]: one input and its maps would take"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_numbers_beyond_any_use_are_one_line(
    arguments: tuple[object, ...], said: str, convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.randn(4, 4, 3, 3)}, "m.safetensors")
    failed = convsim("measure", *arguments)
    assert failed.code == (1 if said == "not enough memory" else 2)
    assert failed.error.startswith(f"convsim: error: {said}")


def test_leading_zeros_of_a_width_do_not_count(convsim: Convsim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", DIGITS)
    assert convsim("measure", "--arch", f"cnn:{'0' * 5000}5", "--samples", 1).code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "--objective", "kernel"), "--objective was replaced by --method NAME"),
        (("init", "m.pt", "--objective=kernel"), "--objective was replaced by --method NAME"),
        (("init", "m.pt", "--orthogonal"), "--orthogonal was replaced by --method orthogonal"),
        (("init", "--decorrelate", "cifar10"), "--decorrelate was replaced by --method decorrelate --input INPUT"),
        (("train", "--pairs", "all"), "--pairs was replaced by --objective NAME"),
        (("train", "--mode", "orthogonal"), "--mode orthogonal was replaced by --mode init with --method ort"),
        (
            ("train", "--mode", "decorrelate"),
            "--mode decorrelate was replaced by --mode init with --method dec",
        ),
        (
            ("train", "--mode", "init", "--objective", "kernel"),
            "--objective requires --mode reg, init+reg, got",
        ),
    ],
    ids=str,
)
def test_what_is_gone_names_what_to_type_now(
    arguments: tuple[object, ...], said: str, convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = convsim(*arguments)
    assert failed.code == 2
    assert failed.error.startswith(f"convsim: error: {said}")
    assert not list(tmp_path.iterdir())


def _empty() -> Iterator[tuple[str, ...]]:
    """Every argument and every option of every command, given as nothing."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                yield name, ""
            elif not parameter.is_flag:
                for option in parameter.opts:
                    yield name, option, ""
                    if option.startswith("--"):
                        yield name, f"{option}="


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [*_empty()], ids=" ".join)
def test_an_empty_argument_is_refused_and_named(
    arguments: tuple[str, ...], convsim: Convsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failed = convsim(*arguments)
    assert failed.code == 2
    what = arguments[1].rstrip("=") or "an argument"
    assert failed.error == f"convsim: error: {what} is empty; is a shell variable unset?"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("init", "--dry-run", ""), ("measure", "m.pt", ""), ("plot", "--", ""), ("compare", "-q", "")]
)
def test_an_empty_argument_after_a_flag_is_not_the_flags(arguments: tuple[str, ...], convsim: Convsim) -> None:
    assert convsim(*arguments).error == "convsim: error: an argument is empty; is a shell variable unset?"
