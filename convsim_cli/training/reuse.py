"""Finished runs are reused and unfinished ones resumed: find the run with given arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convsim_cli.errors import InputError
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.results import epochs_done
from convsim_cli.training.run_data import identified
from convsim_cli.training.run_folder import Run, create_first_free, locked, make_folder, numbered, open_run


def find_run(arguments: Arguments, run_dir: Path) -> Run | None:
    """Return the run in `run_dir` with these arguments that has done most epochs, or None.

    Neither the place of the data nor the number of epochs has to agree: no epoch depends on how many follow, so a
    shorter run can be continued, and a longer one serves with its first epochs. With a cosine schedule every epoch
    does, and only a run of the same length serves. A run configured for more epochs that has not yet reached the
    requested number is not reused.
    """
    arguments = identified(arguments)
    runs = (_readable_run(path) for path in sorted(run_dir.glob("*/args.json")))
    return max((run for run in runs if run and _serves(run, arguments)), key=_done, default=None)


def find_or_create_run(arguments: Arguments, run_dir: Path, stem: str) -> Run:
    """Return the run with these arguments, created if there is none. Processes that ask at once get the same run."""
    make_folder(run_dir)
    with locked(run_dir, wait=True):
        run = find_run(arguments, run_dir) or create_first_free(arguments, run_dir, numbered(stem))
    assert run is not None  # there is always a free number
    epochs = max(run.arguments.epochs, arguments.epochs)
    here = replace(run.arguments, epochs=epochs, data_dir=arguments.data_dir, dataset=arguments.dataset)
    return replace(run, arguments=here)


def is_finished(run: Run, epochs: int) -> bool:
    """Return whether a run has done this many epochs, and has its summary unless it is meant to go on."""
    return _done(run) >= epochs and (run.arguments.epochs > epochs or (run.folder / "summary.json").exists())


def _done(run: Run) -> int:
    return epochs_done(run.folder)


def _serves(run: Run, wanted: Arguments) -> bool:
    if run.arguments.identity() != wanted.identity():
        return False
    return run.arguments.epochs <= wanted.epochs or _done(run) >= wanted.epochs


def _readable_run(path: Path) -> Run | None:
    """The run of an args.json; None for one of a later version, or one that is being written."""
    try:
        return open_run(path.parent)
    except InputError:
        return None
