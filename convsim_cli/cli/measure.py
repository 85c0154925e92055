"""`convsim measure`: section by section, what scaling moves and what it cannot move."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsim_cli.cli.console import Console, shape
from convsim_cli.cli.options import (
    ArchOption,
    DataDirOption,
    DeviceOption,
    ExcludeOption,
    GroupsOption,
    IncludeOption,
    JsonOption,
    QuietOption,
    SeedOption,
    TransposedOption,
    make_patterns,
    note_choice,
    show_layers,
    show_skipped,
    skipped_entries,
    start,
)

if TYPE_CHECKING:
    import torch

    from convsim_cli.experiments.evaluation import Probe
    from convsim_cli.experiments.source import Source

EXAMPLES = """\b
Examples:
  convsim measure model.safetensors                    # each layer by itself, on white noise
  convsim measure before.pth after.pth --input natural # side by side
  convsim measure --arch cnn1                          # a fresh network, each convolution's real output
  convsim measure best.safetensors --arch cnn1 --input cifar10 --data-dir data
  convsim measure model.safetensors --json | jq '.layers[].fm_cos'"""


def measure(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CHECKPOINT]...",
            help="Files to measure, side by side; else model.safetensors here, else a fresh cnn1.",
        ),
    ] = None,
    arch: ArchOption = None,
    input_: Annotated[
        str,
        typer.Option("--input", metavar="INPUT", help="white, uniform, natural; with --arch also cifar10 or digits."),
    ] = "white",
    input_size: Annotated[
        int | None,
        typer.Option(
            "--input-size", help="Pixels along each axis of an input; 32 unless given.", min=1, show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of inputs.", min=1)] = 16,
    include: IncludeOption = [],  # noqa: B006
    exclude: ExcludeOption = [],  # noqa: B006
    groups: GroupsOption = [],  # noqa: B006
    transposed: TransposedOption = [],  # noqa: B006
    data_dir: DataDirOption = Path("data"),
    as_csv: Annotated[bool, typer.Option("--csv", help="The table as CSV on stdout.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure, per layer, how similar filters and feature maps are.

    cs is the paper's L_CS (Eq. 10) and grows with the fourth power of the weights' scale; ncs (below 1: filters share
    the spectrum out), kernel_cos and fm_cos (mean |cos| over pairs) do not move with scale. norm is ‖W‖, dead counts
    filters without output.
    """
    from convsim_cli.experiments.evaluation import Probe
    from convsim_cli.experiments.source import open_source

    console = Console(quiet, as_json)
    paths, arch = _what(checkpoints or [], arch, console)
    patterns = make_patterns(include, exclude, groups, transposed)
    sources = [open_source(path, arch, patterns, seed) for path in paths]
    probe = Probe(input_, samples, input_size, data_dir, seed)
    place = start(device, console)
    reports = [_report(source, probe, place, console) for source in sources]
    console.document("measure", reports[0] if len(reports) == 1 else {"checkpoints": reports})
    if not as_json:
        _show(reports, console, as_csv)


def _what(paths: list[Path], arch: str | None, console: Console) -> tuple[list[Path | None], str | None]:
    if paths:
        return list(paths), arch
    if arch:
        console.note(f"no CHECKPOINT given: measuring a fresh {arch}")
        return [None], arch
    if Path("model.safetensors").exists():
        console.note("no CHECKPOINT given: measuring model.safetensors of this folder")
        return [Path("model.safetensors")], None
    console.note("no CHECKPOINT given and no model.safetensors here: measuring a fresh cnn1")
    return [None], "cnn1"


def _report(source: Source, probe: Probe, device: torch.device, console: Console) -> dict[str, Any]:
    note_choice(source.checkpoint, console)
    with console.progress(f"measure {source.checkpoint.path}", len(source.selection.kernels)) as advance:
        report = probe.measure(source, device, advance)
    return {
        "source": str(source.checkpoint.path),
        "input": probe.name,
        "layers": report.layers,
        "skipped": skipped_entries(source.selection),
        "total": report.total,
    }


def _show(reports: list[dict[str, Any]], console: Console, as_csv: bool) -> None:
    from convsim_cli.report import FIGURES

    several = len(reports) > 1
    columns = ["name", *(["source"] if several else []), "shape", "groups", "assumed", *FIGURES]
    rows = [
        [
            layer["name"],
            *([report["source"]] if several else []),
            shape(layer["shape"]),
            layer["groups"],
            layer["assumed"],
        ]
        + [layer[key] for key in FIGURES]
        for report in reports
        for layer in report["layers"]
    ]
    order = {name: place for place, name in enumerate(dict.fromkeys(row[0] for row in rows))}
    rows.sort(key=lambda row: order[row[0]])  # the rows of one layer stand together
    console.delimited(columns, rows, ",") if as_csv else show_layers(columns, rows, console)
    for report in reports:
        show_skipped(report["skipped"], console)
        accuracy = f", test accuracy {report['total']['accuracy']:.2f} %" if "accuracy" in report["total"] else ""
        console.note(f"{report['source']}: L_CS {report['total']['cs']:.4g}{accuracy} (input: {report['input']})")
