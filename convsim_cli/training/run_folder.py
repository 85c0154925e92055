"""A run's folder: its arguments, its results, its checkpoints, and how it goes on after an interruption.

`args.json` (the arguments), `results.csv` (a row per epoch), `best.safetensors` and `last.safetensors`, `state.pt` (all
that a bit-exact resume needs) and, once finished, `summary.json`. Every file is replaced whole, and `state.pt` last: it
alone says how far the run has come, and a run that was killed does the unfinished epoch again, to the same result.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.errors import BusyError, InputError
from convsim_cli.training.arguments import Arguments, make_arguments

COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "cs", "seconds")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's folder and its arguments."""

    folder: Path
    arguments: Arguments

    @property
    def name(self) -> str:
        return self.folder.name


def create_run(arguments: Arguments, run_dir: Path, name: str | None) -> Run:
    """Make a folder of its own for a new run, without a name one called after the arguments.

    Raises InputError where the given name is taken; never shares a folder with another process.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.mode}-s{arguments.seed}")
    check_name(stem)
    make_folder(run_dir)
    run = _first_free(arguments, run_dir, [stem] if name else _numbered(stem))
    return run or _refuse_taken(run_dir / stem)


def free_stem(arguments: Arguments, run_dir: Path, name: str | None, seeds: Iterable[int]) -> str:
    """Return what to call the runs STEM-sSEED of several seeds: `name`, or after the arguments a stem that is free.

    Raises InputError where a folder of the given name is taken.
    """
    stem = name or plain_name(f"{arguments.arch}-{arguments.mode}")
    check_name(stem)
    for candidate in [stem] if name else _numbered(stem):
        taken = [folder for seed in seeds if (folder := run_dir / f"{candidate}-s{seed}").exists()]
        if not taken:
            return candidate
    return _refuse_taken(taken[0])


def check_name(name: str) -> None:
    """Raise InputError for a name that is no plain folder name."""
    if Path(name).name != name or name in (".", ".."):
        raise InputError(f"--name {name!r}: expected a plain folder name; its place is --run-dir")


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run-dir {path}: cannot be made ({error.strerror})") from error


def _refuse_taken(folder: Path) -> NoReturn:
    raise InputError(f"{folder}: there already; go on with --resume {folder}, or take another --name")


def find_run(arguments: Arguments, run_dir: Path) -> Run | None:
    """Return the run in `run_dir` that was given these arguments, or None.

    Where the data is does not matter, nor for how many epochs the run was meant: nothing that it does in an epoch
    depends on how many are to follow, so that one of fewer goes on to those asked for. Only one that was meant for more
    and has not done as many yet is left alone. A run with more done comes before one with less.
    """
    found = [run for run in map(_readable_run, sorted(run_dir.glob("*/args.json"))) if run and _fits(run, arguments)]
    return max(found, key=epochs_done, default=None)


def find_or_create_run(arguments: Arguments, run_dir: Path, stem: str) -> Run:
    """Return the run with these arguments, made if need be; two processes that ask at once get the same."""
    make_folder(run_dir)
    with locked(run_dir, wait=True):
        run = find_run(arguments, run_dir) or _first_free(arguments, run_dir, _numbered(stem))
    assert run is not None  # the names are endless
    epochs = max(run.arguments.epochs, arguments.epochs)
    return replace(run, arguments=replace(run.arguments, epochs=epochs))


def epochs_done(run: Run) -> int:
    """Return how many whole epochs stand in a run's results."""
    return len(read_results(run.folder)) if (run.folder / "results.csv").exists() else 0


def is_finished(run: Run, epochs: int) -> bool:
    """Return whether a run has nothing left to do for so many epochs."""
    return epochs_done(run) >= epochs and (run.arguments.epochs > epochs or (run.folder / "summary.json").exists())


def plain_name(text: str) -> str:
    """Return a text as a folder's name."""
    return text.replace(":", "").replace("/", "-")


def open_run(folder: Path, epochs: int | None = None) -> Run:
    """Open a run's folder to go on with it, to more epochs where given.

    Raises InputError for a folder that is not a run, and for arguments that this version does not know.
    """
    path = folder / "args.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run's folder (no readable args.json)") from error
    arguments = make_arguments(values, path)
    return Run(folder, arguments if epochs is None else replace(arguments, epochs=epochs))


def read_results(folder: Path) -> list[Row]:
    """Return a run's `results.csv` as rows of numbers. Raises InputError where there is none."""
    try:
        with (folder / "results.csv").open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are {reader.fieldnames}")
            return [{key: int(row[key]) if key == "epoch" else float(row[key]) for key in COLUMNS} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{folder}: not a run's folder (no readable results.csv: {error})") from error


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def _first_free(arguments: Arguments, run_dir: Path, names: Iterable[str]) -> Run | None:
    """Make the first folder of these names that is not there: whoever makes it has it to itself."""
    for name in names:
        folder = run_dir / name
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        write_json(folder / "args.json", asdict(arguments))
        return Run(folder, arguments)
    return None


def _readable_run(path: Path) -> Run | None:
    """The run of an args.json, or None for one of another version or one just being written."""
    try:
        return open_run(path.parent)
    except InputError:
        return None


def _fits(run: Run, wanted: Arguments) -> bool:
    if replace(run.arguments, epochs=wanted.epochs, data_dir=wanted.data_dir) != wanted:
        return False
    return run.arguments.epochs <= wanted.epochs or epochs_done(run) >= wanted.epochs


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder itself locked: the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{folder}: another process is working on this run") from None
        yield
    finally:
        os.close(descriptor)


def write_results(folder: Path, history: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write_text(folder / "results.csv", text.getvalue())


def write_json(path: Path, document: Any) -> None:
    """Replace a file by a JSON document."""
    _write_text(path, json.dumps(document, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    data = text.encode()
    replace_file(path, lambda file: file.write(data))
