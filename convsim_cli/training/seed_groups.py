"""Runs with their results, in groups that differ only by seed, named by the arguments in which the groups differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convsim_cli.errors import InputError
from convsim_cli.training.arguments import Arguments, declarations
from convsim_cli.training.results import Row, read_results
from convsim_cli.training.run_folder import open_run


@dataclass(frozen=True)
class RunResults:
    """A run's folder, its arguments and its rows of `results.csv`."""

    folder: Path
    arguments: Arguments
    rows: list[Row]

    @property
    def seed(self) -> int:
        return self.arguments.seed


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


def read_runs(paths: Iterable[Path]) -> list[RunResults]:
    """Return the runs at these paths, each once. A path is a run's folder, or a folder that holds folders of runs.

    Raises InputError for a path without runs, and for a run whose arguments or results cannot be read.
    """
    folders = {folder.resolve(): folder for path in paths for folder in _run_folders(path)}
    return [RunResults(folder, open_run(folder).arguments, read_results(folder)) for folder in folders.values()]


def group_by_seed(runs: Sequence[RunResults], by_length: bool = False) -> list[Group]:
    """Return the groups of runs that differ only by seed, in the order of their first runs.

    The number of a CUDA device does not tell runs apart, nor does the place of their data. by_length: whether the
    number of finished epochs does. With a cosine schedule the configured number always does.
    """
    grouped: dict[tuple[Any, ...], list[RunResults]] = {}
    for run in runs:
        grouped.setdefault(tuple(_configuration(run, by_length).items()), []).append(run)
    configurations = [dict(key) for key in grouped]
    differing = [
        name for name in declarations() if len({values[name] for values in configurations if name in values}) > 1
    ]
    return [
        Group(
            _name(configuration, differing),
            {name: configuration[name] for name in differing if name in configuration},
            tuple(sorted(found, key=lambda run: run.seed)),
        )
        for configuration, found in zip(configurations, grouped.values(), strict=True)
    ]


def _run_folders(path: Path) -> Iterator[Path]:
    if (path / "args.json").exists():
        yield path
        return
    found = sorted(file.parent for file in path.glob("*/args.json"))
    if not found:
        raise InputError(f"{path}: not a run's folder (no readable args.json), and it holds none")
    yield from found


def _configuration(run: RunResults, by_length: bool) -> dict[str, Any]:
    """What the runs of a group have in common, by the names of the arguments."""
    values = {name: value for name, value in run.arguments.identity().items() if name != "seed"}
    values["device"] = run.arguments.device.partition(":")[0]
    return {"epochs": len(run.rows), **values} if by_length else values  # those of a cosine schedule are in `values`


def _name(configuration: dict[str, Any], differing: Sequence[str]) -> str:
    """The mode, if it differs, and what else differs from the defaults; the first that differs if nothing does."""
    known = declarations()
    differing = [name for name in differing if name in configuration]
    named = [name for name in differing if name == "mode" or configuration[name] != known[name].default]
    named = named or differing[:1] or ["mode"]
    return ", ".join(f"{name}={_shown(configuration[name])}" for name in named)


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
