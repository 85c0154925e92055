"""Start new runs, one per seed, or resume one, in every process of a launch.

Finished runs are reused and unfinished ones resumed: find the run with given arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convsim_cli.errors import InputError
from convsim_cli.inputs.images import Dataset
from convsim_cli.networks.architectures import CLASSES, build_network
from convsim_cli.training.config import Arguments
from convsim_cli.training.data import identified, load_data
from convsim_cli.training.distributed import Processes, joined
from convsim_cli.training.prepare import check_network
from convsim_cli.training.run import (
    Listener,
    Run,
    create_first_free,
    create_run,
    epochs_done,
    execute,
    free_stem,
    locked,
    make_folder,
    numbered,
    open_run,
    remove_unsaved,
    summary_writer,
)


@dataclass(frozen=True)
class Seeds:
    """Runs STEM-sSEED that have yet to start: `count` of them, from the seed `first`."""

    stem: str
    first: int
    count: int


@dataclass(frozen=True)
class Finished:
    """A run and its summary."""

    run: Run
    summary: dict[str, Any]


Watch = Callable[[Run, Seeds | None], AbstractContextManager[Listener]]  # called before a run, with what is to follow


def start_runs(
    arguments: Arguments, run_dir: Path, name: str | None, seeds: int | None, watch: Watch
) -> list[Finished]:
    """Train new runs and return them with their summaries; on other ranks than 0, nothing.

    name: of the run's folder, or with seeds of the folders NAME-sSEED; from the arguments if None. seeds: how many
    runs, from the arguments' seed on; None for one run. Raises InputError before any folder is created, and as
    `create_run` and `execute`; the folder of a run that failed before its first save is removed.
    """
    run_dir_existed = run_dir.exists()
    with joined(torch.device(arguments.device)) as (processes, _):
        arguments = replace(arguments, processes=processes.size)
        data = processes.rank_zero_first(lambda: _checked_data(arguments))
        finished = []
        for run, rest in _new_runs(arguments, run_dir, name, seeds, processes):
            with watch(run, rest) as listener, _removed_unless_saved(run, processes, run_dir_existed):
                finished.append(Finished(run, execute(run, listener, data, processes)))
    return finished if processes.is_rank_zero else []


@contextmanager
def _removed_unless_saved(run: Run, processes: Processes, keep_parent: bool) -> Iterator[None]:
    """Remove the folder of a run that fails with nothing but its arguments there. An interrupted run is kept."""
    try:
        yield
    except Exception:
        if processes.is_rank_zero:
            remove_unsaved(run, keep_parent)
        raise


def resume_run(run: Run, watch: Watch) -> list[Finished]:
    """Train an interrupted or extended run to its number of epochs; on other ranks than 0, return nothing.

    Raises as `execute`.
    """
    with joined(torch.device(run.arguments.device)) as (processes, _), watch(run, None) as listener:
        finished = Finished(run, execute(run, listener, None, processes))
    return [finished] if processes.is_rank_zero else []


def _checked_data(arguments: Arguments) -> Dataset:
    """A run's data set, after every check that needs no folder."""
    arguments.check()
    if arguments.tensorboard:
        summary_writer()
    build_network(arguments.arch, CLASSES)  # before a data set is downloaded
    dataset = load_data(arguments)
    check_network(arguments, dataset)
    return dataset


def _new_runs(
    arguments: Arguments, run_dir: Path, name: str | None, seeds: int | None, processes: Processes
) -> Iterator[tuple[Run, Seeds | None]]:
    """The runs, each created when its turn comes, with those that follow."""
    if seeds is None:
        yield processes.on_rank_zero(lambda: create_run(arguments, run_dir, name)), None
        return
    numbers = range(arguments.seed, arguments.seed + seeds)
    stem = processes.on_rank_zero(lambda: free_stem(arguments, run_dir, name, numbers))
    for seed in numbers:
        one, left = replace(arguments, seed=seed), numbers[-1] - seed
        run = processes.on_rank_zero(partial(create_run, one, run_dir, f"{stem}-s{seed}"))
        yield run, Seeds(stem, seed + 1, left) if left else None


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
