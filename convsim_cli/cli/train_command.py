"""`convsim train`: train a network with Algorithm 1, Algorithm 2, neither, or a control."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsim_cli.cli.console import Console, Progress, duration
from convsim_cli.cli.options import MOST_SEEDS, JsonOption, QuietOption, WideOption, add_options, choose_device, typed
from convsim_cli.settings import declarations
from convsim_cli.training.config import Arguments, without_unused

if TYPE_CHECKING:
    from convsim_cli.inputs.images import Dataset
    from convsim_cli.training.run import Run

EXAMPLES = """\b
Examples:
 convsim train --epochs 2 --limit-train 2000     # quick; downloads CIFAR-10
 convsim train --dataset digits --epochs 5       # no download; extra: demo
 convsim train --mode init --data-dir data       # the paper's best mode
 convsim train --mode reg --beta auto --epochs 20 --name reg20
 convsim train --resume runs/reg20 --epochs 40
 convsim train --arch resnet18 --epochs 50 --lr 0.1 --momentum 0.9 \\
   --nesterov --weight-decay 5e-4 --schedule cosine --augment flip-crop
 torchrun --nproc-per-node 2 -m convsim_cli train --mode init"""

CLASSES_NAMED = 10  # in the line about a run's images
_RUN: dict[str, Any] = {"show_default": False, "rich_help_panel": "Run"}  # the heading in the help


@add_options(Arguments, rare=("name", "run_dir", "config", "wide", "quiet"))
def train(
    context: typer.Context,
    *,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train N runs, seeded from --seed: NAME-s0, …", min=1, max=MOST_SEEDS, **_RUN),
    ] = None,
    run_dir: Annotated[
        Path,
        typer.Option("--run-dir", metavar="DIR", help="Folder for the run folders.", rich_help_panel="Run"),
    ] = Path("runs"),
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run's folder.", **_RUN)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Resume the run in this folder. Only --epochs and --data-dir may change.", **_RUN
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read defaults from a run's args.json.", **_RUN)
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel="Run")
    ] = "auto",
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **arguments: Any,
) -> None:
    """Train a network; results and weights go to a folder.

    The defaults are the paper's (section 4.2) but for batch-norm statistics; they take about 50 minutes on two CPU
    cores. Stop at any time and continue with --resume: the result is the same (on CUDA, with --deterministic).
    """
    from convsim_cli.networks.architectures import to_repeat
    from convsim_cli.training.distributed import is_rank_zero
    from convsim_cli.training.launch import open_to_resume, resume_run, start_runs
    from convsim_cli.training.run import RunCallbacks, command_to_train

    console = Console(quiet or not is_rank_zero(), as_json and is_rank_zero(), wide)
    screen = RunScreen(console)
    callbacks = RunCallbacks(screen.begin, screen.progress, screen.epoch)
    given = typed(context)
    try:
        if resume is not None:
            shown = ("resume", "wide", "as_json", "quiet")
            run = open_to_resume(resume, {name: value for name, value in given.items() if name not in shown})
            _choose_device(run.arguments.device, console)
            with redirect_stdout(sys.stderr):  # a network may print
                finished = resume_run(run, callbacks)
        else:
            chosen = _arguments({**arguments, "device": device}, config, given, console)
            with redirect_stdout(sys.stderr):
                finished = start_runs(chosen, run_dir, name, seeds, callbacks)
    except KeyboardInterrupt:  # here the bar has ended, which would break a long line
        if is_rank_zero() and screen.runs:
            run = screen.runs[-1]
            how = run.arguments
            command = command_to_train("resume", run.folder, to_repeat(how.arch, how.weights), how.processes)
            console.warn(f"stopped; resume with: {command}{_other_seeds(run, (seeds or 1) - len(screen.runs))}")
        raise
    except Exception:
        done = [run for run in screen.runs if (run.folder / "summary.json").exists()]
        if is_rank_zero() and done and seeds:
            folders = ", ".join(str(run.folder) for run in done)
            console.warn(f"finished before the error: {folders}{_other_seeds(done[-1], seeds - len(done))}")
        raise
    if is_rank_zero():
        _show(finished, console)


def _arguments(options: dict[str, Any], config: Path | None, given: dict[str, Any], console: Console) -> Arguments:
    """The arguments of a new run: those given, then those of --config, then the defaults."""
    from convsim_cli.training.launch import read_config

    if config is not None:
        options |= without_unused(read_config(config, given), given)
    own = {name: options[name] for name, declaration in declarations(Arguments).items() if declaration.group}
    chosen = Arguments(**own, device=_choose_device(options["device"], console))
    if "beta" in given:
        chosen.check()
        chosen.check_beta_is_used()
    return chosen


def _choose_device(device: str, console: Console) -> str:
    from convsim_cli.device import keep_freed_memory

    found = choose_device(device, console)
    if found.type == "cpu":
        keep_freed_memory()
    return str(found)


def _other_seeds(run: Run, left: int) -> str:
    """How to start the seeds that were to follow an interrupted run, if any are left."""
    seed = run.arguments.seed
    stem = quote(run.name.removesuffix(f"-s{seed}"))
    return f"; then the other seeds with: --name {stem} --seed {seed + 1} --seeds {left}" if left else ""


class RunScreen:
    """A training run on the screen: a bar per phase on a terminal, and a line per epoch with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seconds: list[float] = []  # of the epochs of the current run
        self.runs: list[Run] = []  # those begun; the last one is the current one

    def begin(self, run: Run, data: Dataset) -> None:
        """Print which run begins, and its classes."""
        self.runs.append(run)
        self._seconds, how = [], run.arguments
        what = f"{how.label}, {how.arch} on {how.dataset}, {how.epochs} epoch{'s' if how.epochs > 1 else ''}"
        self._console.note(f"{run.folder}: {what}, batch-norm statistics: {how.bn_statistics}")
        classes = data.images_of_classes()
        names = list(classes)
        more = ", … (summary.json lists all)" if len(names) > CLASSES_NAMED else ""
        self._console.note(
            f"{len(names)} classes ({', '.join(names[:CLASSES_NAMED])}{more}), {len(data.train)} training and "
            f"{len(data.test)} test images"
        )
        untrained = [name for name, images in classes.items() if not images["train"]]
        if untrained:
            named = ", ".join(untrained[:CLASSES_NAMED]) + ", …" * (len(untrained) > CLASSES_NAMED)
            self._console.warn(f"{len(untrained)} of {len(names)} classes have no training images ({named})")

    def progress(self, phase: str, steps: int) -> AbstractContextManager[Progress]:
        """Show a phase; without a bar, an epoch is one line at its end."""
        return self._console.progress(phase, steps if self._console.live or phase == "init" else 0)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch's figures; a narrow terminal hides the least important ones."""
        epochs = self.runs[-1].arguments.epochs
        self._seconds.append(row["seconds"])
        left = (epochs - row["epoch"]) * sum(self._seconds) / len(self._seconds)
        # in one unit: as long in every line of a run, so that all lines take the same form
        roughly = f"{left:.0f} s" if left < 60 else f"{left / 60:.0f} min" if left < 3600 else f"{left / 3600:.1f} h"
        validation = f"  validation {row['validation_accuracy']:5.2f} %" if "validation_accuracy" in row else ""
        train, test = f"{row['train_accuracy']:5.2f} %{validation}", f"{row['test_accuracy']:5.2f} %"
        begin, end = f"{_number(row, epochs)}  train", f"  {roughly} left"
        self._console.note_fitting(
            f"{epoch_line(row, epochs)}  {row['seconds']:.1f} s, {duration(left)} left",
            f"{begin} loss {row['train_loss']:.3f}, {train}  test loss {row['test_loss']:.3f}, {test}{end}",
            f"{begin} {train}  test {test}{end}",
        )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return the figures of an epoch, a row of results.csv, as a line."""
    validation = f"validation {row['validation_accuracy']:5.2f} %  " if "validation_accuracy" in row else ""
    return (
        f"{_number(row, epochs)}  "
        f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f} %  "
        f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:5.2f} %  "
        f"{validation}L_CS {row['cs']:.4g}"
    )


def _number(row: dict[str, Any], epochs: int) -> str:
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"


def _show(finished: list[tuple[Run, dict[str, Any]]], console: Console) -> None:
    from convsim_cli.training.run import spread

    documents = [
        {
            "run": str(run.folder),
            "mode": run.arguments.mode,
            "arch": run.arguments.arch,
            "seed": run.arguments.seed,
            "bn_statistics": run.arguments.bn_statistics,
            **summary,
        }
        for run, summary in finished
    ]
    means = {key: spread([one[key] for one in documents]) for key in ("best_test_accuracy", "last_test_accuracy")}
    console.document("train", {"runs": documents, "mean": means})
    if console.as_json:
        return
    keys = ("best_test_accuracy", "best_epoch", "last_test_accuracy", "last_train_accuracy", "cs", "images_per_second")
    rows = [[one["run"], *(one[key] for key in keys), duration(one["seconds"])] for one in documents]
    least = ["images_per_second", "best_epoch", "cs", "time", "last_train_accuracy"]
    console.table(["run", *keys, "time"], rows, least)
    for run, summary in finished:
        if run.arguments.beta == "auto" and summary["beta"] is not None:
            console.note(f"{run.folder}: beta auto was {summary['beta']:.3g}")
    if len(documents) > 1:
        for key, found in means.items():
            seeds = f"{found['mean']:.2f} ± {found['std']:.2f} % over {len(documents)} seeds"
            console.note(f"{key.replace('_', ' ')}: {seeds}")
