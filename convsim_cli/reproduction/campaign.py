"""Carry out many runs: finished ones are reused, unfinished ones resumed. Processes can share a run directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from convsim_cli.errors import BusyError, DivergedError
from convsim_cli.inputs.images import Dataset
from convsim_cli.networks.architectures import build_network
from convsim_cli.training.config import Arguments
from convsim_cli.training.data import used_images
from convsim_cli.training.launch import find_or_create_run, find_run, is_finished
from convsim_cli.training.run import Listener, Row, Run, check_resumable, epochs_done, execute, read_results

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


class Watcher(Listener, Protocol):
    """What a campaign reports. `phase`, `advance` and `row` are those of the current run."""

    def begin(self, runs: int, finished: int, work: float) -> None:
        """`runs` requested, `finished` complete, `work` FLOPs remaining."""

    def run(self, name: str, number: int, epochs: int) -> None:
        """Run `number` of all is the current one."""

    def done(self, work: float) -> None:
        """This many FLOPs are done."""

    def end(self, outcome: Outcome) -> None:
        """The current run has ended."""

    def waiting(self, name: str) -> None:
        """Only runs of other processes are left; this is the first of them."""


def carry_out(jobs: Sequence[Job], run_dir: Path, dataset: Dataset, watcher: Watcher) -> list[Outcome]:
    """Train the requested runs that are not finished, and return the outcomes in the order of the jobs.

    A run that another process is working on is skipped, and waited for once nothing else is left. A run that diverges
    is reported, and the others are trained.
    """
    left = {job: work_left(job, run_dir, dataset) for job in jobs}
    outcomes: dict[Job, Outcome] = {}
    watcher.begin(len(left), sum(not work for work in left.values()), sum(left.values()))
    while len(outcomes) < len(left):
        before = len(outcomes)
        for number, job in enumerate(left, 1):
            if job not in outcomes:
                try:
                    outcomes[job] = _carry_out(job, run_dir, dataset, _Part(watcher, job, number, left[job]))
                except BusyError:
                    continue
        if len(outcomes) == before:
            watcher.waiting(next(job.stem for job in left if job not in outcomes))
            time.sleep(POLL)
    return [outcomes[job] for job in jobs]


def work_left(job: Job, run_dir: Path, dataset: Dataset) -> float:
    """Return the floating-point operations of a job's remaining epochs, 0 if it is finished.

    Raises InputError for an unfinished run that cannot be resumed.
    """
    run = find_run(job.arguments, run_dir)
    if run and is_finished(run, job.arguments.epochs):
        return 0.0
    if run:
        check_resumable(run)
    epochs = job.arguments.epochs - (min(epochs_done(run.folder), job.arguments.epochs - 1) if run else 0)
    return epochs * _epoch_work(job.arguments, dataset)


def _carry_out(job: Job, run_dir: Path, dataset: Dataset, part: _Part) -> Outcome:
    run = find_or_create_run(job.arguments, run_dir, job.stem)
    epochs, diverged = job.arguments.epochs, None
    if not is_finished(run, epochs):
        part.run = run
        try:
            execute(run, part, dataset)
        except DivergedError as error:
            diverged = str(error)
    rows = read_results(run.folder)[:epochs]
    part.end(Outcome(run, rows, diverged))
    return Outcome(run, rows, diverged)


class _Part:
    """A run's listener, which tells the campaign's watcher how many FLOPs its steps are."""

    run: Run | None = None  # None if another process has finished it in the meantime

    def __init__(self, watcher: Watcher, job: Job, number: int, work: float) -> None:
        self._watcher, self._job, self._number, self._left = watcher, job, number, work
        self._epochs, self._step = job.arguments.epochs, 0.0

    def data(self, dataset: Dataset) -> None:
        """All runs have the same images."""

    def phase(self, name: str, steps: int) -> None:
        assert self.run is not None
        self._watcher.run(self.run.name, self._number, self._job.arguments.epochs)
        self._watcher.phase(name, steps)
        epochs = self._job.arguments.epochs - epochs_done(self.run.folder)
        self._step = self._left / max(epochs, 1) / steps if name.startswith("epoch") else 0.0

    def advance(self, steps: int) -> None:
        self._watcher.advance(steps)
        self._done(steps * self._step)

    def row(self, row: Row) -> None:
        self._watcher.row(row)

    def end(self, outcome: Outcome) -> None:
        self._done(self._left)
        if self.run is not None:
            self._watcher.end(outcome)

    def _done(self, work: float) -> None:
        work = min(work, self._left)
        self._left -= work
        self._watcher.done(work)


def _epoch_work(arguments: Arguments, dataset: Dataset) -> float:
    """FLOPs of an epoch: three forward passes for each training image, one for each test image."""
    data = used_images(arguments, dataset)
    height, width = dataset.train.images.shape[1:3]
    return _operations(arguments.arch, height, width) * (3 * len(data.train) + len(data.test))


@cache
def _operations(arch: str, height: int, width: int) -> float:
    """FLOPs of a network on one image, as torch counts them on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build_network(arch).eval()(torch.empty(1, 3, height, width))
    return float(counter.get_total_flops())
