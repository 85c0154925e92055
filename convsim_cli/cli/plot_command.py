"""`convsim plot`: the curves of runs in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convsim_cli.cli.console import Console
from convsim_cli.cli.options import JsonOption, QuietOption, add_options
from convsim_cli.plots import PICTURE_SUFFIXES, Curve, check_picture, draw_runs, require_matplotlib, save_figure

if TYPE_CHECKING:
    from convsim_cli.training.comparison import RunResults

EXAMPLES = """\b
Examples:
 convsim plot runs/cnn1-baseline-s0 runs/cnn1-init-s0   # writes curves.png
 convsim plot runs/cnn1-*-s0 -o arms.pdf
 convsim plot runs -o seeds.png          # seeds of one kind: mean and band"""


@add_options(rare=("quiet",))
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or folders that contain them.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help=f"The {PICTURE_SUFFIXES} file to write.")
    ] = Path("curves.png"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the loss, accuracies, L_CS and rotation of runs over epochs. Runs may still be training.

    Runs that differ only by seed are one curve: their mean, in a band of one standard deviation to either side.
    """
    from convsim_cli.training.comparison import read_runs

    console = Console(quiet, as_json)
    check_picture(output)
    require_matplotlib()
    found = read_runs(runs)
    save_figure(draw_runs(_curves(found)), output)
    console.document("plot", {"output": str(output), "runs": [str(run.folder) for run in found]})
    console.note(f"wrote {output}")


def _curves(runs: Sequence[RunResults]) -> list[Curve]:
    """Return a curve per group of seeds, and one per other run, named after its folder (if ambiguous, its path)."""
    from convsim_cli.training.comparison import group_by_seed, rows_with_turns

    names = [run.folder.resolve().name for run in runs]
    are_unique = len(set(names)) == len(names)
    labels = {run.folder: name if are_unique else str(run.folder) for run, name in zip(runs, names, strict=True)}
    curves = []
    for group in group_by_seed(runs):
        if len(group.runs) > 1 and len(set(group.seeds)) == len(group.runs):
            curves.append(Curve(f"{group.name} (n = {len(group.runs)})", [rows_with_turns(run) for run in group.runs]))
        else:
            curves += [Curve(labels[run.folder], [rows_with_turns(run)]) for run in group.runs]
    return curves
