from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convsim_cli.errors import BusyError, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction import campaign
from convsim_cli.reproduction.campaign import Job, Outcome, carry_out, work_left
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import find_run
from convsim_cli.training.run import Silence, create_run, epochs_done, execute, open_run, read_results

SMALL = Arguments(arch="cnn:4", dataset="digits", epochs=2, batch_size=20, iterations=5, limit_train=60, limit_test=30)
JOBS = [Job("base", SMALL), Job("init", replace(SMALL, mode="init"))]


class Notes(Silence):
    """A watcher that writes down what it is told."""

    def __init__(self, stop_at: Callable[[], bool] = lambda: False) -> None:
        self.said: list[Any] = []
        self.total = self.worked = 0.0
        self._stop_at = stop_at

    def begin(self, runs: int, finished: int, work: float) -> None:
        self.said.append((runs, finished))
        self.total = work

    def run(self, name: str, number: int, epochs: int) -> None:
        if (name, number) not in self.said:
            self.said.append((name, number))

    def done(self, work: float) -> None:
        self.worked += work

    def row(self, row: dict[str, Any]) -> None:
        if self._stop_at():
            raise KeyboardInterrupt

    def end(self, outcome: Outcome) -> None: ...

    def waiting(self, name: str) -> None:
        self.said.append(f"waiting for {name}")


class Stop(Silence):
    """Stops a run after so many epochs, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def row(self, row: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path())


def accuracies(outcomes: list[Outcome]) -> list[list[float]]:
    return [[row["test_accuracy"] for row in outcome.rows] for outcome in outcomes]


def test_finished_runs_are_reused_whatever_their_name_and_data_dir(tmp_path: Path, digits: Dataset) -> None:
    mine = create_run(replace(SMALL, data_dir="elsewhere"), tmp_path, "mine")
    execute(mine, dataset=digits)
    written = (mine.folder / "state.pt").stat().st_mtime_ns
    notes = Notes()
    outcomes = carry_out(JOBS, tmp_path, digits, notes)
    assert notes.said == [(2, 1), ("init", 2)]
    assert outcomes[0].run.folder == mine.folder
    assert (mine.folder / "state.pt").stat().st_mtime_ns == written
    assert outcomes[0].rows == read_results(mine.folder)
    assert notes.worked == pytest.approx(notes.total)


def test_a_longer_run_is_reused_for_its_first_epochs_and_not_changed(tmp_path: Path, digits: Dataset) -> None:
    longer = create_run(replace(SMALL, epochs=3), tmp_path, "longer")
    with pytest.raises(KeyboardInterrupt):
        execute(longer, Stop(after=2), digits)
    (outcome,) = carry_out(JOBS[:1], tmp_path, digits, Notes())
    assert outcome.run.folder == longer.folder
    assert [row["epoch"] for row in outcome.rows] == [1, 2]
    assert epochs_done(longer.folder) == 2
    (alone,) = carry_out(JOBS[:1], tmp_path / "alone", digits, Notes())
    assert accuracies([outcome]) == accuracies([alone])


def test_a_shorter_run_is_resumed_to_the_requested_epochs(tmp_path: Path, digits: Dataset) -> None:
    shorter = create_run(replace(SMALL, epochs=1), tmp_path, "shorter")
    execute(shorter, dataset=digits)
    (outcome,) = carry_out(JOBS[:1], tmp_path, digits, Notes())
    (alone,) = carry_out(JOBS[:1], tmp_path / "alone", digits, Notes())
    assert outcome.run.folder == shorter.folder
    assert accuracies([outcome]) == accuracies([alone])
    assert open_run(shorter.folder).arguments == SMALL


@pytest.mark.parametrize("change", [{"epochs": 9}, {"seed": 1}, {"limit_test": 20}, {"lr": 0.02}, {"device": "mps"}])
def test_runs_with_other_arguments_are_not_reused(tmp_path: Path, change: dict[str, Any]) -> None:
    create_run(replace(SMALL, **change), tmp_path, None)
    assert find_run(SMALL, tmp_path) is None


def test_an_interrupted_campaign_resumes_where_it_stopped(tmp_path: Path, digits: Dataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        carry_out(JOBS, tmp_path / "part", digits, Notes(stop_at=lambda: True))
    assert epochs_done(tmp_path / "part" / "base") == 1
    assert 0 < work_left(JOBS[0], tmp_path / "part", digits) < work_left(JOBS[1], tmp_path / "part", digits)
    notes = Notes()
    outcomes = carry_out(JOBS, tmp_path / "part", digits, notes)
    assert notes.worked == pytest.approx(notes.total)
    assert accuracies(outcomes) == accuracies(carry_out(JOBS, tmp_path / "whole", digits, Notes()))
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["base", "init"]


def test_runs_of_another_process_are_left_for_last_and_waited_for(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "POLL", 0.0)
    refusals = iter([True, True, False])

    def busy_twice(run: Any, *rest: Any) -> Any:
        if run.name == "base" and next(refusals):
            raise BusyError("another process")
        return execute(run, *rest)

    monkeypatch.setattr(campaign, "execute", busy_twice)
    notes = Notes()
    outcomes = carry_out(JOBS, tmp_path, digits, notes)
    assert notes.said == [(2, 0), ("init", 2), "waiting for base", ("base", 1)]
    assert [outcome.run.name for outcome in outcomes] == ["base", "init"]


def test_a_diverged_run_is_reported_and_the_others_are_trained(tmp_path: Path, digits: Dataset) -> None:
    wild = Job("wild", replace(SMALL, lr=1e30))
    notes = Notes()
    outcomes = carry_out([wild, *JOBS], tmp_path, digits, notes)
    assert "epoch 1: the loss is" in (outcomes[0].diverged or "")
    assert outcomes[0].rows == []
    assert [len(outcome.rows) for outcome in outcomes[1:]] == [2, 2]
    assert notes.worked == pytest.approx(notes.total)


def test_a_run_that_has_lost_its_state_is_reused_only_if_finished(tmp_path: Path, digits: Dataset) -> None:
    carry_out(JOBS, tmp_path, digits, Notes())
    unfinished = tmp_path / "init"
    for path in tmp_path.glob("*/state.pt"):
        path.unlink()
    finished = carry_out(JOBS, tmp_path, digits, Notes())
    assert [outcome.run.name for outcome in finished] == ["base", "init"]
    (unfinished / "summary.json").unlink()
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    new = Job("new", replace(SMALL, seed=7))
    with pytest.raises(InputError, match=r"init/state\.pt: missing, so the run cannot be resumed"):
        carry_out([new, *JOBS], tmp_path, digits, Notes())
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before
    assert not (tmp_path / "new").exists()  # refused before any other run was trained
