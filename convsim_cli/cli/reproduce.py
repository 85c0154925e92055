"""`convsim reproduce`: the paper's experiments, published and measured numbers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from convsim_cli.cli.console import Console
from convsim_cli.cli.options import (
    DataDirOption,
    DeviceOption,
    JsonOption,
    LimitTestOption,
    LimitTrainOption,
    QuietOption,
    RunDirOption,
    SeedOption,
    start,
)
from convsim_cli.cli.reproduction_tables import TABLES, numerical_table
from convsim_cli.cli.training_screen import CampaignScreen

if TYPE_CHECKING:
    from convsim_cli.reproduction.experiments import Choices

EXAMPLES = """\b
Examples:
  convsim reproduce table1                      # kernel orthogonality and feature maps: half a minute, no data
  convsim reproduce table2 --json | jq '.rows[].measured.cos_after'
  convsim reproduce table5 --archs cnn1 --arms baseline,init,rescale --epochs 10 --data-dir data
  convsim reproduce figure3 --archs cnn1 --arms baseline,init,rescale --epochs 10   # of the same runs
  convsim reproduce figure4 --lrs 0.01 --batch-sizes 64,128 --epochs 5 --limit-train 5000
  convsim reproduce table5 --seeds 3 --device cuda -q > table5.tsv"""

T = TypeVar("T")


def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="table1, 2, 3, 5 or 6, or figure1 to figure5.")],
    episodes: Annotated[
        int | None,
        typer.Option(help="table1, 2, 3, 6: episodes per row; 1000 unless given.", min=2, show_default=False),
    ] = None,
    archs: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="table5, figure1 to 3: networks; cnn1,cnn2 unless given.", show_default=False),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="table5, figure1 to 3: of baseline, init, reg, rescale, init-norm, init-norm-rescaled, "
            "reg-neighbours, baseline-lr0.1; all unless given.",
            show_default=False,
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
        int | None, typer.Option(metavar="N", help="Runs per configuration, from --seed.", min=1, show_default="1")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of a run; the paper's unless given.", min=1, show_default=False)
    ] = None,
    limit_train: LimitTrainOption = None,
    limit_test: LimitTestOption = None,
    data_dir: DataDirOption = Path("data"),
    run_dir: RunDirOption = Path("runs"),
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run an experiment of the paper again and show published and measured numbers side by side.

    The result is saved as RUN_DIR/NAME.json, a figure also as RUN_DIR/NAME.png. Runs of RUN_DIR with the same arguments
    are reused, and go on where they have fewer epochs. Per cent throughout, but for correlations, cosines and L_CS.
    What the paper does not show stands beside what it does: in the numerical tables mean |cos| of the two feature maps,
    which scale cannot move, and the same with every kernel held at its norm; in Table 5 arms that say where a gain
    comes from.
    """
    from convsim_cli.errors import InputError
    from convsim_cli.reproduction.published import TABLES
    from convsim_cli.training.run_folder import make_folder

    console = Console(quiet, as_json)
    if any(table.name == name for table in TABLES):
        _refuse(context.params, name, _OF_RUNS)
        if device != "auto" and start(device, console).type != "cpu":
            raise InputError(f"{name} is computed in float64 on the CPU, within a minute; leave --device out")
        make_folder(run_dir)
        _numerical(name, episodes or 1000, seed, run_dir, console)
    else:
        _trained(name, context.params, console)


_OF_RUNS = ("archs", "arms", "lrs", "batch_sizes", "iterations", "seeds", "epochs", "limit_train", "limit_test")


def _refuse(given: dict[str, Any], name: str, useless: Sequence[str]) -> None:
    from convsim_cli.errors import InputError

    for key in useless:
        if given[key] is not None:
            raise InputError(f"{name} has no --{key.replace('_', '-')}")


def _numerical(name: str, episodes: int, seed: int, run_dir: Path, console: Console) -> None:
    from convsim_cli.reproduction import numerical

    table = numerical.find_table(name)
    with console.progress(name, numerical.numerical_steps(name)) as advance:
        rows = numerical.numerical_table(name, episodes, seed, advance)
    content = {"name": name, "title": table.title, "claim": table.claim or None, "episodes": episodes, "seed": seed}
    _save(content | {"rows": rows}, run_dir, console)
    if not console.as_json:
        console.table(*numerical_table(rows))
        console.note(
            f"{table.title}; {episodes} episodes a row" + (f"; published: {table.claim}" if table.claim else "")
        )
        console.note(f"saved {run_dir / f'{name}.json'}")


def _save(content: dict[str, Any], run_dir: Path, console: Console) -> None:
    from convsim_cli.training.run_folder import write_json

    write_json(run_dir / f"{content['name']}.json", console.document("reproduce", content))


def _trained(name: str, given: dict[str, Any], console: Console) -> None:
    from convsim_cli.inputs.datasets import load_dataset
    from convsim_cli.machine.allocator import keep_freed_memory
    from convsim_cli.reproduction.campaign import carry_out
    from convsim_cli.reproduction.experiments import find_experiment, group, plan, reductions
    from convsim_cli.reproduction.plots import draw_experiment, require_matplotlib, save_figure
    from convsim_cli.reproduction.published import CLAIMS
    from convsim_cli.training.execution import check_network
    from convsim_cli.training.run_folder import make_folder

    experiment = find_experiment(name)
    _refuse(given, name, ["episodes"])
    drawn = name.startswith("figure")
    if drawn:
        require_matplotlib()
    place = start(given["device"], console)
    if place.type == "cpu":
        keep_freed_memory()
    choices = _choices(given, str(place))
    cells = plan(experiment, choices)
    dataset = load_dataset(choices.base.dataset, Path(choices.base.data_dir))
    reduced = reductions(experiment, choices, dataset)
    for arguments in {job.arguments.arch: job.arguments for cell in cells for job in cell.jobs}.values():
        check_network(arguments, dataset)
    make_folder(given["run_dir"])
    with CampaignScreen(console, name) as screen:
        outcomes = carry_out([job for cell in cells for job in cell.jobs], given["run_dir"], dataset, screen)
    rows = experiment.rows(group(cells, outcomes))
    title = experiment.title + (f" (reduced: {'; '.join(reduced)})" if reduced else "")
    content = {
        "name": name,
        "title": title,
        "claim": CLAIMS.get(name),
        "reduced": reduced,
        "device": choices.base.device,
    }
    _save(content | {"rows": rows}, given["run_dir"], console)
    if drawn:
        save_figure(draw_experiment(name, rows, title), given["run_dir"] / f"{name}.png")
    if not console.as_json:
        epochs = choices.epochs or experiment.epochs
        console.table(*TABLES[name](rows), epochs=epochs, diverged=0)
        seeds = f"; {choices.seeds} seeds" if choices.seeds > 1 else "; 1 seed"
        console.note(title + seeds + (f"; published: {CLAIMS[name]}" if name in CLAIMS else ""))
    console.note(f"saved {given['run_dir'] / name}.json" + (" and .png" if drawn else ""))


def _choices(given: dict[str, Any], device: str) -> Choices:
    from convsim_cli.reproduction.experiments import Choices
    from convsim_cli.training.arguments import Arguments

    base = Arguments(
        data_dir=str(given["data_dir"]),
        limit_train=given["limit_train"],
        limit_test=given["limit_test"],
        seed=given["seed"],
        device=device,
    )
    return Choices(
        base,
        given["seeds"] or 1,
        given["epochs"],
        _list("--archs", given["archs"], str),
        _list("--arms", given["arms"], str),
        _list("--lrs", given["lrs"], float),
        _list("--batch-sizes", given["batch_sizes"], int, least=1),
        _list("--iterations", given["iterations"], int, least=0),
    )


def _list(option: str, text: str | None, kind: Callable[[str], T], least: int | None = None) -> tuple[T, ...] | None:
    """What a comma-separated option lists, each once. Raises InputError."""
    from convsim_cli.errors import InputError

    if text is None:
        return None
    try:
        found = tuple(dict.fromkeys(kind(item.strip()) for item in text.split(",") if item.strip()))
    except ValueError:
        found = ()
    if not found or (least is not None and any(item < least for item in found)):  # type: ignore[operator]
        what = {str: "names", float: "numbers", int: f"whole numbers of {least} or above"}[kind]  # type: ignore[index]
        raise InputError(f"{option} {text!r}: expected {what} separated by commas")
    return found
