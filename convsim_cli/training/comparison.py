"""Compare runs: groups of runs that differ only by seed, each with its accuracies and its distance from a baseline.

Groups are named by the arguments in which they differ. Distances are paired by seed; the 95 % interval of their mean is
that of Student's t, and its p-value that of the paired t-test, corrected for the number of groups by Holm's method.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from math import atan2, cos, pi, sin, sqrt, tan
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from convsim_cli.errors import ConvsimWarning, InputError, did_you_mean, some_of
from convsim_cli.settings import declarations
from convsim_cli.training.config import Arguments
from convsim_cli.training.run import ACCURACIES, ARGUMENTS_FILE, Row, Run, open_run, read_layers, read_results, spread

CONFIDENCE = 0.95  # of the interval of a mean


@dataclass(frozen=True)
class RunResults(Run):
    """A run with its rows of `results.csv`."""

    rows: list[Row]

    @property
    def seed(self) -> int:
        return self.arguments.seed

    @property
    def data(self) -> tuple[str, int | None]:
        """What tells the images that the run was tested on from others; a folder of images may lie anywhere."""
        return self.arguments.folder_digest or self.arguments.dataset, self.arguments.limit_test


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed, in the order of their seeds.

    name: for instance `mode=init` or `lr=0.1`. arguments: those in which the groups differ, with this group's values.
    """

    name: str
    arguments: dict[str, Any]
    runs: tuple[RunResults, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


def compare_runs(
    paths: Iterable[Path], baseline: str | None = None, accuracy: float | None = None, epochs: int | None = None
) -> dict[str, Any]:
    """Return the groups of runs that differ only by seed, with their figures: the content of the JSON document.

    paths: folders of runs, and folders that hold them. baseline: the name of a group, or of one of its runs; unless
    given, the group of mode baseline, if there is one. accuracy: a test accuracy in per cent, for the epochs that runs
    take to it. epochs: compare only the first ones. Figures are means over seeds in per cent with standard deviations;
    differences are means over the seeds that a group has in common with the baseline, with their 95 % intervals, the
    p-values of the paired t-test (`p`), and those after Holm's correction for all groups of the table (`p_holm`).
    Groups that were tested on other images (`data`) each have a baseline of their own. Runs that cannot be compared are
    left out with a warning. Raises InputError if none is left.
    """
    if accuracy is not None and not 0 <= accuracy <= 100:
        raise InputError(f"`accuracy` {accuracy}: expected a number from 0 to 100, in per cent")
    if accuracy is not None and 0 < accuracy < 1:
        raise InputError(f"`accuracy` {accuracy}: expected per cent; did you mean {100 * accuracy:g}?")
    if epochs is not None and epochs < 1:
        raise InputError(f"`epochs` {epochs}: expected a number of 1 or above")
    runs = read_runs(paths)
    if epochs is not None:
        short = [run for run in runs if len(run.rows) < epochs]
        reasons = [f"{run.folder}: has done {len(run.rows)} epochs, fewer than `epochs` {epochs}" for run in short]
        runs = _without(short, runs, reasons)
        runs = [replace(run, rows=run.rows[:epochs]) for run in runs]
    unfinished = [pair for table in _by_data(runs).values() for pair in _unfinished(table)]
    runs = _without([run for run, _ in unfinished], runs, [reason for _, reason in unfinished])
    if epochs is None:
        warn_of_unfinished(runs)
    tables = _by_data(runs)
    compared = [_compare_groups(table) for table in tables.values()]
    if baseline is not None and not any(_matching(groups, baseline) for groups in compared):
        known = [name for groups in compared for name in _named_groups(groups)]
        raise InputError(f"`baseline` {baseline!r}: no such group or run; {did_you_mean(baseline, known)}")
    figures, references, labels = [], [], data_labels(runs)
    for data, groups in zip(tables, compared, strict=True):
        reference = _find_baseline(groups, baseline)
        references.append(reference.name if reference else None)
        figures += _with_holm([_figures(group, labels[data], reference, accuracy) for group in groups])
    return {
        "baseline": references[0] if len(set(references)) == 1 else None,
        "accuracy": accuracy,
        "groups": figures,
    }


def data_labels(runs: Iterable[RunResults]) -> dict[tuple[str, int | None], str]:
    """Return what to call the images that runs were tested on, by `RunResults.data`; no two are called the same."""
    labels: dict[tuple[str, int | None], str] = {}
    for run in runs:
        if run.data in labels:
            continue
        tested = run.arguments
        label = tested.dataset
        if tested.limit_test:
            label += f", first {tested.limit_test} test images"
        if label in labels.values():  # the images in a folder were replaced
            label += f", digest {(tested.folder_digest or 'unknown')[:8]}"
        labels[run.data] = label
    return labels


def warn_of_unfinished(runs: Iterable[RunResults]) -> None:
    """Warn about runs that have not done all of their epochs."""
    found = [run for run in runs if len(run.rows) < run.arguments.epochs]
    if found:
        listed = [f"{run.folder} ({len(run.rows)} of {run.arguments.epochs} epochs)" for run in found]
        warnings.warn(f"not finished: {some_of(listed)}", ConvsimWarning, stacklevel=3)


def _without(left_out: Sequence[RunResults], runs: Sequence[RunResults], reasons: Sequence[str]) -> list[RunResults]:
    """Return the runs without some of them, and warn with the reasons. Raises InputError if none is left."""
    kept = [run for run in runs if run not in left_out]
    if not kept and reasons:
        raise InputError(reasons[0])
    for reason in reasons:
        warnings.warn(f"left out: {reason}", ConvsimWarning, stacklevel=3)
    return kept


def _by_data(runs: Iterable[RunResults]) -> dict[tuple[str, int | None], list[RunResults]]:
    """Return the runs by the images that they were tested on, a table each."""
    tables: dict[tuple[str, int | None], list[RunResults]] = {}
    for run in runs:
        tables.setdefault(run.data, []).append(run)
    return tables


def _unfinished(runs: Sequence[RunResults]) -> list[tuple[RunResults, str]]:
    """Return the unfinished runs of a table where its runs differ in length, each with why it is left out."""
    lengths = {len(run.rows) for run in runs}
    return [
        (
            run,
            f"{run.folder}: has done {len(run.rows)} of {run.arguments.epochs} epochs, other runs have done "
            f"{max(lengths - {len(run.rows)})}; finish it, or compare the first ones with `epochs` {min(lengths)}",
        )
        for run in sorted(runs, key=lambda run: len(run.rows))
        if len(run.rows) < run.arguments.epochs and len(lengths) > 1
    ]


def _compare_groups(runs: Sequence[RunResults]) -> list[Group]:
    """Return the groups of runs on the same test images, without runs of the arguments and the seed of another one."""
    groups = group_by_seed(runs, by_length=True)
    pairs = [(one, other) for group in groups for one, other in pairwise(group.runs) if one.seed == other.seed]
    reasons = [f"{other.folder}: has the same arguments and seed as {one.folder}" for one, other in pairs]
    return group_by_seed(_without([other for _, other in pairs], runs, reasons), by_length=True) if pairs else groups


def _named_groups(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups by every name that `baseline` may have: their own, and those and the paths of their runs."""
    by_name = {group.name: [group] for group in groups}
    for group in groups:
        for run in group.runs:
            for spelling in {str(run.folder), run.folder.resolve().name}:
                by_name.setdefault(spelling, []).append(group)
    return by_name


def _matching(groups: Sequence[Group], name: str) -> list[Group]:
    """Return the groups of that name, of a run of that name or path, or else those whose names contain its settings."""
    by_name, settings = _named_groups(groups), set(name.split(", "))
    exact = by_name.get(name) or by_name.get(str(Path(name)))
    return exact or [group for group in groups if settings <= set(group.name.split(", "))]


def _find_baseline(groups: Sequence[Group], name: str | None) -> Group | None:
    if name is None:
        plain = [group for group in groups if group.runs[0].arguments.mode == "baseline"]
        if len(plain) > 1:  # then the one whose other arguments are the defaults
            known = declarations(Arguments)
            plain = [
                group
                for group in plain
                if all(value == known[key].default for key, value in group.arguments.items() if key != "epochs")
            ]
        return plain[0] if len(plain) == 1 else None
    found = _matching(groups, name)
    if len(found) > 1:
        those = "; ".join(group.name for group in found)
        raise InputError(f"`baseline` {name!r}: matches {len(found)} groups ({those}); give the path of a run")
    return found[0] if found else None


def _figures(group: Group, data: str, reference: Group | None, accuracy: float | None) -> dict[str, Any]:
    histories = [run.rows for run in group.runs]
    return {
        "group": group.name,
        "data": data,
        "baseline": reference.name if reference else None,
        "arguments": group.arguments,
        "runs": [str(run.folder) for run in group.runs],
        "seeds": group.seeds,
        "n": len(group.runs),
        "epochs": len(histories[0]),
        **{key: spread([figure(rows) for rows in histories]) for key, figure in ACCURACIES.items()},
        "epochs_to_accuracy": None if accuracy is None else epochs_to(accuracy, histories),
        "difference": None if reference in (None, group) else _difference(group, reference),
    }


def epochs_to(
    accuracy: float, histories: Sequence[Sequence[Row]], column: str = "test_accuracy"
) -> dict[str, float | None]:
    """Return how many runs reach an accuracy (per cent), and mean and deviation of the epochs that they take to it.

    These two are null unless every run reaches it.
    """
    first = [next((row["epoch"] for row in rows if row[column] >= accuracy), None) for rows in histories]
    reached = [epoch for epoch in first if epoch is not None]
    return {"reached": len(reached), **spread(reached if len(reached) == len(first) else [])}


def _difference(group: Group, reference: Group) -> dict[str, Any]:
    ours, theirs = ({run.seed: run.rows for run in of.runs} for of in (group, reference))
    seeds = [seed for seed in group.seeds if seed in theirs]
    found: dict[str, Any] = {"n": len(seeds), "seeds": seeds}
    for key, figure in ACCURACIES.items():
        values = [figure(ours[seed]) - figure(theirs[seed]) for seed in seeds]
        low, high = mean_interval(values) or (None, None)
        found[key] = {"mean": mean(values) if values else None, "low": low, "high": high, "p": p_value(values)}
    return found


def _with_holm(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the adjusted p-values to the differences of a table's groups, accuracy by accuracy."""
    for key in ACCURACIES:
        found = [group["difference"][key] for group in figures if group["difference"]]
        tested = [difference for difference in found if difference["p"] is not None]
        for difference in found:
            difference["p_holm"] = None
        for difference, p in zip(tested, holm([difference["p"] for difference in tested]), strict=True):
            difference["p_holm"] = p
    return figures


def read_runs(paths: Iterable[Path]) -> list[RunResults]:
    """Return the runs at these paths, each once. A path is a run's folder, or a folder that holds folders of runs.

    What is no readable run, or has no epoch yet, is left out with a warning. Raises InputError for a path without runs,
    and where none is left.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [path] if os.path.lexists(path / ARGUMENTS_FILE) else _subfolders(path)
        folders |= {folder.resolve(): folder for folder in found}
    runs, reasons = [], []
    for folder in folders.values():
        try:
            run = RunResults(folder, open_run(folder).arguments, read_results(folder))
            if not run.rows:
                raise InputError(f"{folder}: has no finished epoch yet; train it first")
            runs.append(run)
        except InputError as error:
            reasons.append(str(error))
    return _without([], runs, reasons)


def _subfolders(path: Path) -> list[Path]:
    """Return the folders in a folder of runs. Raises InputError if none of them is a run's."""
    if not path.exists():
        beside = [other.name for other in path.absolute().parent.glob("*") if other.is_dir()]
        close = get_close_matches(path.name, beside, n=1)
        raise InputError(
            f"{path}: not a run's folder: it does not exist"
            + (f"; did you mean {path.with_name(close[0])}?" if close else "")
        )
    if not path.is_dir():
        raise InputError(f"{path}: not a run's folder: it is a file")
    try:
        found = sorted(folder for folder in path.iterdir() if folder.is_dir() or not folder.exists())  # a broken link
    except OSError as error:
        problem = f"{path}: not a run's folder (no readable args.json), and it holds none ({error.strerror})"
        raise InputError(problem) from error
    runs = [folder for folder in found if os.path.lexists(folder / ARGUMENTS_FILE)]
    found = [folder for folder in found if folder in runs or not folder.name.startswith(".")]
    if not runs:
        raise InputError(f"{path}: not a run's folder (no readable args.json), and it holds none")
    return found


def rows_with_turns(run: RunResults) -> list[Row]:
    """Return a run's rows, each with the medians over the layers of `turned` and `turn_per_step`, None if unknown."""
    try:
        layers = read_layers(run.folder)
    except InputError as error:
        layers = []
        warnings.warn(f"rotation is omitted: {error}", ConvsimWarning, stacklevel=2)
    by_epoch: dict[int, list[Row]] = {}
    for layer in layers:
        by_epoch.setdefault(layer["epoch"], []).append(layer)
    rows = []
    for row in run.rows:
        own = by_epoch.get(row["epoch"], [])
        found = {key: [layer[key] for layer in own if layer[key] is not None] for key in ("turned", "turn_per_step")}
        rows.append({**row, **{key: median(values) if values else None for key, values in found.items()}})
    return rows


def group_by_seed(runs: Sequence[RunResults], by_length: bool = False) -> list[Group]:
    """Return the groups of runs that differ only by seed, in the order of their first runs.

    The number of a CUDA device does not tell runs apart, nor does the place of their data. by_length: whether the
    number of finished epochs does. With a cosine schedule the configured number always does.
    """
    grouped: dict[tuple[Any, ...], list[RunResults]] = {}
    for run in runs:
        values = {name: value for name, value in run.arguments.identity().items() if name != "seed"}
        values["device"] = run.arguments.device.partition(":")[0]
        if by_length:  # comes first; with a cosine schedule, the configured number is among the values
            values = {"epochs": len(run.rows)} | values
        grouped.setdefault(tuple(values.items()), []).append(run)
    configurations, known = [dict(key) for key in grouped], declarations(Arguments)
    differing = []
    for name, declaration in known.items():  # what a run does not use is as its default; epochs are not
        usual = {} if name == "epochs" else {name: declaration.default}
        if len({(usual | values)[name] for values in configurations if name in usual | values}) > 1:
            differing.append(name)
    owns, settings = [], []
    for configuration in configurations:
        own = {name: configuration[name] for name in differing if name in configuration}
        # named by the mode, if it differs, and what else differs from the defaults; by the first if nothing does
        named = [name for name, value in own.items() if name == "mode" or value != known[name].default]
        owns.append(own)
        settings.append({name: configuration[name] for name in named or [*own][:1] or ["mode"]})
    names = [_join_settings(shown, "{:.3g}") for shown in settings]
    if len(set(names)) < len(names):
        names = [_join_settings(shown, "{}") for shown in settings]
    members = [tuple(sorted(found, key=lambda run: run.seed)) for found in grouped.values()]
    return [Group(*group) for group in zip(names, owns, members, strict=True)]


def _join_settings(settings: dict[str, Any], number: str) -> str:
    """Return for instance `mode=rescale, factor=0.07`. number: the format of floats."""
    values = {
        name: number.format(value)
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else str(value).lower()
        for name, value in settings.items()
    }
    return ", ".join(f"{name}={value}" for name, value in values.items())


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the lower and the upper end of the 95 % interval of the mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    center = mean(values)
    half = student_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return center - half, center + half


def p_value(values: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a mean other than 0 by Student's t-test, None for fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    angle = atan2(abs(mean(values)) * sqrt(len(values)), stdev(values) * sqrt(freedom))
    return max(0.0, 1 - _probability(angle, freedom))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that one of them below 0.05 by chance has a probability of 5 % (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


@cache
def student_quantile(freedom: int) -> float:
    """Return the t that |T| stays below with probability 0.95, for T of Student's distribution.

    freedom: degrees of freedom, at least 1. Found by bisection of arctan(t/√freedom), down to neighboring floats.
    """
    low, high = 0.0, pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _probability(middle, freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return sqrt(freedom) * tan(low)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom·tan(angle)), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    total, term = 0.0, cos(angle) if odd else 1.0
    for index in range(freedom // 2):
        total += term
        term *= cos(angle) ** 2 * (2 * index + 1 + odd) / (2 * index + 2 + odd)
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
