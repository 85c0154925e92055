"""`convsim measure`: what scaling the weights moves, and what it does not, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convsim_cli.cli.console import Console, shape
from convsim_cli.cli.options import (
    ArchOption,
    ClassesOption,
    DataDirOption,
    DeviceOption,
    ExcludeOption,
    GroupsOption,
    IncludeOption,
    JsonOption,
    KeyOption,
    MeanOption,
    PretrainedOption,
    QuietOption,
    SeedOption,
    StdOption,
    TransposedOption,
    WideOption,
    name_options,
    parse_groups,
    show_layers,
    show_skipped,
    start,
    with_options,
)
from convsim_cli.errors import InputError
from convsim_cli.measurement.figures import (
    FIGURES,
    compared_keys,
    least_important_keys,
    shown_keys,
    side_by_side,
    sort_layers,
    what_stands_out,
)
from convsim_cli.plots import PICTURE_SUFFIXES, check_picture, draw_heat, require_matplotlib, save_figure

if TYPE_CHECKING:
    from convsim_cli.checkpoint_measure import Report


def _figures() -> str:
    """The figures, a line or two each, for `--help`."""
    lines = []
    for figure in FIGURES:
        first, *rest = wrap(figure.meaning, 60)
        lines += [f"  {figure.key:<15} {first}", *(f"  {'':<15} {line}" for line in rest)]
    return "\n".join(lines)


EXAMPLES = f"""\b
Figures of a layer (scaling its weights moves {", ".join(f.key for f in FIGURES if f.moves_with_scale)}):
{_figures()}

\b
Examples:
 convsim measure model.safetensors           # layer by layer, on white noise
 convsim measure a.pth b.pth --input natural # side by side, with changes
 convsim measure model.pth --sort -fm_rank   # the lowest rank first
 convsim measure model.pth --top 3           # the three strongest pairs
 convsim measure --arch cnn1                 # a fresh network's feature maps
 convsim measure best.safetensors --arch cnn1 --input cifar10 --data-dir data
 convsim measure --arch torchvision:resnet50 --input photos/ --plot maps.png
 convsim measure model.safetensors --json | jq '.layers[].fm_cos'"""


def measure(
    context: typer.Context,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CHECKPOINT]...",
            help="Files to measure, side by side; else model.safetensors here, else a fresh cnn1.",
        ),
    ] = None,
    arch: ArchOption = None,
    pretrained: PretrainedOption = False,
    num_classes: ClassesOption = None,
    key: KeyOption = None,
    input_: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="INPUT",
            help="white, uniform or natural; with --arch also cifar10, cifar100, digits, folder:PATH, or a folder.",
        ),
    ] = "white",
    side: Annotated[
        int | None,
        typer.Option(
            "--input-size",
            help="Pixels along each axis of an input: 32 unless given, 224 with an --arch that is not built in.",
            min=1,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of inputs.", min=1)] = 16,
    input_channels: Annotated[
        int | None,
        typer.Option(
            "--input-channels",
            metavar="N",
            help="With --arch: channels of a synthetic input; found by a dry run unless given.",
            min=1,
        ),
    ] = None,
    include: IncludeOption = [],  # noqa: B006
    exclude: ExcludeOption = [],  # noqa: B006
    groups: GroupsOption = [],  # noqa: B006
    transposed: TransposedOption = [],  # noqa: B006
    data_dir: DataDirOption = Path("data"),
    mean: MeanOption = None,
    std: StdOption = None,
    bn_statistics: Annotated[
        Literal["auto", "stored", "inputs"],
        typer.Option(
            "--bn-statistics",
            help="With --arch: the stored batch-norm statistics, those of the inputs, or auto: of the inputs where the "
            "stored ones do not belong to the kernels.",
        ),
    ] = "auto",
    threshold: Annotated[
        float, typer.Option(help="Mean cosine above which two filters are duplicates.", min=0, max=1)
    ] = 0.95,
    sort: Annotated[
        str | None,
        typer.Option(metavar="[-]KEY", help="Sort layers by a figure, the largest first; -KEY: the smallest first."),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="List each layer's N strongest pairs, with their signed cosine; on a pipe and in CSV these alone.",
            min=0,
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"Draw every layer's mean cosines in this {PICTURE_SUFFIXES} file.", show_default=False
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="The table as CSV.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how similar the filters and the feature maps of each layer are.

    From a checkpoint alone, each layer is probed by itself. With --arch the network runs, and each convolution's real
    output counts.
    """
    from convsim_cli.checkpoint_measure import measure_checkpoints
    from convsim_cli.inputs.images import parse_channels
    from convsim_cli.kernels import Patterns
    from convsim_cli.networks.probe import Probe

    console = Console(quiet, as_json, wide)
    paths, arch = _choose_networks(checkpoints or [], arch, "pretrained" if pretrained else "fresh", console)
    corrections = Patterns(include, exclude, list(parse_groups(groups).items()), transposed)
    normal = parse_channels("mean", mean), parse_channels("std", std)
    heat = plot is not None
    probe = Probe(input_, samples, side, data_dir, seed, *normal, threshold, bn_statistics, top, heat, input_channels)
    pages = [] if plot is None else _pages(plot, len(paths))
    _check_output(pages, sort, as_csv and as_json)
    reports = measure_checkpoints(
        paths,
        probe,
        start(device, console),
        arch=arch,
        pretrained=pretrained,
        num_classes=num_classes,
        key=key,
        patterns=corrections,
        progress=console.progress,
    )
    for report in reports:
        report["skipped"] = name_options(report["skipped"], context.command)
        for line in report.warnings:
            console.warn(with_options(line, context.command))
        for line in report.notes:
            console.note(f"{report['source']}: {with_options(line, context.command)}")
        if sort is not None:
            sort_layers(report["layers"], sort)
    for report, page in zip(reports, pages, strict=False):
        _draw(report, page)
        console.note(f"wrote {page}")
    console.document("measure", dict(reports[0]) if len(reports) == 1 else {"checkpoints": reports})
    if not as_json:
        _show(reports, console, as_csv, top)


def _choose_networks(
    paths: list[Path], arch: str | None, new: str, console: Console
) -> tuple[list[Path | None], str | None]:
    """The files to measure, None for a network without one, and its name."""
    if paths:
        return list(paths), arch
    if arch:
        console.note(f"no CHECKPOINT given: measuring a {new} {arch}")
        return [None], arch
    if Path("model.safetensors").exists():
        console.note("no CHECKPOINT given: measuring model.safetensors of this folder")
        return [Path("model.safetensors")], None
    console.note("no CHECKPOINT given and no model.safetensors here: measuring a fresh cnn1")
    return [None], "cnn1"


def _pages(path: Path, count: int) -> list[Path]:
    """A page per checkpoint: FILE.png, or FILE-1.png and so on for several."""
    numbered = [path.parent / f"{path.stem}-{number}{path.suffix}" for number in range(1, count + 1)]
    return [path] if count == 1 else numbered


def _check_output(pages: Sequence[Path], sort: str | None, two_formats: bool) -> None:
    """Raise InputError, before any work is done, for what could not be shown in the end."""
    if two_formats:
        raise InputError("`as_csv` and `as_json` exclude each other: standard output holds one table or one document")
    if sort is not None:
        sort_layers([], sort)
    for page in pages:
        check_picture(page)
        require_matplotlib()


def _draw(report: Report, page: Path) -> None:
    captions = {
        layer["name"]: f"fm_cos {layer['fm_cos']:.3g}" for layer in report["layers"] if layer["name"] in report.heat
    }
    title = f"{report['source']}: mean cosine of feature maps, filter by filter ({report['input']} inputs)"
    if any(heat.pooled for heat in report.heat.values()):
        title += "; in large layers a cell shows the strongest of several pairs"
    save_figure(draw_heat(report.heat, captions, title), page)


def _show(reports: Sequence[Report], console: Console, as_csv: bool, top: int) -> None:
    if (console.is_screen and not as_csv) or not top:  # elsewhere than on a screen, one stream is one table
        _show_layers(reports, console, as_csv)
    if top:
        _show_pairs(reports, console, as_csv)
    for report in reports:
        show_skipped(report["skipped"], len(report["layers"]), "can be measured", console)
        accuracy = f", test accuracy {report['total']['accuracy']:.2f} %" if "accuracy" in report["total"] else ""
        console.note(f"{report['source']}: L_CS {report['total']['cs']:.4g}{accuracy} (input: {report['input']})")
        console.note(f"{report['source']}: {what_stands_out(report['layers'])}")


def _show_layers(reports: Sequence[Report], console: Console, as_csv: bool) -> None:
    several = len(reports) > 1
    figures = [*shown_keys(), *(f"{key}_change" for key in compared_keys() if several)]
    columns = ["name", *(["source"] if several else []), "shape", "groups", "assumed", *figures]
    rows: list[list[Any]] = [
        [
            layer["name"],
            *([report["source"]] if several else []),
            shape(layer["shape"]),
            layer["groups"],
            layer["assumed"],
            *(layer[key] for key in figures),
        ]
        for report, layer in side_by_side(reports)
    ]
    least = least_important_keys()
    least.insert(least.index("norm"), "shape")
    console.delimited(columns, rows, ",") if as_csv else show_layers(columns, rows, least, console)


def _show_pairs(reports: Sequence[Report], console: Console, as_csv: bool) -> None:
    rows = [
        [layer["name"], *([report["source"]] if len(reports) > 1 else []), *pair["filters"], pair["cos"]]
        for report in reports
        for layer in report["layers"]
        for pair in layer["top"]
    ]
    columns = ["name", *(["source"] if len(reports) > 1 else []), "filter", "most_similar_to", "cos"]
    console.delimited(columns, rows, ",") if as_csv else console.table(columns, rows)
