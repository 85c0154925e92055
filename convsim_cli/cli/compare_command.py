"""`convsim compare`: runs side by side, a row per group of seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convsim_cli.cli.console import Cell, Console, Least
from convsim_cli.cli.options import JsonOption, QuietOption, WideOption, add_options

EXAMPLES = """\b
Examples:
 convsim compare runs                              # every run in the folder
 convsim compare runs/cnn1-baseline-s* runs/cnn1-init-s* --accuracy 60
 convsim compare runs --baseline lr=0.1            # a group of seeds
 convsim compare runs --baseline cnn1-init-s0      # the group of this run
 convsim compare runs --json | jq '.groups[].difference'"""

HEADERS = {  # on a terminal, by the keys of JSON, which TSV has as they are
    "best_test_accuracy": "best_accuracy",
    "last_test_accuracy": "last_accuracy",
    "mean_last5_test_accuracy": "mean_last5",
    "last_train_accuracy": "train_accuracy",
}
_COMPARED = {"best_test_accuracy": "best_difference", "mean_last5_test_accuracy": "last5_difference"}

_TESTED = ("mean", "low", "high", "p", "p_holm")  # what a difference has, by the keys of JSON

LEAST: Least = ("train_accuracy", "last_accuracy", "last5_p", "last5_difference", "mean_last5", "best_p")


@add_options(rare=("epochs", "wide", "quiet"))
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders that contain them.")],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Group to compare with, or a run of that group. Default: the group of mode baseline.",
            show_default=False,
        ),
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Show the epochs needed for this test accuracy, in per cent.",
            min=0,
            max=100,
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Compare only the first N epochs.", min=1, show_default=False),
    ] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare runs. Runs that differ only by seed form one row, with means and standard deviations over the seeds.

    Groups are named by the arguments that differ. Differences from the baseline are paired by seed and have a 95 %
    interval (Student's t). If several groups are compared, they also have p-values after Holm's correction. One seed
    gives neither. Accuracies are in per cent, on the test images unless they are called train accuracies.
    """
    from convsim_cli.training.comparison import compare_runs

    console = Console(quiet, as_json, wide)
    content = compare_runs(runs, baseline, accuracy, epochs)
    console.document("compare", content)
    if as_json:
        return
    if not console.is_screen:
        console.table(*_full_table(content["groups"]), LEAST)
    by_data: dict[str, list[dict[str, Any]]] = {}
    for group in content["groups"]:
        by_data.setdefault(group["data"], []).append(group)
    for data, groups in by_data.items():
        if len(by_data) > 1:
            console.note(f"on {data}:")
        if console.is_screen:
            console.table(*screen_table(groups, accuracy), LEAST)
        lengths, reference = {group["epochs"] for group in groups}, groups[0]["baseline"]
        if len(lengths) == 1:
            console.note(f"epochs of each run: {lengths.pop()}")
        if any(group["difference"] for group in groups):
            tested = _tested(groups)
            intervals = ", with 95 % intervals (Student's t)" if tested else "; intervals need two seeds or more"
            corrected = f"; p: t-test, after Holm's correction for {tested} comparisons" if tested > 1 else ""
            console.note(f"differences from {reference}, paired by seed{intervals}{corrected}")
            for group in groups:
                if group["difference"] and not group["difference"]["n"]:
                    console.note(f"{group['group']}: has no seed in common with {reference}")
        elif not reference and len(groups) > 1:
            console.note("no differences: no single group is the baseline; choose a group or a run with --baseline")


def screen_table(groups: list[dict[str, Any]], accuracy: float | None) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows for a terminal: means ± deviations, and differences with their intervals."""
    compared = _COMPARED if any(group["difference"] for group in groups) else {}
    reach = [f"epochs_to_{accuracy:g}"] if accuracy is not None else []
    adjusted = _tested(groups) > 1
    columns = ["group", "n", *HEADERS.values(), *reach]
    for short in compared.values():
        columns += [short, short.replace("difference", "p")] if adjusted else [short]
    rows: list[list[Cell]] = []
    for group in groups:
        row: list[Cell] = [group["group"], group["n"], *(_plus_minus(group[key]) for key in HEADERS)]
        if reach:
            found = group["epochs_to_accuracy"]
            some = f"{found['reached']} of {group['n']} seeds"
            row.append(some if found["mean"] is None else _plus_minus(found))
        for key in compared:
            found = group["difference"][key] if group["difference"] else dict.fromkeys(_TESTED)
            ends = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
            pairs = (group["difference"] or {}).get("n", group["n"])
            some = f" ({pairs} pair{'s' if pairs != 1 else ''})" if pairs != group["n"] else ""
            row.append("" if found["mean"] is None else f"{found['mean']:+.2f}{ends}{some}")
            if adjusted:
                row.append("" if found["p_holm"] is None else f"{found['p_holm']:.2g}")
        rows.append(row)
    return columns, rows


def _full_table(groups: list[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows for TSV: every figure in a column of its own."""
    columns = ["group", "n", "epochs", *(f"{key}{end}" for key in HEADERS for end in ("", "_std"))]
    columns += ["epochs_to_accuracy", "epochs_to_accuracy_std", "reached", "pairs"]
    ends = ["", *(f"_{part}" for part in _TESTED[1:])]
    columns += [*(f"{key}_difference{end}" for key in HEADERS for end in ends), "data"]
    rows: list[list[Cell]] = []
    for group in groups:
        reached = group["epochs_to_accuracy"] or dict.fromkeys(("mean", "std", "reached"))
        nothing: dict[str, Any] = {"n": None, **dict.fromkeys(HEADERS, dict.fromkeys(_TESTED))}
        difference = group["difference"] or nothing
        row = [group[key] for key in ("group", "n", "epochs")]
        row += [group[key][part] for key in HEADERS for part in ("mean", "std")]
        row += [*(reached[part] for part in ("mean", "std", "reached")), difference["n"]]
        row += [difference[key][part] for key in HEADERS for part in _TESTED]
        rows.append([*row, group["data"]])
    return columns, rows


def _tested(groups: list[dict[str, Any]]) -> int:
    """Return how many groups have a difference with an interval."""
    return sum(group["difference"]["last_test_accuracy"]["low"] is not None for group in groups if group["difference"])


def _plus_minus(spread: dict[str, float | None]) -> str:
    return f"{spread['mean']:.2f}" + ("" if spread["std"] is None else f" ± {spread['std']:.2f}")
