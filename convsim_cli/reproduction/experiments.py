"""The trained experiments, Table 5 and Figures 1 to 5: plan the runs, train them, and put published beside measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction import published as paper
from convsim_cli.reproduction.arm_experiments import ARM_EXPERIMENTS
from convsim_cli.reproduction.campaign import Outcome, Watcher, carry_out
from convsim_cli.reproduction.configurations import Cell, Choices, Experiment
from convsim_cli.reproduction.deep_experiments import DEEP_EXPERIMENTS
from convsim_cli.training.run_data import load_data
from convsim_cli.training.run_folder import make_folder
from convsim_cli.training.run_network import check_network

EXPERIMENTS = (*ARM_EXPERIMENTS, *DEEP_EXPERIMENTS)


def find_experiment(name: str) -> Experiment:
    """Return a trained experiment by its name. Raises InputError for an unknown one."""
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    raise InputError(f"unknown experiment {name!r}: {did_you_mean(name, known_experiments())}")


def known_experiments() -> list[str]:
    """Return the names of all experiments, the numerical ones included."""
    return [table.name for table in paper.NUMERICAL_TABLES] + [experiment.name for experiment in EXPERIMENTS]


def run_experiment(experiment: Experiment, choices: Choices, run_dir: Path, watcher: Watcher) -> dict[str, Any]:
    """Train what an experiment needs, reuse what is there, and return the content of its JSON.

    Raises InputError, before any folder is created, for choices that it has no use for, and for data or a network that
    cannot be used.
    """
    cells = plan(experiment, choices)
    dataset = load_data(choices.base)
    reduced = reductions(experiment, choices, dataset)
    jobs = [job for cell in cells for job in cell.jobs]
    for arguments in {job.arguments.arch: job.arguments for job in jobs}.values():
        check_network(arguments, dataset)
    make_folder(run_dir)
    outcomes = carry_out(jobs, run_dir, dataset, watcher)
    return {
        "name": experiment.name,
        "title": experiment.title + (f" (reduced: {'; '.join(reduced)})" if reduced else ""),
        "claim": paper.CLAIMS.get(experiment.name),
        "reduced": reduced,
        "device": choices.base.device,
        "precision": choices.base.precision,
        "compile": choices.base.compile,
        "bn_statistics": choices.base.bn_statistics,
        "rows": experiment.rows(group(cells, outcomes)),
    }


def plan(experiment: Experiment, choices: Choices) -> list[Cell]:
    """Return the configurations of an experiment. Raises InputError for choices that it has no use for."""
    for field in ("archs", "arms", "lrs", "batch_sizes", "iterations"):
        if getattr(choices, field) is not None and field not in experiment.takes:
            raise InputError(f"{experiment.name} has no `{field}`")
    cells = list(experiment.cells(replace(choices, epochs=choices.epochs or experiment.epochs)))
    for cell in cells:
        cell.jobs[0].arguments.check()
    return cells


def reductions(experiment: Experiment, choices: Choices, dataset: Dataset) -> list[str]:
    """Return how the choices make an experiment less than the paper's, a phrase each."""
    phrases = []
    if choices.epochs is not None and choices.epochs < experiment.epochs:
        phrases.append(f"{choices.epochs} of {experiment.epochs} epochs")
    for split, limit in (("train", choices.base.limit_train), ("test", choices.base.limit_test)):
        count = len(getattr(dataset, split))
        if limit is not None and limit < count:
            phrases.append(f"{limit:,} of {count:,} {split} images")
    return phrases + list(experiment.reduced(choices))


def group(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[tuple[Cell, list[Outcome]]]:
    """Return the configurations, each with the outcomes of its jobs, which are in the order of the configurations."""
    rest = iter(outcomes)
    return [(cell, [next(rest) for _ in cell.jobs]) for cell in cells]
