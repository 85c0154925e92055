"""What training shows on the screen: one run, or many runs."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from convsim_cli.cli.console import Console, Progress, duration, remaining

if TYPE_CHECKING:
    from typing_extensions import Self

    from convsim_cli.inputs.images import Dataset
    from convsim_cli.reproduction.campaign import Outcome

CLASSES_NAMED = 10  # in the line about a run's images


class _Screen:
    """A listener that shows something while its `with` block runs."""

    def __init__(self, console: Console) -> None:
        self._console, self._stack = console, ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class RunScreen(_Screen):
    """A training run: a bar per phase on a terminal, and a line per epoch with the time left."""

    def __init__(self, console: Console, epochs: int) -> None:
        super().__init__(console)
        self._epochs = epochs
        self._seconds: list[float] = []
        self._progress = Progress()

    def data(self, dataset: Dataset) -> None:
        """Say what the images are of."""
        names = list(dataset.images_of_classes())
        more = ", … (summary.json lists all)" if len(names) > CLASSES_NAMED else ""
        self._console.note(
            f"{len(names)} classes ({', '.join(names[:CLASSES_NAMED])}{more}), {len(dataset.train)} training and "
            f"{len(dataset.test)} test images"
        )

    def phase(self, name: str, steps: int) -> None:
        """Begin a phase of this many steps."""
        self._stack.close()
        shown = self._console.live or name == "init"  # without a bar, an epoch is one line at its end
        self._progress = self._stack.enter_context(self._console.progress(name, steps if shown else 0))

    def advance(self, steps: int) -> None:
        """Advance the phase."""
        self._progress(steps)

    def row(self, row: dict[str, Any]) -> None:
        """Show the figures of an epoch."""
        self._stack.close()
        self._seconds.append(row["seconds"])
        seconds = (self._epochs - row["epoch"]) * sum(self._seconds) / len(self._seconds)
        whole = f"{_epoch(row, self._epochs)}  {row['seconds']:.1f} s, {duration(seconds)} left"
        self._console.note_fitting(whole, *_shorter(row, self._epochs, seconds))


class CampaignScreen(_Screen):
    """Many runs: one bar for all and a line per run on a terminal, a line per epoch elsewhere."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(console)
        self._name, self._progress = name, Progress()
        self._run, self._runs, self._epochs = "", 0, 0
        self._done = self._work = self._start = 0.0

    def begin(self, runs: int, finished: int, work: float) -> None:
        """Say how many runs there are, and how many of them are reused."""
        reused = f", {finished} of them finished before" if finished else ""
        self._console.note(f"{self._name}: {runs} run{'s' if runs > 1 else ''}{reused}")
        if work and not finished:
            self._console.note("you can stop at any moment; the same command resumes")
        self._runs, self._work, self._start = runs, work, time.monotonic()
        if self._console.live:
            self._progress = self._stack.enter_context(self._console.progress(self._name, work))

    def run(self, name: str, number: int, epochs: int) -> None:
        """Note the current run."""
        self._run, self._epochs = f"{name} ({number} of {self._runs})", epochs

    def data(self, dataset: Dataset) -> None:
        """Do nothing: all runs have the same images."""

    def phase(self, name: str, steps: int) -> None:
        """Show the phase of the current run."""
        self._progress.describe(f"{self._run} {name}")

    def advance(self, steps: int) -> None:
        """Do nothing: `done` advances the bar, by FLOPs."""

    def done(self, work: float) -> None:
        """Advance the bar."""
        self._done += work
        self._progress(work)

    def row(self, row: dict[str, Any]) -> None:
        """Show the figures of an epoch, unless there is a bar."""
        if not self._console.live:
            whole = remaining(self._done, self._work, time.monotonic() - self._start)
            self._console.note(f"{self._run} {_epoch(row, self._epochs)}  {row['seconds']:.1f} s; {self._name} {whole}")

    def end(self, outcome: Outcome) -> None:
        """Show how a run ended."""
        if outcome.diverged:
            self._console.warn(f"{outcome.run.folder}: {outcome.diverged}")
        elif self._console.live:
            best = max(row["test_accuracy"] for row in outcome.rows)
            took = duration(sum(row["seconds"] for row in outcome.rows))
            last = outcome.rows[-1]["test_accuracy"]
            self._console.note(f"{outcome.run.folder}: test accuracy {best:.2f} % at best, {last:.2f} % last, {took}")

    def waiting(self, name: str) -> None:
        """Say that only runs of other processes are left."""
        said = f"waiting for {name}, which another process is training"
        if said != self._run:
            self._run = said
            self._console.note(said)
            self._progress.describe(said)


def _epoch(row: dict[str, Any], epochs: int) -> str:
    validation = f"validation {row['validation_accuracy']:5.2f} %  " if "validation_accuracy" in row else ""
    return (
        f"{_number(row, epochs)}  "
        f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f} %  "
        f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:5.2f} %  "
        f"{validation}L_CS {row['cs']:.4g}"
    )


def _number(row: dict[str, Any], epochs: int) -> str:
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"


def _shorter(row: dict[str, Any], epochs: int, seconds: float) -> list[str]:
    """The figures of an epoch in two shorter lines, the least important ones left out first."""
    validation = f"  validation {row['validation_accuracy']:5.2f} %" if "validation_accuracy" in row else ""
    train, test = f"{row['train_accuracy']:5.2f} %{validation}", f"{row['test_accuracy']:5.2f} %"
    begin, end = f"{_number(row, epochs)}  train", f"  {_roughly(seconds)} left"
    return [
        f"{begin} loss {row['train_loss']:.3f}, {train}  test loss {row['test_loss']:.3f}, {test}{end}",
        f"{begin} {train}  test {test}{end}",
    ]


def _roughly(seconds: float) -> str:
    """A duration in one unit: as long in every line of a run, so that all lines take the same form."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
