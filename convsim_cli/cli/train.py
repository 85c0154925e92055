"""`convsim train`: the paper's training runs, with Algorithm 1, Algorithm 2, neither, or the controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convsim_cli.cli.console import Console, duration
from convsim_cli.cli.options import (
    DataDirOption,
    DeviceOption,
    JsonOption,
    LimitTestOption,
    LimitTrainOption,
    MeanOption,
    QuietOption,
    RunDirOption,
    SeedOption,
    StdOption,
    start,
)
from convsim_cli.cli.training_screen import RunScreen

if TYPE_CHECKING:
    from convsim_cli.inputs.images import Dataset
    from convsim_cli.training.arguments import Arguments
    from convsim_cli.training.processes import Processes
    from convsim_cli.training.run_folder import Run

EXAMPLES = """\b
Examples:
  convsim train --dataset digits --epochs 5                      # needs no download
  convsim train --mode init --data-dir data                      # the paper's best arm, CNN1 on CIFAR-10
  convsim train --mode reg --beta 0.001 --epochs 20 --name reg20
  convsim train --mode init --preserve-norm --seeds 3            # similarity without the scale
  convsim train --resume runs/reg20 --epochs 40
  torchrun --nproc-per-node 2 -m convsim_cli train --mode init   # two processes share each batch"""

_RESUMABLE = {"resume", "epochs", "as_json", "quiet"}


def train(
    context: typer.Context,
    mode: Annotated[
        Literal["baseline", "init", "reg", "rescale"],
        typer.Option(
            help="Nothing; Algorithm 1 before training; Algorithm 2 during it; only the scaling that init would do."
        ),
    ] = "baseline",
    arch: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cnn1, cnn2, cnn:WIDTH, resnet18, torchvision:NAME, timm:NAME or package.module:callable.",
        ),
    ] = "cnn1",
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="cifar10, cifar100, digits, or folder:PATH with a folder per class.")
    ] = "cifar10",
    data_dir: DataDirOption = Path("data"),
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="N",
            help="folder:PATH: pixels along each axis; 32 for the built-in networks, else 224, unless given.",
            min=1,
            show_default=False,
        ),
    ] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from this checkpoint.", show_default=False)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Number of epochs.", min=1)] = 100,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per step.", min=1)] = 512,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD, above 0.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.", min=0)] = 0.0,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="L2 penalty of SGD.", min=0)] = 0.0,
    iterations: Annotated[int, typer.Option(help="Iterations of Algorithm 1 (init, rescale).", min=0)] = 500,
    init_lr: Annotated[float, typer.Option("--init-lr", help="Adam's step size in Algorithm 1.")] = 0.001,
    preserve_norm: Annotated[
        bool, typer.Option("--preserve-norm", help="init: hold every filter at its own norm.")
    ] = False,
    rescale: Annotated[
        bool,
        typer.Option(
            "--rescale", help="init --preserve-norm: then scale the filters to the norms that raw init would give."
        ),
    ] = False,
    beta: Annotated[float, typer.Option(help="reg: weight on L_CS, dimensionless.", min=0)] = 0.001,
    beta_schedule: Annotated[
        Literal["constant", "loss"],
        typer.Option("--beta-schedule", help="reg: constant, or falling with the task loss."),
    ] = "constant",
    pairs: Annotated[
        Literal["all", "neighbours"],
        typer.Option(help="reg: all pairs (Eq. 10), or what the authors' public code sums."),
    ] = "all",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Full float32, or bfloat16 autocast.")] = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="N runs NAME-s0, NAME-s1, … from --seed.", min=1, show_default=False),
    ] = None,
    limit_train: LimitTrainOption = None,
    limit_test: LimitTestOption = None,
    run_dir: RunDirOption = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.", show_default=False)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with this run's folder; only --epochs may differ.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take what is not given here from a run's args.json.", show_default=False),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bit-exact on CUDA too; the CPU always is.")
    ] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network and keep its results in a folder: args.json, results.csv, best and last weights, summary.json.

    The defaults are the paper's (section 4.2): SGD, no momentum, no augmentation, 100 epochs. Stopped at any moment, a
    run goes on with --resume, to the same result.
    """
    from convsim_cli.machine.allocator import keep_freed_memory
    from convsim_cli.training.execution import load_inputs
    from convsim_cli.training.processes import joined, leads

    console = Console(quiet or not leads(), as_json and leads())
    resumed = None if resume is None else _resumed(context, resume, epochs)
    given = context.params | ({} if config is None else _from_config(context, config))
    place = start(given["device"] if resumed is None else resumed.arguments.device, console)
    if place.type == "cpu":
        keep_freed_memory()
    with joined(place) as (processes, _):
        if resumed is not None:
            runs, data = iter([(resumed, "")]), None  # the run's own arguments say the rest
        else:
            arguments = _arguments(given, str(place), processes.size)
            data = processes.leader_first(lambda: load_inputs(arguments))
            runs = _new_runs(arguments, run_dir, name, seeds, processes)
        done = [(run, _execute(run, data, console, processes, left)) for run, left in runs]
    if processes.leads:
        _show(done, console)


def _arguments(given: dict[str, Any], device: str, processes: int) -> Arguments:
    from dataclasses import fields

    from convsim_cli.training.arguments import Arguments

    values = given | {"compile": given["compile_"], "device": device, "processes": processes}
    for key in ("data_dir", "weights"):
        values[key] = None if values[key] is None else str(values[key])
    return Arguments(**{field.name: values[field.name] for field in fields(Arguments)})


def _from_config(context: typer.Context, path: Path) -> dict[str, Any]:
    """What a run's args.json says of the options that the command line leaves open."""
    import json
    from dataclasses import asdict

    from convsim_cli.errors import InputError
    from convsim_cli.training.arguments import make_arguments

    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not a readable args.json ({error})") from error
    found = asdict(make_arguments(values, path)) | {"compile_": values.get("compile", False)}
    given = {*_typed(context), "processes"}  # which are as many as there are
    return {key: found[key] for key in found if (key in values or key == "compile_") and key not in given}


def _typed(context: typer.Context) -> set[str]:
    """The options that were given on the command line."""
    return {key for key in context.params if context.get_parameter_source(key).name == "COMMANDLINE"}  # type: ignore[union-attr]


def _new_runs(
    arguments: Arguments, run_dir: Path, name: str | None, seeds: int | None, processes: Processes
) -> Iterator[tuple[Run, str]]:
    """The runs, each made when its turn comes, with what is to be said of the seeds left should it be stopped."""
    from convsim_cli.training.run_folder import create_run, free_stem

    if seeds is None:
        yield processes.led(lambda: create_run(arguments, run_dir, name)), ""
        return
    numbers = range(arguments.seed, arguments.seed + seeds)
    stem = processes.led(lambda: free_stem(arguments, run_dir, name, numbers))
    for seed in numbers:
        one, left = replace(arguments, seed=seed), numbers[-1] - seed
        run = processes.led(partial(create_run, one, run_dir, f"{stem}-s{seed}"))
        yield run, f"; then the other seeds with: --name {quote(stem)} --seed {seed + 1} --seeds {left}" if left else ""


def _resumed(context: typer.Context, folder: Path, epochs: int) -> Run:
    """The run to go on with. Options that say something else than its args.json are refused, all but --epochs."""
    from convsim_cli.errors import InputError
    from convsim_cli.training.run_folder import open_run

    given = _typed(context)
    run = open_run(folder, epochs if "epochs" in given else None)
    for key in sorted(given - _RESUMABLE):
        wanted, had = context.params[key], getattr(run.arguments, key.rstrip("_"), None)
        if str(wanted) != str(had):
            raise InputError(
                f"--{key.strip('_').replace('_', '-')} {wanted}: the run {folder} has {had}; "
                "with --resume only --epochs may differ"
            )
    return run


def _execute(run: Run, dataset: Dataset | None, console: Console, processes: Processes, left: str) -> dict[str, Any]:
    from convsim_cli.training.execution import execute

    how = run.arguments
    console.note(f"{run.folder}: {how.mode}, {how.arch} on {how.dataset}, {how.epochs} epochs")
    with RunScreen(console, how.epochs) as listener:
        try:
            return execute(run, listener, dataset, processes)
        except KeyboardInterrupt:
            if processes.leads:
                folder = quote(str(run.folder))
                console.warn(f"stopped; go on with: convsim train --resume {folder}{left}")
            raise


def _show(done: list[tuple[Run, dict[str, Any]]], console: Console) -> None:
    documents = [
        {
            "run": str(run.folder),
            "mode": run.arguments.mode,
            "arch": run.arguments.arch,
            "seed": run.arguments.seed,
            **summary,
        }
        for run, summary in done
    ]
    console.document("train", {"runs": documents, "mean": _spread(documents)})
    if console.as_json:
        return
    keys = ("best_test_accuracy", "best_epoch", "last_test_accuracy", "last_train_accuracy", "cs", "images_per_second")
    rows = [
        [document["run"], *(document[key] for key in keys), duration(document["seconds"])] for document in documents
    ]
    console.table(["run", *keys, "time"], rows)
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
