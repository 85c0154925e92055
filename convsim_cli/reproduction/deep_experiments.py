"""Figures 4 and 5: ResNet-18 with and without Algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from convsim_cli.reproduction import published as paper
from convsim_cli.reproduction.configurations import Cell, Choices, Experiment, Found, left_out, make_cell, summarize
from convsim_cli.training.arguments import Arguments


def _deep(choices: Choices, iterations: int, lr: float, batch_size: int) -> tuple[str, Arguments]:
    arguments = replace(choices.base, arch=paper.DEEP_ARCH, lr=lr, batch_size=batch_size)
    stem = f"{paper.DEEP_ARCH}-lr{lr:g}-b{batch_size}-I{iterations}"
    return stem, replace(arguments, mode="init", iterations=iterations) if iterations else arguments


def _grid_cells(choices: Choices) -> Iterator[Cell]:
    for lr in choices.lrs or paper.LEARNING_RATES:
        for batch_size in choices.batch_sizes or paper.BATCH_SIZES:
            for iterations in (0, paper.DEEP_ITERATIONS):
                labels = {"lr": lr, "batch_size": batch_size, "iterations": iterations}
                yield make_cell(labels, *_deep(choices, iterations, lr, batch_size), choices)


def _grid_rows(found: Found) -> list[dict[str, Any]]:
    """A row per learning rate and batch size, from the configuration without Algorithm 1 and the next one with it."""
    rows = []
    for (cell, without), (_, treated) in zip(found[::2], found[1::2], strict=True):
        baseline, init = summarize(without), summarize(treated)
        best = init["best_test_accuracy"], baseline["best_test_accuracy"]
        lr, batch_size = cell.labels["lr"], cell.labels["batch_size"]
        is_published = (lr, batch_size) == (paper.FIGURE_4.lr, paper.FIGURE_4.batch_size)
        gain = None if None in best else best[0] - best[1]
        rows.append(
            {
                "lr": lr,
                "batch_size": batch_size,
                "published": {"gain": paper.FIGURE_4.points if is_published else None},
                "measured": {"gain": gain, "baseline": baseline, "init": init},
                "runs": [str(outcome.run.folder) for outcome in (*without, *treated)],
            }
        )
    return rows


def _grid_reduced(choices: Choices) -> Iterator[str]:
    yield from left_out("learning rate ", choices.lrs, paper.LEARNING_RATES)
    yield from left_out("batch size ", choices.batch_sizes, paper.BATCH_SIZES)


def _iteration_cells(choices: Choices) -> Iterator[Cell]:
    for iterations in choices.iterations or paper.FIGURE_5:
        stem, arguments = _deep(choices, iterations, paper.FIGURE_5_LR, paper.FIGURE_5_BATCH_SIZE)
        yield make_cell({"iterations": iterations}, stem, arguments, choices)


def _iteration_rows(found: Found) -> list[dict[str, Any]]:
    return [
        cell.labels
        | {"published": {"test_accuracy": None}, "measured": summarize(outcomes)}
        | {"runs": [str(outcome.run.folder) for outcome in outcomes]}
        for cell, outcomes in found
    ]


def _iteration_reduced(choices: Choices) -> Iterator[str]:
    yield from left_out("I = ", choices.iterations, paper.FIGURE_5)


DEEP_EXPERIMENTS = (
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
