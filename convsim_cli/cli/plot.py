"""`convsim plot`: the curves of runs in one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convsim_cli.cli.console import Console
from convsim_cli.cli.options import JsonOption, QuietOption

EXAMPLES = """\b
Examples:
  convsim plot runs/cnn1-baseline-s0 runs/cnn1-init-s0      # writes curves.png
  convsim plot runs/cnn1-*-s0 -o arms.png"""


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.png", help="The PNG to write.")] = Path(
        "curves.png"
    ),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the training loss, accuracies and L_CS of runs over epochs, as a PNG. Runs may still be training."""
    from convsim_cli.reproduction.plots import Curve, draw_runs, require_matplotlib, save_figure
    from convsim_cli.training.results import read_results

    console = Console(quiet, as_json)
    require_matplotlib()
    curves = [Curve(label, [read_results(run)]) for label, run in zip(_labels(runs), runs, strict=True)]
    save_figure(draw_runs(curves), output)
    console.document("plot", {"output": str(output), "runs": [str(run) for run in runs]})
    console.note(f"wrote {output}")


def _labels(runs: list[Path]) -> list[str]:
    """The names of the folders, or their paths if two names are the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(runs) else [str(run) for run in runs]
