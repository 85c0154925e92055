"""The trained experiments, Table 5 and Figures 1 to 5: the runs that each is made of, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction import published as paper
from convsim_cli.reproduction.campaign import Job, Outcome
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.run_folder import Row, plain_name

FULL_TRAIN_ACCURACY = 99.0  # per cent: "near 100 %" of Figure 3
LAST = 5  # epochs that the mean of the last ones is over
CURVES = {"figure1": "cs", "figure2": "train_loss", "figure3": "train_accuracy"}  # columns of results.csv


@dataclass(frozen=True)
class Choices:
    """What to run; None stands for all that the paper has."""

    base: Arguments  # limits, data, device and the first seed
    seeds: int = 1
    epochs: int | None = None
    archs: tuple[str, ...] | None = None
    arms: tuple[str, ...] | None = None
    lrs: tuple[float, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    iterations: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One configuration: what names it in JSON, and its jobs, one per seed."""

    labels: dict[str, Any]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Experiment:
    """A trained experiment of the paper.

    takes: the fields of `Choices`, beside seeds and epochs, that mean something to it.
    """

    name: str
    title: str
    epochs: int
    takes: frozenset[str]
    cells: Callable[[Choices], Iterator[Cell]]
    rows: Callable[[Sequence[tuple[Cell, list[Outcome]]]], list[dict[str, Any]]]
    reduced: Callable[[Choices], Iterator[str]]


def find_experiment(name: str) -> Experiment:
    """Return a trained experiment by its name. Raises InputError for another one."""
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    known = [table.name for table in paper.TABLES] + [experiment.name for experiment in EXPERIMENTS]
    raise InputError(f"unknown experiment {name!r}: {did_you_mean(name, known)}")


def plan(experiment: Experiment, choices: Choices) -> list[Cell]:
    """Return the cells of an experiment. Raises InputError for choices that it does not know or has no use for."""
    for field in ("archs", "arms", "lrs", "batch_sizes", "iterations"):
        if getattr(choices, field) is not None and field not in experiment.takes:
            raise InputError(f"{experiment.name} has no --{field.replace('_', '-')}")
    cells = list(experiment.cells(replace(choices, epochs=choices.epochs or experiment.epochs)))
    for cell in cells:
        cell.jobs[0].arguments.check()
    return cells


def reductions(experiment: Experiment, choices: Choices, dataset: Dataset) -> list[str]:
    """Return how an experiment is less than the paper's, a phrase each; empty where it is all of it."""
    found = []
    if choices.epochs is not None and choices.epochs < experiment.epochs:
        found.append(f"{choices.epochs} of {experiment.epochs} epochs")
    for split, limit in (("train", choices.base.limit_train), ("test", choices.base.limit_test)):
        count = len(getattr(dataset, split))
        if limit is not None and limit < count:
            found.append(f"{limit:,} of {count:,} {split} images")
    return found + list(experiment.reduced(choices))


def group(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[tuple[Cell, list[Outcome]]]:
    """Return the cells, each with the outcomes of its jobs, which are in the order of the cells."""
    rest = iter(outcomes)
    return [(cell, [next(rest) for _ in cell.jobs]) for cell in cells]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of one configuration over its seeds.

    Accuracies in per cent, their means over seeds with standard deviations (null for one seed); `epochs_to_99` is the
    mean number of epochs to a train accuracy of 99 %, null unless every seed gets there; `seconds` a run's. All are
    null where a run diverged before its first epoch had ended.
    """
    histories = [outcome.rows for outcome in outcomes]
    figures: dict[str, Callable[[list[Row]], float]] = {
        "best_test_accuracy": lambda rows: max(row["test_accuracy"] for row in rows),
        "last_test_accuracy": lambda rows: rows[-1]["test_accuracy"],
        "mean_last5_test_accuracy": lambda rows: mean(row["test_accuracy"] for row in rows[-LAST:]),
        "last_train_accuracy": lambda rows: rows[-1]["train_accuracy"],
        "cs": lambda rows: rows[-1]["cs"],
        "seconds": lambda rows: sum(row["seconds"] for row in rows),
    }
    found: dict[str, Any] = {}
    for key, figure in figures.items():
        values = [figure(rows) for rows in histories] if all(histories) else []
        found[key] = mean(values) if values else None
        if key.endswith("accuracy"):
            found[f"{key}_std"] = stdev(values) if len(values) > 1 else None
    reached = [_epochs_to(rows, FULL_TRAIN_ACCURACY) for rows in histories]
    found["epochs_to_99"] = mean(filter(None, reached)) if all(reached) else None
    found |= {"seeds": len(outcomes), "epochs": min(map(len, histories))}
    return found | {"diverged": sum(outcome.diverged is not None for outcome in outcomes)}


def _epochs_to(rows: list[Row], accuracy: float) -> int | None:
    return next((row["epoch"] for row in rows if row["train_accuracy"] >= accuracy), None)


def _cell(labels: dict[str, Any], stem: str, arguments: Arguments, choices: Choices) -> Cell:
    assert choices.epochs is not None
    arguments = replace(arguments, epochs=choices.epochs)
    seeds = range(arguments.seed, arguments.seed + choices.seeds)
    return Cell(labels, tuple(Job(plain_name(f"{stem}-s{seed}"), replace(arguments, seed=seed)) for seed in seeds))


# Table 5 and Figures 1 to 3: the same runs


def _arm_cells(choices: Choices) -> Iterator[Cell]:
    arms = {arm.name: arm for arm in paper.ARMS}
    for name in choices.arms or ():
        if name not in arms:
            raise InputError(f"unknown arm {name!r}: {did_you_mean(name, arms)}")
    for arch in choices.archs or paper.ARCHS:
        usual = tuple(arms) if arch in paper.ARCHS else ("baseline",)  # the paper's wider network is a baseline
        for name in choices.arms or usual:
            arguments = replace(choices.base, arch=arch, **arms[name].settings)
            yield _cell({"arch": arch, "arm": name}, f"{arch}-{name}", arguments, choices)


def _arm_rows(found: Sequence[tuple[Cell, list[Outcome]]]) -> list[dict[str, Any]]:
    return [
        cell.labels
        | {"published": {"test_accuracy": paper.published_accuracy(**cell.labels)}, "measured": summarize(outcomes)}
        | {"runs": [str(outcome.run.folder) for outcome in outcomes]}
        for cell, outcomes in found
    ]


def _curve_rows(column: str) -> Callable[[Sequence[tuple[Cell, list[Outcome]]]], list[dict[str, Any]]]:
    def rows(found: Sequence[tuple[Cell, list[Outcome]]]) -> list[dict[str, Any]]:
        return [
            cell.labels
            | {"seed": job.arguments.seed, "run": str(outcome.run.folder)}
            | {"epoch": [row["epoch"] for row in outcome.rows], column: [row[column] for row in outcome.rows]}
            for cell, outcomes in found
            for job, outcome in zip(cell.jobs, outcomes, strict=True)
        ]

    return rows


def _without(choices: Choices) -> Iterator[str]:
    published = tuple(arm.name for arm in paper.ARMS[:3])
    yield from _left_out("", choices.archs, paper.ARCHS)
    yield from _left_out("", choices.arms, published)


# Figures 4 and 5: the deep network


def _deep(choices: Choices, iterations: int, lr: float, batch_size: int) -> tuple[str, Arguments]:
    arguments = replace(choices.base, arch=paper.DEEP_ARCH, lr=lr, batch_size=batch_size)
    stem = f"{paper.DEEP_ARCH}-lr{lr:g}-b{batch_size}-I{iterations}"
    return stem, replace(arguments, mode="init", iterations=iterations) if iterations else arguments


def _grid_cells(choices: Choices) -> Iterator[Cell]:
    for lr in choices.lrs or paper.LEARNING_RATES:
        for batch_size in choices.batch_sizes or paper.BATCH_SIZES:
            for iterations in (0, paper.DEEP_ITERATIONS):
                labels = {"lr": lr, "batch_size": batch_size, "iterations": iterations}
                yield _cell(labels, *_deep(choices, iterations, lr, batch_size), choices)


def _grid_rows(found: Sequence[tuple[Cell, list[Outcome]]]) -> list[dict[str, Any]]:
    rows = []
    for (cell, without), (_, treated) in zip(found[::2], found[1::2], strict=True):
        baseline, init = summarize(without), summarize(treated)
        ends = init["best_test_accuracy"], baseline["best_test_accuracy"]
        lr, batch_size = cell.labels["lr"], cell.labels["batch_size"]
        published = (
            paper.FIGURE_4.points if (lr, batch_size) == (paper.FIGURE_4.lr, paper.FIGURE_4.batch_size) else None
        )
        rows.append(
            {
                "lr": lr,
                "batch_size": batch_size,
                "published": {"gain": published},
                "measured": {
                    "gain": None if None in ends else ends[0] - ends[1],
                    "baseline": baseline,
                    "init": init,
                },
                "runs": [str(outcome.run.folder) for outcome in (*without, *treated)],
            }
        )
    return rows


def _grid_reduced(choices: Choices) -> Iterator[str]:
    yield from _left_out("learning rate ", choices.lrs, paper.LEARNING_RATES)
    yield from _left_out("batch size ", choices.batch_sizes, paper.BATCH_SIZES)


def _iteration_cells(choices: Choices) -> Iterator[Cell]:
    for iterations in choices.iterations or paper.FIGURE_5:
        stem, arguments = _deep(choices, iterations, paper.FIGURE_5_LR, paper.FIGURE_5_BATCH_SIZE)
        yield _cell({"iterations": iterations}, stem, arguments, choices)


def _iteration_rows(found: Sequence[tuple[Cell, list[Outcome]]]) -> list[dict[str, Any]]:
    return [
        cell.labels
        | {"published": {"test_accuracy": None}, "measured": summarize(outcomes)}
        | {"runs": [str(outcome.run.folder) for outcome in outcomes]}
        for cell, outcomes in found
    ]


def _iteration_reduced(choices: Choices) -> Iterator[str]:
    yield from _left_out("I = ", choices.iterations, paper.FIGURE_5)


def _left_out(what: str, chosen: Iterable[Any] | None, all_of_them: Sequence[Any]) -> Iterator[str]:
    missing = [f"{value}" for value in all_of_them if chosen is not None and value not in chosen]
    if missing:
        yield f"without {what}{', '.join(missing)}"


_ARMS = frozenset({"archs", "arms"})
EXPERIMENTS = (
    Experiment("table5", "Top test accuracy on CIFAR-10", paper.EPOCHS, _ARMS, _arm_cells, _arm_rows, _without),
    *(
        Experiment(name, title, paper.EPOCHS, _ARMS, _arm_cells, _curve_rows(CURVES[name]), _without)
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
        frozenset({"lrs", "batch_sizes"}),
        _grid_cells,
        _grid_rows,
        _grid_reduced,
    ),
    Experiment(
        "figure5",
        "ResNet-18 by the iterations I of Algorithm 1",
        paper.DEEP_EPOCHS,
        frozenset({"iterations"}),
        _iteration_cells,
        _iteration_rows,
        _iteration_reduced,
    ),
)
