from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from convsim_cli.errors import BusyError, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction import experiments
from convsim_cli.reproduction.experiments import CampaignCallbacks, Job, Outcome, epochs_left, run_all
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import create_run, find_run
from convsim_cli.training.run import RunCallbacks, epochs_done, open_run, read_results, train_run

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")  # at rates that make a short run learn

SMALL = Arguments(arch="cnn:4", dataset="digits", epochs=2, batch_size=20, iterations=5, limit_train=60, limit_test=30)
JOBS = [Job("base", SMALL), Job("init", replace(SMALL, mode="init"))]


class Notes:
    """What a campaign reports."""

    def __init__(self, stop_at: Callable[[], bool] = lambda: False) -> None:
        self.said: list[Any] = []
        self.epochs: tuple[int, int] = (0, 0)  # planned, and ended
        self.report = CampaignCallbacks(
            begin=lambda run, data: self.said.append(run.name),
            epoch=lambda row: stop() if stop_at() else None,
            plan=self._plan,
            end=self._end,
            wait=lambda name: self.said.append(f"waiting for {name}"),
        )

    def _plan(self, runs: int, finished: int, epochs: int) -> None:
        self.said.append((runs, finished))
        self.epochs = epochs, 0

    def _end(self, outcome: Outcome, epochs: int) -> None:
        self.epochs = self.epochs[0], self.epochs[1] + epochs


def stop() -> NoReturn:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path())


def accuracies(outcomes: list[Outcome]) -> list[list[float]]:
    return [[row["test_accuracy"] for row in outcome.rows] for outcome in outcomes]


@pytest.mark.slow
def test_finished_runs_are_reused_whatever_their_name_and_data_dir(tmp_path: Path, digits: Dataset) -> None:
    mine = create_run(replace(SMALL, data_dir="elsewhere"), tmp_path, "mine")
    train_run(mine, dataset=digits)
    written = (mine.folder / "state.pt").stat().st_mtime_ns
    notes = Notes()
    outcomes = run_all(JOBS, tmp_path, digits, notes.report)
    assert notes.said == [(2, 1), "init"]
    assert outcomes[0].run.folder == mine.folder
    assert (mine.folder / "state.pt").stat().st_mtime_ns == written
    assert outcomes[0].rows == read_results(mine.folder)
    assert notes.epochs == (2, 2)


def test_a_longer_run_is_reused_for_its_first_epochs_and_not_changed(tmp_path: Path, digits: Dataset) -> None:
    longer = create_run(replace(SMALL, epochs=3), tmp_path, "longer")
    with pytest.raises(KeyboardInterrupt):
        train_run(longer, RunCallbacks(epoch=lambda row: stop() if row["epoch"] == 2 else None), digits)
    (outcome,) = run_all(JOBS[:1], tmp_path, digits, CampaignCallbacks())
    assert outcome.run.folder == longer.folder
    assert [row["epoch"] for row in outcome.rows] == [1, 2]
    assert epochs_done(longer.folder) == 2
    (alone,) = run_all(JOBS[:1], tmp_path / "alone", digits, CampaignCallbacks())
    assert accuracies([outcome]) == accuracies([alone])


def test_a_shorter_run_is_resumed_to_the_requested_epochs(tmp_path: Path, digits: Dataset) -> None:
    shorter = create_run(replace(SMALL, epochs=1), tmp_path, "shorter")
    train_run(shorter, dataset=digits)
    (outcome,) = run_all(JOBS[:1], tmp_path, digits, CampaignCallbacks())
    (alone,) = run_all(JOBS[:1], tmp_path / "alone", digits, CampaignCallbacks())
    assert outcome.run.folder == shorter.folder
    assert accuracies([outcome]) == accuracies([alone])
    assert open_run(shorter.folder).arguments == SMALL


@pytest.mark.parametrize("change", [{"epochs": 9}, {"seed": 1}, {"limit_test": 20}, {"lr": 0.02}, {"device": "mps"}])
def test_runs_with_other_arguments_are_not_reused(tmp_path: Path, change: dict[str, Any]) -> None:
    create_run(replace(SMALL, **change), tmp_path, None)
    assert find_run(SMALL, tmp_path) is None


def test_an_interrupted_campaign_resumes_where_it_stopped(tmp_path: Path, digits: Dataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_all(JOBS, tmp_path / "part", digits, Notes(stop_at=lambda: True).report)
    assert epochs_done(tmp_path / "part" / "base") == 1
    assert [epochs_left(job, tmp_path / "part") for job in JOBS] == [1, 2]
    notes = Notes()
    outcomes = run_all(JOBS, tmp_path / "part", digits, notes.report)
    assert notes.epochs == (3, 3)
    assert accuracies(outcomes) == accuracies(run_all(JOBS, tmp_path / "whole", digits, CampaignCallbacks()))
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["base", "init"]


def test_runs_of_another_process_are_left_for_last_and_waited_for(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "POLL", 0.0)
    refusals = iter([True, True, False])

    def busy_twice(run: Any, *rest: Any) -> Any:
        if run.name == "base" and next(refusals):
            raise BusyError("another process")
        return train_run(run, *rest)

    monkeypatch.setattr(experiments, "train_run", busy_twice)
    notes = Notes()
    outcomes = run_all(JOBS, tmp_path, digits, notes.report)
    assert notes.said == [(2, 0), "init", "waiting for base", "base"]
    assert [outcome.run.name for outcome in outcomes] == ["base", "init"]


def test_a_diverged_run_is_reported_and_the_others_are_trained(tmp_path: Path, digits: Dataset) -> None:
    wild = Job("wild", replace(SMALL, lr=1e30))
    notes = Notes()
    outcomes = run_all([wild, *JOBS], tmp_path, digits, notes.report)
    assert "epoch 1: the loss is" in (outcomes[0].diverged or "")
    assert outcomes[0].rows == []
    assert [len(outcome.rows) for outcome in outcomes[1:]] == [2, 2]
    assert notes.epochs == (6, 6)


def test_a_run_that_has_lost_its_state_is_reused_only_if_finished(tmp_path: Path, digits: Dataset) -> None:
    run_all(JOBS, tmp_path, digits, CampaignCallbacks())
    unfinished = tmp_path / "init"
    for path in tmp_path.glob("*/state.pt"):
        path.unlink()
    finished = run_all(JOBS, tmp_path, digits, CampaignCallbacks())
    assert [outcome.run.name for outcome in finished] == ["base", "init"]
    (unfinished / "summary.json").unlink()
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    new = Job("new", replace(SMALL, seed=7))
    with pytest.raises(InputError, match=r"init/state\.pt: missing, so the run cannot be resumed"):
        run_all([new, *JOBS], tmp_path, digits, CampaignCallbacks())
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before
    assert not (tmp_path / "new").exists()  # refused before any other run was trained
