"""Train many runs: finished ones are reused, unfinished ones resumed. Processes can share a run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convsim_cli.errors import BusyError, DivergedError
from convsim_cli.inputs.images import Dataset
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import find_or_create_run, find_run, is_finished
from convsim_cli.training.run import Row, Run, RunCallbacks, check_resumable, epochs_done, read_results, train_run

POLL = 2.0  # seconds between checks on a run that another process is working on


@dataclass(frozen=True)
class Job:
    """A requested run: its arguments, and the name of its folder if it has to be created."""

    stem: str
    arguments: Arguments


@dataclass(frozen=True)
class Outcome:
    """A run and its rows, for the requested epochs. diverged: why it ended early, if it did."""

    run: Run
    rows: list[Row]
    diverged: str | None = None


@dataclass(frozen=True)
class CampaignCallbacks(RunCallbacks):
    """Callbacks of a campaign, besides those of each run.

    plan: takes the number of runs, of those that are finished, and of the epochs that the others need. end: takes a run
    that was not finished before, once it is, and the epochs that it needed. wait: takes the name of the first run that
    is left, once all that are left belong to other processes.
    """

    plan: Callable[[int, int, int], object] = lambda runs, finished, epochs: None
    end: Callable[[Outcome, int], object] = lambda outcome, epochs: None
    wait: Callable[[str], object] = lambda name: None


def run_all(jobs: Sequence[Job], run_dir: Path, dataset: Dataset, report: CampaignCallbacks) -> list[Outcome]:
    """Train the requested runs that are not finished, and return the outcomes in the order of the jobs.

    A run that another process is working on is skipped, and waited for once nothing else is left. A run that diverges
    is reported, and the others are trained. Raises InputError, before any of them, for an unfinished run that cannot be
    resumed.
    """
    left = {job: epochs_left(job, run_dir) for job in jobs}
    report.plan(len(left), sum(not epochs for epochs in left.values()), sum(left.values()))
    outcomes: dict[Job, Outcome] = {}
    while len(outcomes) < len(left):
        before = len(outcomes)
        for job in left:
            if job not in outcomes:
                try:
                    outcomes[job] = _run_job(job, run_dir, dataset, report)
                except BusyError:
                    continue
                if left[job]:
                    report.end(outcomes[job], left[job])
        if len(outcomes) == before:
            report.wait(next(job.stem for job in left if job not in outcomes))
            time.sleep(POLL)
    return [outcomes[job] for job in jobs]


def epochs_left(job: Job, run_dir: Path) -> int:
    """Return how many epochs a job still needs, 0 if it is finished; a run that only lacks its summary counts as one.

    Raises InputError for an unfinished run that cannot be resumed.
    """
    run, epochs = find_run(job.arguments, run_dir), job.arguments.epochs
    if run is None:
        return epochs
    if is_finished(run, epochs):
        return 0
    check_resumable(run)
    return max(1, epochs - epochs_done(run.folder))


def _run_job(job: Job, run_dir: Path, dataset: Dataset, report: CampaignCallbacks) -> Outcome:
    run = find_or_create_run(job.arguments, run_dir, job.stem)
    epochs, diverged = job.arguments.epochs, None
    if not is_finished(run, epochs):
        try:
            train_run(run, report, dataset)
        except DivergedError as error:
            diverged = str(error)
    return Outcome(run, read_results(run.folder)[:epochs], diverged)
