"""`convsim train`: train a network with Algorithm 1, Algorithm 2, neither, or a control."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsim_cli.cli.console import Console, duration
from convsim_cli.cli.options import JsonOption, QuietOption, WideOption, start, with_training_options
from convsim_cli.cli.training_screen import RunScreen

if TYPE_CHECKING:
    from convsim_cli.training.config import Arguments
    from convsim_cli.training.launch import Finished, Seeds
    from convsim_cli.training.run import Run

EXAMPLES = """\b
Examples:
 convsim train --dataset digits --epochs 5       # needs no download
 convsim train --mode init --data-dir data       # the paper's best arm
 convsim train --mode reg --beta 0.001 --epochs 20 --name reg20
 convsim train --mode init --preserve-norm --seeds 3
 convsim train --resume runs/reg20 --epochs 40
 # a modern recipe
 convsim train --arch resnet18 --epochs 50 --lr 0.1 --momentum 0.9 \\
   --nesterov --weight-decay 5e-4 --schedule cosine --augment flip-crop
 # two processes share each batch
 torchrun --nproc-per-node 2 -m convsim_cli train --mode init"""

_RUN: dict[str, Any] = {"show_default": False, "rich_help_panel": "Run"}  # the heading in the help


@with_training_options
def train(
    context: typer.Context,
    *,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="N runs NAME-s0, NAME-s1, … from --seed.", min=1, **_RUN)
    ] = None,
    run_dir: Annotated[
        Path,
        typer.Option("--run-dir", metavar="DIR", help="Where the folders of runs are created.", rich_help_panel="Run"),
    ] = Path("runs"),
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run's folder.", **_RUN)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Resume the run in this folder; only --epochs and --data-dir may differ.", **_RUN
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take what is not given here from a run's args.json.", **_RUN)
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel="Run")
    ] = "auto",
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **arguments: Any,
) -> None:
    """Train a network and save its results in a folder: args.json, results.csv, best and last weights, summary.json.

    The defaults are the paper's (section 4.2): SGD, no momentum, no augmentation, 100 epochs. You can stop a run at any
    moment and resume it with --resume: the result is the same.
    """
    from convsim_cli.training.distributed import is_rank_zero
    from convsim_cli.training.launch import resume_run, start_runs

    console = Console(quiet or not is_rank_zero(), as_json and is_rank_zero(), wide)
    watch = partial(_watch, console)
    typed = _typed(context)
    if resume is not None:
        finished = resume_run(_resumed(resume, typed, console), watch)
    else:
        chosen = _arguments({**arguments, "device": device}, config, typed, console)
        finished = start_runs(chosen, run_dir, name, seeds, watch)
    if is_rank_zero():
        _show(finished, console)


def _typed(context: typer.Context) -> dict[str, Any]:
    """The options given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _resumed(folder: Path, typed: dict[str, Any], console: Console) -> Run:
    from convsim_cli.training.run import open_to_resume

    given = {name: value for name, value in typed.items() if name not in ("resume", "wide", "as_json", "quiet")}
    run = open_to_resume(folder, given)
    _start(run.arguments.device, console)
    return run


def _arguments(given: dict[str, Any], config: Path | None, typed: dict[str, Any], console: Console) -> Arguments:
    """The arguments of a new run: those typed, then those of --config, then the defaults."""
    from convsim_cli.training.config import Arguments, declarations
    from convsim_cli.training.run import read_config

    if config is not None:
        given |= read_config(config, typed)
    options = {name: given[name] for name, declaration in declarations().items() if declaration.group}
    return Arguments(**options, device=_start(given["device"], console))


def _start(device: str, console: Console) -> str:
    from convsim_cli.device import keep_freed_memory

    found = start(device, console)
    if found.type == "cpu":
        keep_freed_memory()
    return str(found)


@contextmanager
def _watch(console: Console, run: Run, rest: Seeds | None) -> Iterator[RunScreen]:
    """Show a run while it trains. If it is interrupted, say how to resume it and how to start those that follow."""
    from convsim_cli.training.distributed import is_rank_zero
    from convsim_cli.training.run import train_command

    how = run.arguments
    what = f"{how.mode}, {how.arch} on {how.dataset}, {how.epochs} epoch{'s' if how.epochs > 1 else ''}"
    console.note(f"{run.folder}: {what}, batch-norm statistics: {how.bn_statistics}")
    try:
        with RunScreen(console, how.epochs) as screen:
            yield screen
    except KeyboardInterrupt:  # here the bar has ended, which would break a long line
        if is_rank_zero():
            resume = train_command("resume", run.folder, how.arch)
            console.warn(f"stopped; resume with: {resume}{_others(rest) if rest else ''}")
        raise


def _others(rest: Seeds) -> str:
    return f"; then the other seeds with: --name {quote(rest.stem)} --seed {rest.first} --seeds {rest.count}"


def _show(finished: list[Finished], console: Console) -> None:
    documents = [
        {
            "run": str(done.run.folder),
            "mode": done.run.arguments.mode,
            "arch": done.run.arguments.arch,
            "seed": done.run.arguments.seed,
            "bn_statistics": done.run.arguments.bn_statistics,
            **done.summary,
        }
        for done in finished
    ]
    console.document("train", {"runs": documents, "mean": _spread(documents)})
    if console.as_json:
        return
    keys = ("best_test_accuracy", "best_epoch", "last_test_accuracy", "last_train_accuracy", "cs", "images_per_second")
    rows = [
        [document["run"], *(document[key] for key in keys), duration(document["seconds"])] for document in documents
    ]
    least = ["images_per_second", "best_epoch", "cs", "time", "last_train_accuracy"]
    console.table(["run", *keys, "time"], rows, least)
    if len(documents) > 1:
        for key, spread in _spread(documents).items():
            console.note(
                f"{key.replace('_', ' ')}: {spread['mean']:.2f} ± {spread['std']:.2f} % over {len(documents)} seeds"
            )


def _spread(documents: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    found = {key: [document[key] for document in documents] for key in ("best_test_accuracy", "last_test_accuracy")}
    return {
        key: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None} for key, values in found.items()
    }
