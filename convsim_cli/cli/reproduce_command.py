"""`convsim reproduce`: the paper's experiments, published and measured numbers side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsim_cli.checkpoints.atomic import check_regular
from convsim_cli.cli.console import Console, Least, Progress, duration, make_document, remaining
from convsim_cli.cli.options import (
    MOST_SEEDS,
    DeviceOption,
    JsonOption,
    QuietOption,
    WideOption,
    add_options,
    choose_device,
    typed,
)
from convsim_cli.cli.train_command import epoch_line
from convsim_cli.errors import InputError
from convsim_cli.plots import check_picture, draw_experiment, save_figure
from convsim_cli.reproduction.published import ALL, ARMS, NUMERICAL_TABLES, SETS, USUAL_ARMS, arms_of
from convsim_cli.training.config import Arguments

if TYPE_CHECKING:
    from convsim_cli.inputs.images import Dataset
    from convsim_cli.reproduction.experiments import Choices, Outcome
    from convsim_cli.training.run import Run


EXAMPLES = """\b
Examples:
 convsim reproduce table1                        # half a minute, no data
 convsim reproduce table2 --json | jq '.rows[].measured.cos_after'
 convsim reproduce table5 --dry-run              # how many runs, how long
 convsim reproduce figure3 --archs cnn1 --arms baseline,init --epochs 10
 convsim reproduce table5 --arms published,controls --seeds 5 \\
   --archs cnn1 --limit-train 10000 --epochs 30
 convsim reproduce figure4 --lrs 0.01 --batch-sizes 64,128 --epochs 5
 convsim reproduce table5 --seeds 3 --device cuda -q > table5.tsv"""

_OF_TRAINING = (
    *("archs", "arms", "lrs", "batch_sizes", "iterations", "seeds", "epochs", "limit_train", "limit_test"),
    *("precision", "compile", "data_dir"),
)
_LISTS: dict[str, tuple[Callable[[str], Any], int | None, str]] = {  # each item's type and least value, what to expect
    "archs": (str, None, "names"),
    "arms": (str, None, "names"),
    "lrs": (float, None, "numbers"),
    "batch_sizes": (int, 1, "whole numbers of 1 or above"),
    "iterations": (int, 0, "whole numbers of 0 or above"),
}


def complete_experiment(begun: str) -> list[str]:
    """Return the experiment names with this prefix."""
    from convsim_cli.reproduction.experiments import known_experiments

    return [name for name in known_experiments() if name.startswith(begun)]


def complete_arms(begun: str) -> list[str]:
    """Return the completions of a list of arms: arms, sets of arms, and all."""
    first, comma, last = begun.rpartition(",")
    return [f"{first}{comma}{name}" for name in (*SETS, ALL, *ARMS) if name.startswith(last)]


@add_options(
    Arguments,
    only=("precision", "compile", "data_dir", "limit_train", "limit_test", "seed"),
    rare=("lrs", "batch_sizes", "iterations", "wide", "quiet"),
    tables={"Sets of arms": {name: ", ".join(arms_of(name)) for name in SETS}},
)
def reproduce(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="table1, 2, 3, 5 or 6, or figure1 to figure5.", autocompletion=complete_experiment
        ),
    ],
    episodes: Annotated[
        int | None,
        typer.Option(metavar="N", help="table1, 2, 3, 6: episodes per row. Default: 1000.", min=2, show_default=False),
    ] = None,
    archs: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="table5, figure1 to 3: networks. Default: cnn1,cnn2.", show_default=False),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="table5, figure1 to 3: arms (ways to train), sets of arms, or all. See below. "
            f"Default: {', '.join(USUAL_ARMS)}.",
            show_default=False,
            autocompletion=complete_arms,
        ),
    ] = None,
    lrs: Annotated[str | None, typer.Option(metavar="A,B", help="figure4: learning rates.", show_default=False)] = None,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", metavar="A,B", help="figure4: batch sizes.", show_default=False)
    ] = None,
    iterations: Annotated[
        str | None, typer.Option(metavar="A,B", help="figure5: iterations of Algorithm 1.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Runs per configuration, seeded from --seed.", min=1, max=MOST_SEEDS, show_default="1"
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Epochs per run. Default: the paper's.", min=1, show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count runs and epochs, and estimate their time. Writes nothing.")
    ] = False,
    run_dir: Annotated[Path, typer.Option("--run-dir", metavar="DIR", help="Folder for the run folders.")] = Path(
        "runs"
    ),
    device: DeviceOption = "auto",
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **arguments: Any,
) -> None:
    """Repeat an experiment of the paper and show published and measured numbers side by side.

    Results are saved as RUN_DIR/NAME.json, figures also as RUN_DIR/NAME.png. Finished runs in RUN_DIR with the same
    arguments are reused, and unfinished ones resumed. All numbers are in per cent except correlations, cosines and
    L_CS; some columns are not in the paper.

    On two CPU cores, table1, 2, 3 and 6 take half a minute each, an epoch of cnn1 on CIFAR-10 takes 30 seconds, and
    one of resnet18 takes 7 minutes. To estimate the time on your machine, add --dry-run.
    """
    from convsim_cli.reproduction.experiments import find_experiment

    console = Console(quiet, as_json, wide)
    given = {**context.params, "run_dir": run_dir}  # a path as text in older typers
    is_numerical = any(table.name == name for table in NUMERICAL_TABLES)
    if not is_numerical:
        find_experiment(name)
    for key in _OF_TRAINING if is_numerical else ["episodes"]:
        if key in typed(context):
            raise InputError(f"{name} does not take `{key}`; remove it")
    if is_numerical:
        _run_numerical(name, given, console)
    elif dry_run:
        _show_estimate(name, given, console)
    else:
        _run_trained(name, given, console)


def _run_numerical(name: str, given: dict[str, Any], console: Console) -> None:
    from convsim_cli.reproduction.numerical import EPISODES, find_table, numerical_steps, reproduce_table
    from convsim_cli.training.launch import make_folder
    from convsim_cli.training.run import write_json

    if given["device"] != "auto" and choose_device(given["device"], console).type != "cpu":
        raise InputError(f"{name} runs in float64 on the CPU within a minute; remove `device`")
    document, episodes, steps = given["run_dir"] / f"{name}.json", given["episodes"] or EPISODES, numerical_steps(name)
    _check_output(name, given["run_dir"])
    if given["dry_run"]:
        counts = {"episodes": episodes, "iterations": steps}
        console.document("reproduce", {"name": name, "title": find_table(name).title, "dry_run": True, **counts})
        if not console.as_json:
            console.table(["name", *counts], [[name, *counts.values()]])
            console.note(f"half a minute for {EPISODES:,} episodes on two CPU cores; needs no data")
        return
    make_folder(given["run_dir"])
    with console.progress(name, steps) as advance:
        content = reproduce_table(name, episodes, given["seed"], advance)
    write_json(document, make_document("reproduce", content))
    console.document("reproduce", content)
    if not console.as_json:
        console.table(*numerical_table(content["rows"]), LEAST)
        claim = f"; published: {content['claim']}" if content["claim"] else ""
        note = f"; {content['note']}" if content["note"] else ""
        console.note(f"{content['title']}; {content['episodes']} episodes per row{claim}{note}")
        console.note(f"saved {document}")


def _show_estimate(name: str, given: dict[str, Any], console: Console) -> None:
    from convsim_cli.reproduction.experiments import estimate_experiment, find_experiment

    experiment = find_experiment(name)
    _check_output(name, given["run_dir"])
    choices = _choices(given, console)
    console.note("timing part of an epoch for each network and batch size")
    content = console.document("reproduce", estimate_experiment(experiment, choices, given["run_dir"]))
    if not console.as_json:
        columns = ["arch", "batch_size", "runs", "finished", "epochs", "epochs_done", "seconds_per_epoch"]
        rows = [[*(row[column] for column in columns), duration(row["seconds"])] for row in content["rows"]]
        console.table([*columns, "time"], rows, ["finished", "epochs_done", "batch_size"])
        runs, epochs, rest = content["runs"], content["epochs"], duration(content["seconds"])
        left = f"the rest takes about {rest} at the current load" if content["seconds"] else "nothing is left to run"
        console.note(
            f"{name}: {runs} run{'s' if runs > 1 else ''}, {content['finished']} finished; "
            f"{epochs:,} epoch{'s' if epochs > 1 else ''}, {content['epochs_done']:,} done; {left}"
        )
        console.note(f"not in this estimate: {content['not_estimated']}")


def _run_trained(name: str, given: dict[str, Any], console: Console) -> None:
    from convsim_cli.reproduction.experiments import CampaignCallbacks, find_experiment, run_experiment
    from convsim_cli.training.run import write_json

    experiment = find_experiment(name)
    _check_output(name, given["run_dir"])
    is_figure = name.startswith("figure")
    choices = _choices(given, console)
    console.note(f"batch-norm statistics in evaluation: {choices.base.bn_statistics} (see convsim train --help-all)")
    with ExitStack() as bar:
        screen = CampaignScreen(console, name, bar)
        report = CampaignCallbacks(screen.begin, screen.progress, screen.epoch, screen.plan, screen.end, screen.wait)
        content = run_experiment(experiment, choices, given["run_dir"], report)
    write_json(given["run_dir"] / f"{name}.json", make_document("reproduce", content))
    if is_figure:
        save_figure(draw_experiment(name, content["rows"], content["title"]), given["run_dir"] / f"{name}.png")
    console.document("reproduce", content)
    if not console.as_json:
        usual: dict[str, Any] = {"epochs": choices.epochs or experiment.epochs, "diverged": 0}
        console.table(*EXPERIMENT_TABLES[name](content["rows"]), least=LEAST, **usual)
        seeds = f"{choices.seeds} seeds" if choices.seeds > 1 else "1 seed"
        claim = f"; published: {content['claim']}" if content["claim"] else ""
        console.note(f"{content['title']}; {seeds}{claim}")
    console.note(f"saved {given['run_dir'] / name}.json" + (" and .png" if is_figure else ""))


class CampaignScreen:
    """Many runs on the screen: one bar for all and a line per run on a terminal, a line per epoch elsewhere.

    bar: holds the bar until the runs have ended.
    """

    def __init__(self, console: Console, name: str, bar: ExitStack) -> None:
        self._console, self._name, self._bar, self._progress = console, name, bar, Progress()
        self._runs = self._ended = self._of_run = self._done = self._total = 0  # runs, and epochs
        self._start, self._epochs, self._said = time.monotonic(), 0, ""

    def plan(self, runs: int, finished: int, epochs: int) -> None:
        """Print how many runs there are, and how many are reused."""
        reused = f", {finished} of them already finished" if finished else ""
        self._console.note(f"{self._name}: {runs} run{'s' if runs > 1 else ''}{reused}")
        if epochs and not finished:
            self._console.note("you can stop at any time; the same command resumes")
        self._runs, self._ended, self._total = runs, finished, epochs
        if self._console.live:
            self._progress = self._bar.enter_context(self._console.progress(self._name, epochs))

    def begin(self, run: Run, _: Dataset) -> None:
        """Note the current run; all have the same images."""
        self._said, self._epochs = f"{run.name} ({self._ended + 1} of {self._runs})", run.arguments.epochs

    @contextmanager
    def progress(self, phase: str, _: int) -> Iterator[Callable[[int], None]]:
        """Show the phase of the current run. The bar counts epochs."""
        self._progress.describe(f"{self._said} {phase}")
        yield lambda steps: None

    def epoch(self, row: dict[str, Any]) -> None:
        """Advance the bar or, without one, print an epoch's figures."""
        self._advance(1)
        if not self._console.live:
            whole = remaining(self._done, self._total, time.monotonic() - self._start)
            line = f"{epoch_line(row, self._epochs)}  {row['seconds']:.1f} s"
            self._console.note(f"{self._said} {line}; {self._name} {whole}")

    def end(self, outcome: Outcome, epochs: int) -> None:
        """Show how a run ended, and count its epochs as done, including those trained by other processes."""
        self._advance(max(0, epochs - self._of_run))
        self._ended, self._of_run = self._ended + 1, 0
        if outcome.diverged:
            self._console.warn(f"{outcome.run.folder}: {outcome.diverged}")
        elif self._console.live:
            best = max(row["test_accuracy"] for row in outcome.rows)
            took = duration(sum(row["seconds"] for row in outcome.rows))
            last = outcome.rows[-1]["test_accuracy"]
            self._console.note(f"{outcome.run.folder}: test accuracy {best:.2f} % at best, {last:.2f} % last, {took}")

    def wait(self, name: str) -> None:
        """Report that only other processes' runs are left."""
        said = f"waiting for {name}, which another process is training"
        if said != self._said:
            self._said = said
            self._console.note(said)
            self._progress.describe(said)

    def _advance(self, epochs: int) -> None:
        self._of_run, self._done = self._of_run + epochs, self._done + epochs
        self._progress(epochs)


def _check_output(name: str, run_dir: Path) -> None:
    """Raise InputError, before any work is done, where RUN_DIR/NAME.json or .png is not one of this command's."""
    from convsim_cli.device import read_bounded

    document = run_dir / f"{name}.json"
    check_regular(document, "a document of convsim reproduce")
    if document.exists():
        try:
            found = json.loads(read_bounded(document) or "{}")
            is_ours = found == {} or found["command"] == "reproduce"
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            is_ours = False
        if not is_ours:
            raise InputError(f"{document}: exists and was not written by convsim reproduce; choose another `run_dir`")
    if name.startswith("figure") and run_dir.is_dir():
        check_picture(run_dir / f"{name}.png")


def _choices(given: dict[str, Any], console: Console) -> Choices:
    from convsim_cli.device import keep_freed_memory
    from convsim_cli.reproduction.experiments import Choices

    device = choose_device(given["device"], console)
    if device.type == "cpu":
        keep_freed_memory()
    base = Arguments(
        data_dir=given["data_dir"],
        limit_train=given["limit_train"],
        limit_test=given["limit_test"],
        precision=given["precision"],
        compile=given["compile"],
        seed=given["seed"],
        device=str(device),
    )
    lists = {option: _list(option, given[option]) for option in _LISTS}
    return Choices(base, given["seeds"] or 1, given["epochs"], **lists)


def _list(option: str, text: str | None) -> tuple[Any, ...] | None:
    """The items of a comma-separated option, each once. Raises InputError."""
    if text is None:
        return None
    kind, least, expected = _LISTS[option]
    try:
        found = tuple(dict.fromkeys(kind(item.strip()) for item in text.split(",") if item.strip()))
    except ValueError:
        found = ()
    if not found or (least is not None and min(found) < least):
        raise InputError(f"`{option}` {text!r}: expected {expected} separated by commas")
    return found


Table = tuple[list[str], list[list[Any]]]

LEAST: Least = (  # columns that a narrow terminal does without, in the order in which they go
    ("increase_published", "increase_measured"),
    ("decrease_published", "decrease_measured"),
    "reduction_fixed_norms",
    ("cos_before", "cos_after", "cos_after_fixed_norms"),
    *("time", "epochs", "cs", "epochs_to_99", "train_accuracy", "mean_last5"),
    ("baseline_last", "init_last"),
)


def numerical_table(rows: list[dict[str, Any]]) -> Table:
    """Return Table 1, 2, 3 or 6, with the figures at fixed norms."""
    figures = ("correlation", "reduction", "decrease", "increase")
    columns = ["N", "optimizer", *(f"{figure}_{side}" for figure in figures for side in ("published", "measured"))]
    columns += ["cos_before", "cos_after", "cos_after_fixed_norms", "reduction_fixed_norms"]
    table = []
    for row in rows:
        cells: list[Any] = [row["N"], row["optimizer"]]
        for figure in figures:
            for found in (row["published"], row["measured"]):
                is_frequency = figure == "reduction"  # a count has no spread
                mean, std = (found.get(f"{figure}_{part}") for part in ("mean", "std"))
                cells.append(found["reduction_frequency"] if is_frequency else _spread(mean, std, 3))
        cells += [row["measured"]["cos_before"], row["measured"]["cos_after"]]
        table.append([*cells, row["fixed_norms"]["cos_after"], row["fixed_norms"]["reduction_frequency"]])
    return columns, table


def _spread(mean: float | None, std: float | None, digits: int) -> str | None:
    if mean is None:
        return None
    return f"{mean:.{digits}g}" + ("" if std is None else f" ± {std:.2g}")


_LAST = ("epochs_to_99", "cs", "time", "epochs", "diverged")


def _arms_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["arch", "arm", "published", "best_test_accuracy", "last_test_accuracy", "mean_last5", "train_accuracy"]
    return [*columns, *_LAST], [
        [row["arch"], row["arm"], row["published"]["test_accuracy"], *_measured(row["measured"])] for row in rows
    ]


def _measured(found: dict[str, Any]) -> list[Any]:
    keys = ("best_test_accuracy", "last_test_accuracy", "mean_last5_test_accuracy", "last_train_accuracy")
    spreads = [_spread(found[key], found[f"{key}_std"], 4) for key in keys]
    time = None if found["seconds"] is None else duration(found["seconds"])
    return [*spreads, found["epochs_to_99"], found["cs"], time, found["epochs"], found["diverged"]]


def _curves_table(rows: list[dict[str, Any]]) -> Table:
    column = next(key for key in ("cs", "train_loss", "train_accuracy") if key in rows[0])
    table = []
    for row in rows:
        first, last = (row[column][0], row[column][-1]) if row[column] else (None, None)
        table.append([row["arch"], row["arm"], row["seed"], len(row[column]), first, last])
    return ["arch", "arm", "seed", "epochs", f"first_{column}", f"last_{column}"], table


def _grid_table(rows: list[dict[str, Any]]) -> Table:
    return ["lr", "batch_size", "gain_published", "gain_measured", "baseline", "init", "baseline_last", "init_last"], [
        [row["lr"], row["batch_size"], row["published"]["gain"], row["measured"]["gain"]]
        + [
            _spread(row["measured"][side][key], row["measured"][side][f"{key}_std"], 4)
            for key in ("best_test_accuracy", "last_test_accuracy")
            for side in ("baseline", "init")
        ]
        for row in rows
    ]


def _iterations_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["iterations", "best_test_accuracy", "last_test_accuracy", "mean_last5", "train_accuracy"]
    return [*columns, *_LAST], [[row["iterations"], *_measured(row["measured"])] for row in rows]


EXPERIMENT_TABLES: dict[str, Callable[[list[dict[str, Any]]], Table]] = {
    "table5": _arms_table,
    "figure1": _curves_table,
    "figure2": _curves_table,
    "figure3": _curves_table,
    "figure4": _grid_table,
    "figure5": _iterations_table,
}
