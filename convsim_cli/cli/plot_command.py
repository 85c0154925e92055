"""`convsim plot`: the curves of runs in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convsim_cli.cli.console import Console
from convsim_cli.cli.options import JsonOption, QuietOption, add_options
from convsim_cli.plots import PICTURE_SUFFIXES, Curve, check_picture, draw_runs, save_figure

if TYPE_CHECKING:
    from convsim_cli.training.comparison import Group

EXAMPLES = """\b
Examples:
 convsim plot runs/cnn1-baseline-s0 runs/cnn1-init-s0   # writes curves.png
 convsim plot runs/cnn1-*-s0 -o arms.pdf
 convsim plot runs -o seeds.png          # seeds of one kind: mean and band"""


@add_options(rare=("quiet",))
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or folders that contain them.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help=f"The {PICTURE_SUFFIXES} file to write.")
    ] = Path("curves.png"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the loss, accuracies, L_CS and rotation of runs over epochs. Runs may still be training.

    Runs that differ only by seed share one curve: their mean, in a band of ± one standard deviation. Curves are named
    by the settings that differ, as in `convsim compare`.
    """
    from convsim_cli.training.comparison import data_labels, group_by_seed, read_runs, warn_of_unfinished

    console = Console(quiet, as_json)
    check_picture(output)
    found = read_runs(runs)
    warn_of_unfinished(found)
    groups = group_by_seed(found)
    if len(tested := data_labels(found)) > 1:
        console.warn(f"these runs were tested on different images: {'; '.join(sorted(tested.values()))}")
    curves = _curves(groups)
    save_figure(draw_runs(curves, _common_settings(groups, curves)), output)
    console.document("plot", {"output": str(output), "runs": [str(run.folder) for run in found]})
    console.note(f"wrote {output}")


def _curves(groups: Sequence[Group]) -> list[Curve]:
    """Return a curve per group of seeds, named as `compare` names it, or by folders where nothing else differs."""
    from convsim_cli.training.comparison import rows_with_turns

    one_size = len({len(group.runs) for group in groups}) == 1
    curves = []
    for group in groups:
        histories = [rows_with_turns(run) for run in group.runs]
        if len(set(group.seeds)) == len(group.runs):
            curves.append(Curve(group.name + ("" if one_size else f" (n = {len(group.runs)})"), histories))
        else:
            names = [run.folder.resolve().name for run in group.runs]
            if len(set(names)) < len(names):
                names = [str(run.folder) for run in group.runs]
            curves += [Curve(name, [history]) for name, history in zip(names, histories, strict=True)]
    return curves


def _common_settings(groups: Sequence[Group], curves: Sequence[Curve]) -> str:
    """Return what all runs share, for a title: for instance `cnn1, cifar10, 100 epochs, seed 0`."""
    from convsim_cli.training.comparison import data_labels

    arguments = [run.arguments for group in groups for run in group.runs]
    each: list[set[str]] = [
        {found.arch for found in arguments},
        set(data_labels(run for group in groups for run in group.runs).values()),
        {f"first {found.limit_train} training images" if found.limit_train else "" for found in arguments},
        {f"{found.epochs} epochs" if found.epochs > 1 else "1 epoch" for found in arguments},
        {f"seed {found.seed}" for found in arguments},
        {f"mean ± standard deviation of {n} seeds" if (n := len(curve.histories)) > 1 else "" for curve in curves},
    ]
    return ", ".join(value for values in each if len(values) == 1 for value in values if value)
