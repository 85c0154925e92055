"""What the trained experiments have in common: what can be chosen, the runs of a configuration, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from convsim_cli.reproduction.campaign import Job, Outcome
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.results import LAST_EPOCHS, Row
from convsim_cli.training.run_folder import plain_name

FULL_TRAIN_ACCURACY = 99.0  # per cent: "near 100 %" of Figure 3


@dataclass(frozen=True)
class Choices:
    """What to run. None stands for what is usual."""

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
    """One configuration: what names it in JSON, and its jobs, one per seed."""

    labels: dict[str, Any]
    jobs: tuple[Job, ...]


Found = Sequence[tuple[Cell, list[Outcome]]]  # each configuration with the outcomes of its jobs


@dataclass(frozen=True)
class Experiment:
    """A trained experiment of the paper.

    takes: the fields of `Choices`, besides seeds and epochs, that it has a use for. cells: its configurations. rows:
    the rows of its JSON. reduced: how choices make it less than the paper's, a phrase each.
    """

    name: str
    title: str
    epochs: int
    takes: frozenset[str]
    cells: Callable[[Choices], Iterator[Cell]]
    rows: Callable[[Found], list[dict[str, Any]]]
    reduced: Callable[[Choices], Iterator[str]]


def make_cell(labels: dict[str, Any], stem: str, arguments: Arguments, choices: Choices) -> Cell:
    """Return a configuration with a job for each seed, in folders STEM-sSEED. The choices name the epochs."""
    assert choices.epochs is not None
    arguments = replace(arguments, epochs=choices.epochs)
    seeds = range(arguments.seed, arguments.seed + choices.seeds)
    return Cell(labels, tuple(Job(plain_name(f"{stem}-s{seed}"), replace(arguments, seed=seed)) for seed in seeds))


def left_out(what: str, chosen: Iterable[Any] | None, complete: Sequence[Any]) -> Iterator[str]:
    """Yield a phrase for what was not chosen of the complete list. None chooses all of it."""
    missing = [f"{value}" for value in complete if chosen is not None and value not in chosen]
    if missing:
        yield f"without {what}{', '.join(missing)}"


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of one configuration over its seeds.

    Accuracies are in per cent: means over seeds with standard deviations (null for one seed). `epochs_to_99` is the
    mean number of epochs to a train accuracy of 99 %, null unless every seed reaches it; `seconds` is a run's mean. All
    are null if a run diverged in its first epoch.
    """
    histories = [outcome.rows for outcome in outcomes]
    figures: dict[str, Callable[[list[Row]], float]] = {
        "best_test_accuracy": lambda rows: max(row["test_accuracy"] for row in rows),
        "last_test_accuracy": lambda rows: rows[-1]["test_accuracy"],
        "mean_last5_test_accuracy": lambda rows: mean(row["test_accuracy"] for row in rows[-LAST_EPOCHS:]),
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
