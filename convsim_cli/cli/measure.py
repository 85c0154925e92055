"""`convsim measure`: section by section, what scaling moves and what it cannot move."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    QuietOption,
    SeedOption,
    StdOption,
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

    from convsim_cli.inputs.images import Channels
    from convsim_cli.networks.measurement import Probe, Report
    from convsim_cli.networks.model_checkpoint import Source

SHOWN = ("cs", "ncs", "kernel_cos", "fm_cos", "fm_cos_random", "fm_inner2", "norm", "dead", "redundant")
CHANGES = ("ncs", "fm_cos")  # of what scale cannot move, shown from checkpoint to checkpoint

EXAMPLES = """\b
Examples:
  convsim measure model.safetensors                    # each layer by itself, on white noise
  convsim measure before.pth after.pth --input natural # side by side
  convsim measure --arch cnn1                          # a fresh network, each convolution's real output
  convsim measure best.safetensors --arch cnn1 --input cifar10 --data-dir data
  convsim measure --arch torchvision:resnet50 --input photos/ --plot resnet50.png   # on a folder of images
  convsim measure model.pth --top 3                    # each layer's three most similar pairs of filters
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
    input_size: Annotated[
        int | None,
        typer.Option(
            "--input-size",
            help="Pixels along each axis of an input: 32 unless given, 224 with an --arch that is not built in.",
            min=1,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of inputs.", min=1)] = 16,
    include: IncludeOption = [],  # noqa: B006
    exclude: ExcludeOption = [],  # noqa: B006
    groups: GroupsOption = [],  # noqa: B006
    transposed: TransposedOption = [],  # noqa: B006
    data_dir: DataDirOption = Path("data"),
    mean: MeanOption = None,
    std: StdOption = None,
    top: Annotated[int, typer.Option(metavar="N", help="List each layer's N most similar filter pairs.", min=0)] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw |cos| of each layer's feature maps there.", show_default=False),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="The table as CSV; with --top, the pairs alone.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure, per layer, how similar filters and feature maps are.

    cs is the paper's L_CS (Eq. 10) and grows with the fourth power of the weights' scale; ncs (below 1: filters share
    the spectrum out), kernel_cos and fm_cos (mean |cos| over pairs) do not move with scale. norm is ‖W‖, dead counts
    filters without output, redundant those with a partner of mean |cos| above 0.95; fm_cos_random is what fm_cos would
    be by chance.
    """
    from convsim_cli.inputs.images import parse_channels
    from convsim_cli.networks.measurement import Probe
    from convsim_cli.networks.model_checkpoint import open_source
    from convsim_cli.reproduction.plots import require_matplotlib

    console = Console(quiet, as_json)
    paths, arch = _what(checkpoints or [], arch, console)
    patterns = make_patterns(include, exclude, groups, transposed)
    sources = [open_source(path, arch, patterns, seed, num_classes, key) for path in paths]
    normal = parse_channels("mean", mean), parse_channels("std", std)
    _check(input_, normal, plot)
    probe = Probe(input_, samples, input_size, data_dir, seed, *normal, top, plot is not None)
    if plot is not None:
        require_matplotlib()
    place = start(device, console)
    measured = [_measure(source, probe, place, console) for source in sources]
    reports = [_report(source, probe, report) for source, report in zip(sources, measured, strict=True)]
    if plot is not None:
        _plot(reports, measured, plot, console)
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


def _check(input_: str, normal: tuple[Channels | None, Channels | None], plot: Path | None) -> None:
    """Raise InputError for options that would do nothing, or something else than they say."""
    from convsim_cli.errors import InputError
    from convsim_cli.measurement.synthetic_inputs import PROBES

    if input_ in PROBES and normal != (None, None):
        raise InputError(f"--mean and --std normalize images: --input {input_} has none; name a data set or folder")
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot}: expected a name that ends in .png")


def _measure(source: Source, probe: Probe, device: torch.device, console: Console) -> Report:
    note_choice(source.checkpoint, console)
    report = probe.measure(source, device, console.progress)
    for note in report.notes:
        console.note(f"{source.checkpoint.path}: {note}")
    return report


def _report(source: Source, probe: Probe, report: Report) -> dict[str, Any]:
    return {
        "source": str(source.checkpoint.path),
        "input": probe.name,
        "layers": report.layers,
        "skipped": skipped_entries(source.selection),
        "total": report.total,
    }


def _plot(reports: list[dict[str, Any]], measured: list[Report], path: Path, console: Console) -> None:
    """A page per network: FILE.png, or FILE-1.png and so on for several."""
    from convsim_cli.measurement.heat_maps import draw_heat
    from convsim_cli.networks.measurement import HEAT
    from convsim_cli.reproduction.plots import save_figure

    for number, (report, found) in enumerate(zip(reports, measured, strict=True), 1):
        page = path if len(reports) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        cosines = {layer["name"]: layer["fm_cos"] for layer in report["layers"]}
        title = f"{report['source']}: mean |cos| of feature maps, filter by filter ({report['input']} inputs)"
        if any(matrix.shape[-1] == HEAT for matrix in found.heat.values()):
            title += f"; of more than {HEAT} filters, the largest of neighbours"
        save_figure(draw_heat(found.heat, cosines, title), page)
        console.note(f"wrote {page}")


def _show(reports: list[dict[str, Any]], console: Console, as_csv: bool) -> None:
    if not (as_csv and _show_pairs(reports, console, as_csv)):  # CSV is one table
        _show_layers(reports, console, as_csv)
        if not as_csv:
            _show_pairs(reports, console, as_csv)
    for report in reports:
        show_skipped(report["skipped"], console)
        accuracy = f", test accuracy {report['total']['accuracy']:.2f} %" if "accuracy" in report["total"] else ""
        console.note(f"{report['source']}: L_CS {report['total']['cs']:.4g}{accuracy} (input: {report['input']})")


def _show_layers(reports: list[dict[str, Any]], console: Console, as_csv: bool) -> None:
    several = len(reports) > 1
    columns = ["name", *(["source"] if several else []), "shape", "groups", "assumed", *SHOWN]
    columns += [f"{key}_change" for key in CHANGES if several]
    places: dict[str, int] = {}
    rows: list[tuple[int, list[Any]]] = []
    for report in reports:
        partners = _partners(reports[0], report)
        if not partners:
            console.warn(f"{report['source']}: has no layer in common with {reports[0]['source']}")
        for layer in report["layers"]:
            first = partners.get(layer["name"])
            place = places.setdefault(first["name"] if first else layer["name"], len(places))
            row = [layer["name"], *([report["source"]] if several else []), shape(layer["shape"]), layer["groups"]]
            row += [layer["assumed"], *(layer[key] for key in SHOWN)]
            rows.append((place, row + [_change(first, layer, key) for key in CHANGES if several]))
    rows.sort(key=lambda row: row[0])  # the rows of one layer stand together
    table = [row for _, row in rows]
    console.delimited(columns, table, ",") if as_csv else show_layers(columns, table, console)


def _partners(first: dict[str, Any], report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Which layer of the first checkpoint each of another one's is, by its name.

    Where no two names are the same, what all of a checkpoint's names begin with, such as `module.`, is left out.
    """
    theirs = {layer["name"]: layer for layer in first["layers"]}
    ours = {layer["name"]: layer["name"] for layer in report["layers"]}
    if not theirs.keys() & ours.keys():
        theirs = {name[_common(theirs) :]: layer for name, layer in theirs.items()}
        ours = {name: name[_common(ours) :] for name in ours}
    return {name: theirs[short] for name, short in ours.items() if short in theirs}


def _common(names: Iterable[str]) -> int:
    """The length of what all names begin with, up to a dot."""
    low, high = min(names), max(names)  # what these two share, all in between do
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
    return low.rfind(".", 0, shared) + 1


def _change(first: dict[str, Any] | None, layer: dict[str, Any], key: str) -> float | None:
    """What a layer's figure has changed by since the first checkpoint; empty for that one itself."""
    if first is None or first is layer or None in (first[key], layer[key]):
        return None
    return float(layer[key] - first[key])


def _show_pairs(reports: list[dict[str, Any]], console: Console, as_csv: bool) -> bool:
    """Show the most similar pairs, after an empty line unless they stand alone. Return whether there are any."""
    rows = [
        [layer["name"], *([report["source"]] if len(reports) > 1 else []), *pair["filters"], pair["cos"]]
        for report in reports
        for layer in report["layers"]
        for pair in layer.get("top", [])
    ]
    if not rows:
        return False
    columns = ["name", *(["source"] if len(reports) > 1 else []), "filter", "most_similar_to", "cos"]
    if as_csv:
        console.delimited(columns, rows, ",")
        return True
    if not console.is_screen:
        print()
    console.table(columns, rows)
    return True
