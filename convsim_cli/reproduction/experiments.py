"""The trained experiments, Table 5 and Figures 1 to 5: plan their runs, train them, put published beside measured.

Finished runs are reused, unfinished ones resumed. Processes can share a run directory.

Table 5 and Figures 1 to 3 are about the same runs: the paper's small networks, trained in several arms. Figures 4 and 5
are about ResNet-18 with and without Algorithm 1. An experiment is an entry in `EXPERIMENTS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from convsim_cli.errors import BusyError, DivergedError, InputError, did_you_mean
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction import published as paper
from convsim_cli.reproduction.published import ARMS, CURVES, arms_of, choose_arms
from convsim_cli.training.comparison import epochs_to
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import find_or_create_run, find_run, is_finished, make_folder, plain_name
from convsim_cli.training.prepare import build_with_weights, check_network, load_data, used_images
from convsim_cli.training.run import (
    ACCURACIES,
    Row,
    Run,
    RunCallbacks,
    check_resumable,
    epochs_done,
    read_results,
    spread,
    train_run,
)
from convsim_cli.training.trainer import STATISTICS_IMAGES, Trainer, choose_algorithms

FULL_TRAIN_ACCURACY = 99.0  # per cent: "near 100 %" of Figure 3
POLL = 2.0  # seconds between checks on a run that another process is working on
TIMED_SECONDS = 4.0  # that the part of an epoch takes which a dry run extrapolates from
WARM_UP_IMAGES = 16  # of the first part, which is not timed
TIMED_LR = 1e-6  # of its steps: a rate does not change how long they take, and at this one none diverges
NOT_ESTIMATED = "Algorithm 1 before the first epoch, saves, differences between arms, and compilation"


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


@dataclass(frozen=True)
class Choices:
    """What to run; None stands for the default."""

    base: Arguments  # limits, data, precision, device and the first seed
    seeds: int = 1
    epochs: int | None = None
    archs: tuple[str, ...] | None = None
    arms: tuple[str, ...] | None = None
    lrs: tuple[float, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    iterations: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One configuration: its labels in JSON, and its jobs, one per seed."""

    labels: dict[str, Any]
    jobs: tuple[Job, ...]


Found = Sequence[tuple[Cell, list[Outcome]]]  # each configuration with the outcomes of its jobs


@dataclass(frozen=True)
class Experiment:
    """A trained experiment of the paper.

    takes: the fields of `Choices`, besides seeds and epochs, that apply to it, each with a prefix for its values, and
    the paper's values. cells: its configurations. rows: the rows of its JSON.
    """

    name: str
    title: str
    epochs: int
    takes: dict[str, tuple[str, Sequence[Any]]]
    cells: Callable[[Choices], Iterator[Cell]]
    rows: Callable[[Found], list[dict[str, Any]]]


def run_experiment(
    experiment: Experiment, choices: Choices, run_dir: Path, report: CampaignCallbacks
) -> dict[str, Any]:
    """Train what an experiment needs, reuse what is there, and return the content of its JSON.

    Raises InputError, before any folder is created, for choices that do not apply to it, and for data or a network that
    cannot be used.
    """
    cells = plan_cells(experiment, choices)
    jobs = [job for cell in cells for job in cell.jobs]
    dataset = load_checked(jobs)
    make_folder(run_dir)
    outcomes = iter(run_all(jobs, run_dir, dataset, report))  # in the order of the jobs
    return {
        **describe(experiment, choices, dataset),
        "rows": experiment.rows([(cell, [next(outcomes) for _ in cell.jobs]) for cell in cells]),
    }


def estimate_experiment(experiment: Experiment, choices: Choices, run_dir: Path) -> dict[str, Any]:
    """Return the content of a dry run's JSON: the runs that `run_experiment` would train, and about how long it takes.

    Each network and batch size with epochs left is a part with a time of its own, of its first unfinished run. Nothing
    is written or downloaded. Raises InputError as `run_experiment`.
    """
    from torchvision.datasets import CIFAR10

    jobs = [job for cell in plan_cells(experiment, choices) for job in cell.jobs]
    folder = Path(choices.base.data_dir) / CIFAR10.base_folder
    if not folder.is_dir():
        raise InputError(
            f"CIFAR10 is not in {folder}; point `data_dir` to its parent, or download it by training without `dry_run`"
        )
    dataset = load_checked(jobs)
    parts: dict[tuple[str, int], dict[Job, int]] = {}
    for job in jobs:
        part = parts.setdefault((job.arguments.arch, job.arguments.batch_size), {})
        part[job] = epochs_left(job, run_dir)
    rows: list[dict[str, Any]] = []
    for (arch, batch_size), left in parts.items():
        first = next((job for job, epochs in left.items() if epochs), None)
        seconds = time_epoch(first.arguments, dataset) if first else None
        epochs = sum(job.arguments.epochs for job in left)
        rows.append(
            {
                "arch": arch,
                "batch_size": batch_size,
                "runs": len(left),
                "finished": sum(not epochs for epochs in left.values()),
                "epochs": epochs,
                "epochs_done": epochs - sum(left.values()),
                "seconds_per_epoch": seconds,
                "seconds": (seconds or 0.0) * sum(left.values()),
            }
        )
    totals = {key: sum(row[key] for row in rows) for key in ("runs", "finished", "epochs", "epochs_done", "seconds")}
    about = describe(experiment, choices, dataset)
    return {**about, "dry_run": True, **totals, "not_estimated": NOT_ESTIMATED, "rows": rows}


def time_epoch(arguments: Arguments, dataset: Dataset) -> float:
    """Return about how many seconds an epoch of a run takes here.

    Parts of an epoch are trained and evaluated: a few images to warm up, then twice as many each time, until a part
    takes `TIMED_SECONDS`. A slow network takes that for less than a batch.
    """
    data, model = used_images(arguments, dataset), build_with_weights(arguments, dataset.classes)
    arguments = replace(arguments, lr=TIMED_LR, compile=False)
    choose_algorithms(arguments.deterministic)
    images = WARM_UP_IMAGES
    while True:
        part = data.limited(images, images)
        trainer = Trainer(model, part, arguments, torch.device(arguments.device))
        seconds = trainer.run_epoch()["seconds"]
        if images > WARM_UP_IMAGES and (seconds >= TIMED_SECONDS or images >= len(data.train)):
            break
        images *= 2
    evaluated, in_all = (min(len(each.train), STATISTICS_IMAGES) + len(each.test) for each in (part, data))
    training = (seconds - trainer.evaluation_seconds) * len(data.train) / len(part.train)
    return training + trainer.evaluation_seconds * in_all / evaluated


def load_checked(jobs: Sequence[Job]) -> Dataset:
    """Return the dataset of the jobs. Raises InputError if it, or one of their networks, cannot be used."""
    dataset = load_data(jobs[0].arguments)
    for arguments in {job.arguments.arch: job.arguments for job in jobs}.values():
        check_network(build_with_weights(arguments, dataset.classes), arguments, dataset)
    return dataset


def describe(experiment: Experiment, choices: Choices, dataset: Dataset) -> dict[str, Any]:
    """Return what the JSON of an experiment and of its dry run begin with."""
    reduced = reductions(experiment, choices, dataset)
    return {
        "name": experiment.name,
        "title": experiment.title + (f" (reduced: {'; '.join(reduced)})" if reduced else ""),
        "claim": paper.CLAIMS.get(experiment.name),
        "reduced": reduced,
        "device": choices.base.device,
        "precision": choices.base.precision,
        "compile": choices.base.compile,
        "bn_statistics": choices.base.bn_statistics,
    }


def plan_cells(experiment: Experiment, choices: Choices) -> list[Cell]:
    """Return the configurations of an experiment. Raises InputError for choices that do not apply to it."""
    for field in ("archs", "arms", "lrs", "batch_sizes", "iterations"):
        if getattr(choices, field) is not None and field not in experiment.takes:
            raise InputError(f"{experiment.name} has no `{field}`; remove it")
    cells = list(experiment.cells(replace(choices, epochs=choices.epochs or experiment.epochs)))
    for cell in cells:
        for job in cell.jobs:
            job.arguments.check()
    return cells


def reductions(experiment: Experiment, choices: Choices, dataset: Dataset) -> list[str]:
    """Return how the choices reduce an experiment compared with the paper, a phrase each."""
    phrases = []
    if choices.epochs is not None and choices.epochs < experiment.epochs:
        phrases.append(f"{choices.epochs} of {experiment.epochs} epochs")
    for split, limit in (("train", choices.base.limit_train), ("test", choices.base.limit_test)):
        count = len(getattr(dataset, split))
        if limit is not None and limit < count:
            phrases.append(f"{limit:,} of {count:,} {split} images")
    for field, (what, complete) in experiment.takes.items():
        chosen = getattr(choices, field)
        if field == "arms":
            chosen = [arm.name for arm in choose_arms(chosen)]
        missing = [f"{value}" for value in complete if chosen is not None and value not in chosen]
        if missing:
            phrases.append(f"without {what}{', '.join(missing)}")
    return phrases


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of one configuration over its seeds.

    Accuracies are in per cent: means over seeds with standard deviations (null for one seed). `epochs_to_99` is the
    mean number of epochs to a train accuracy of 99 %, null unless every seed reaches it; `seconds` is a run's mean. All
    are null if a run diverged in its first epoch.
    """
    histories = [outcome.rows for outcome in outcomes]
    whole = histories if all(histories) else []
    found: dict[str, Any] = {}
    for key, figure in ACCURACIES.items():
        over_seeds = spread([figure(rows) for rows in whole])
        found |= {key: over_seeds["mean"], f"{key}_std": over_seeds["std"]}
    return {
        **found,
        "cs": spread([rows[-1]["cs"] for rows in whole])["mean"],
        "seconds": spread([sum(row["seconds"] for row in rows) for rows in whole])["mean"],
        "epochs_to_99": epochs_to(FULL_TRAIN_ACCURACY, histories, "train_accuracy")["mean"],
        "seeds": len(outcomes),
        "epochs": min(map(len, histories)),
        "diverged": sum(outcome.diverged is not None for outcome in outcomes),
    }


def find_experiment(name: str) -> Experiment:
    """Return a trained experiment by its name. Raises InputError for an unknown one."""
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    raise InputError(f"unknown experiment {name!r}: {did_you_mean(name, known_experiments())}")


def known_experiments() -> list[str]:
    """Return the names of all experiments, the numerical ones included."""
    return [table.name for table in paper.NUMERICAL_TABLES] + [experiment.name for experiment in EXPERIMENTS]


def _arm_cells(choices: Choices) -> Iterator[Cell]:
    arms = choose_arms(choices.arms)
    for arch in choices.archs or paper.ARCHS:
        alone = choices.arms is None and arch == paper.WIDE_ARCH
        for arm in [ARMS["baseline"]] if alone else arms:
            arguments = replace(choices.base, arch=arch, **arm.settings)
            yield _make_cell({"arch": arch, "arm": arm.name}, f"{arch}-{arm.name}", arguments, choices)


def _table_rows(found: Found) -> list[dict[str, Any]]:
    rows = []
    for cell, outcomes in found:
        arm = ARMS.get(cell.labels.get("arm", ""))  # Figure 5 has none, and no number is published
        row = {"published": {"test_accuracy": arm.published.get(cell.labels["arch"]) if arm else None}}
        rows.append({**cell.labels, **row, "measured": summarize(outcomes), "runs": _folders(outcomes)})
    return rows


def _curve_rows(column: str) -> Callable[[Found], list[dict[str, Any]]]:
    def rows(found: Found) -> list[dict[str, Any]]:
        return [
            cell.labels
            | {"seed": job.arguments.seed, "run": str(outcome.run.folder)}
            | {"epoch": [row["epoch"] for row in outcome.rows], column: [row[column] for row in outcome.rows]}
            for cell, outcomes in found
            for job, outcome in zip(cell.jobs, outcomes, strict=True)
        ]

    return rows


def _grid_cells(choices: Choices) -> Iterator[Cell]:
    for lr in choices.lrs or paper.LEARNING_RATES:
        for batch_size in choices.batch_sizes or paper.BATCH_SIZES:
            for iterations in (0, paper.DEEP_ITERATIONS):
                labels = {"lr": lr, "batch_size": batch_size, "iterations": iterations}
                yield _deep_cell(labels, iterations, lr, batch_size, choices)


def _grid_rows(found: Found) -> list[dict[str, Any]]:
    """A row per learning rate and batch size, from the configuration without Algorithm 1 and the next one with it."""
    rows = []
    for (cell, without), (_, treated) in zip(found[::2], found[1::2], strict=True):
        baseline, init = summarize(without), summarize(treated)
        best = init["best_test_accuracy"], baseline["best_test_accuracy"]
        lr, batch_size = cell.labels["lr"], cell.labels["batch_size"]
        gain = None if None in best else best[0] - best[1]
        rows.append(
            {
                "lr": lr,
                "batch_size": batch_size,
                "published": {"gain": paper.FIGURE_4.get((lr, batch_size))},
                "measured": {"gain": gain, "baseline": baseline, "init": init},
                "runs": _folders([*without, *treated]),
            }
        )
    return rows


def _iteration_cells(choices: Choices) -> Iterator[Cell]:
    for iterations in choices.iterations or paper.FIGURE_5:
        yield _deep_cell({"iterations": iterations}, iterations, paper.FIGURE_5_LR, paper.FIGURE_5_BATCH_SIZE, choices)


def _deep_cell(labels: dict[str, Any], iterations: int, lr: float, batch_size: int, choices: Choices) -> Cell:
    arguments = replace(choices.base, arch=paper.DEEP_ARCH, lr=lr, batch_size=batch_size)
    if iterations:
        arguments = replace(arguments, mode="init", iterations=iterations)
    return _make_cell(labels, f"{paper.DEEP_ARCH}-lr{lr:g}-b{batch_size}-I{iterations}", arguments, choices)


def _folders(outcomes: Sequence[Outcome]) -> list[str]:
    return [str(outcome.run.folder) for outcome in outcomes]


def _make_cell(labels: dict[str, Any], stem: str, arguments: Arguments, choices: Choices) -> Cell:
    """Return a configuration with a job for each seed, in folders STEM-sSEED. The choices name the epochs."""
    assert choices.epochs is not None
    arguments = replace(arguments, epochs=choices.epochs)
    seeds = range(arguments.seed, arguments.seed + choices.seeds)
    return Cell(labels, tuple(Job(plain_name(f"{stem}-s{seed}"), replace(arguments, seed=seed)) for seed in seeds))


_ARMS: dict[str, tuple[str, Sequence[Any]]] = {"archs": ("", paper.ARCHS), "arms": ("", arms_of("published"))}
_GRID: dict[str, tuple[str, Sequence[Any]]] = {
    "lrs": ("learning rate ", paper.LEARNING_RATES),
    "batch_sizes": ("batch size ", paper.BATCH_SIZES),
}
EXPERIMENTS = (
    Experiment("table5", "Top test accuracy on CIFAR-10", paper.EPOCHS, _ARMS, _arm_cells, _table_rows),
    *(
        Experiment(name, title, paper.EPOCHS, _ARMS, _arm_cells, _curve_rows(CURVES[name]))
        for name, title in (
            ("figure1", "Convolutional Similarity in training"),
            ("figure2", "Classification loss in training"),
            ("figure3", "Train accuracy in training"),
        )
    ),
    Experiment(
        "figure4",
        "ResNet-18 with and without Algorithm 1, I = 200",
        paper.DEEP_EPOCHS,
        _GRID,
        _grid_cells,
        _grid_rows,
    ),
    Experiment(
        "figure5",
        "ResNet-18 by the iterations I of Algorithm 1",
        paper.DEEP_EPOCHS,
        {"iterations": ("I = ", paper.FIGURE_5)},
        _iteration_cells,
        _table_rows,
    ),
)


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
