"""Table 5 and Figures 1 to 3: the same runs of the paper's small networks, in several arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from convsim_cli.reproduction import published as paper
from convsim_cli.reproduction.arms import ARMS, arms_of, choose_arms
from convsim_cli.reproduction.configurations import Cell, Choices, Experiment, Found, left_out, make_cell, summarize

CURVES = {"figure1": "cs", "figure2": "train_loss", "figure3": "train_accuracy"}  # columns of results.csv


def _cells(choices: Choices) -> Iterator[Cell]:
    arms = choose_arms(choices.arms)
    for arch in choices.archs or paper.ARCHS:
        others = choices.arms is None and arch not in paper.ARCHS  # the paper has the wider network as a baseline only
        for arm in [ARMS["baseline"]] if others else arms:
            arguments = replace(choices.base, arch=arch, **arm.settings)
            yield make_cell({"arch": arch, "arm": arm.name}, f"{arch}-{arm.name}", arguments, choices)


def _table_rows(found: Found) -> list[dict[str, Any]]:
    return [
        cell.labels
        | {"published": {"test_accuracy": ARMS[cell.labels["arm"]].published.get(cell.labels["arch"])}}
        | {"measured": summarize(outcomes), "runs": [str(outcome.run.folder) for outcome in outcomes]}
        for cell, outcomes in found
    ]


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


def _reduced(choices: Choices) -> Iterator[str]:
    yield from left_out("", choices.archs, paper.ARCHS)
    yield from left_out("", [arm.name for arm in choose_arms(choices.arms)], arms_of("published"))


_TAKES = frozenset({"archs", "arms"})
_TITLES = {
    "figure1": "Convolutional Similarity in training",
    "figure2": "Classification loss in training",
    "figure3": "Train accuracy in training",
}
ARM_EXPERIMENTS = (
    Experiment("table5", "Top test accuracy on CIFAR-10", paper.EPOCHS, _TAKES, _cells, _table_rows, _reduced),
    *(
        Experiment(name, title, paper.EPOCHS, _TAKES, _cells, _curve_rows(CURVES[name]), _reduced)
        for name, title in _TITLES.items()
    ),
)
