"""`convsim measure`: the similarity of each layer's filters and feature maps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsim_cli.checkpoints.formats import HUB_FORM, check_exists
from convsim_cli.cli.console import Console, shape
from convsim_cli.cli.options import (
    OUTPUT,
    JsonOption,
    QuietOption,
    WideOption,
    add_options,
    choose_device,
    completer,
    name_options,
    parse_options,
    show_cs,
    show_layers,
    show_skipped,
    with_options,
)
from convsim_cli.errors import InputError
from convsim_cli.measurement.figures import (
    FIGURES,
    Figure,
    Record,
    ReportDocument,
    compared_keys,
    least_important_keys,
    shown_keys,
    side_by_side,
    sort_layers,
    sort_reports,
    what_changed,
    what_stands_out,
    why_duplicates,
)
from convsim_cli.plots import PICTURE_SUFFIXES, check_picture, draw_heat, save_figure
from convsim_cli.settings import MeasureOptions

if TYPE_CHECKING:
    from convsim_cli.checkpoint_measure import MeasureReport


EXAMPLES = """\b
Examples:
 convsim measure model.safetensors           # layer by layer
 convsim measure a.pth b.pth                 # side by side, with changes
 convsim measure model.pth --sort -fm_rank   # the lowest rank first
 convsim measure model.pth --top 3           # the three most correlated pairs
 convsim measure best.safetensors --arch cnn1 --input cifar10 --data-dir data
 convsim measure --arch torchvision:resnet50 --pretrained --input photos/
 convsim measure model.pth --plot maps.png   # each layer's correlations
 convsim measure --figures                   # what the columns mean"""


@add_options(MeasureOptions, rare=("as_csv", "wide", "quiet"))
def measure(
    context: typer.Context,
    checkpoints: Annotated[
        list[str] | None,  # no Path, which would take a slash from hf://
        typer.Argument(
            metavar="CHECKPOINT",
            help=f"Files to measure side by side, or {HUB_FORM}. Default: model.safetensors, or a fresh cnn1.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="[-]KEY",
            help="Sort by a figure, largest first. -KEY: smallest first.",
            autocompletion=completer([f"{sign}{key}" for key in shown_keys(wide=True) for sign in ("", "-")]),
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Draw every layer's correlations. FILE ends in {PICTURE_SUFFIXES}.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Explain the figures and exit.", rich_help_panel=OUTPUT)
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV.", rich_help_panel=OUTPUT)] = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **arguments: Any,
) -> None:
    """Measure how similar the filters and the feature maps of each layer are.

    From a file alone, each layer is measured separately, on synthetic inputs. With --arch the whole network runs on
    --input.
    """
    console = Console(quiet, as_json, wide)
    if figures:
        if not as_json:
            typer.echo(_explain_figures())
        console.document("measure", {"figures": [_explanation(figure) for figure in FIGURES]})
        return
    kind = "pretrained" if arguments["pretrained"] else "fresh"
    paths, arguments["arch"] = _choose_networks(checkpoints or [], arguments["arch"], kind, console)
    options = parse_options(arguments)
    pages = [] if plot is None else _pages(plot, len(paths))
    _check_output(pages, sort, as_csv and as_json)
    MeasureOptions(**options).check()
    for path in filter(None, paths):
        check_exists(path)
    from convsim_cli.checkpoint_measure import measure_checkpoints  # it imports torch, which takes seconds

    options["device"] = str(choose_device(options["device"], console))
    with redirect_stdout(sys.stderr):  # a network may print
        which = {"paper": _needs_paper_figures(as_json, wide, sort), "heat": plot is not None}
        reports = measure_checkpoints(paths, MeasureOptions(**options), console.progress, **which)
    for report in reports:
        for line in report.warnings:
            console.warn(with_options(line, context.command))
        for line in report.notes:
            console.note(f"{report.source}: {with_options(line, context.command)}")
    if sort is not None:
        sort_reports([{"layers": report.layers} for report in reports], sort)
    for report, page in zip(reports, pages, strict=False):
        _draw(report, page)
        console.note(f"wrote {page}")
    documents = [{**report.document(), "skipped": name_options(report.skipped, context.command)} for report in reports]
    console.document("measure", documents[0] if len(documents) == 1 else {"checkpoints": documents})
    if not as_json:
        _show(documents, console, as_csv, options["top"], f"{kind} " if paths == [None] else "", reports[0].avoidable)


def _explain_figures() -> str:
    """The figures of a layer with their units, a line or two each."""
    lines = []
    for figure in FIGURES:
        unit = f" [{figure.unit}]" if figure.unit else ""
        moves = "; depends on the scale of the weights" if figure.moves_with_scale else ""
        first, *rest = wrap(f"{figure.meaning}{moves}{unit}", 62)
        lines += [f"{figure.key:<16} {first}", *(f"{'':<16} {line}" for line in rest)]
    return "\n".join(lines)


def _explanation(figure: Figure) -> dict[str, Any]:
    return {
        "key": figure.key,
        "meaning": figure.meaning,
        "unit": figure.unit or None,
        "depends_on_scale": figure.moves_with_scale,
    }


def _choose_networks(
    paths: list[str], arch: str | None, new: str, console: Console
) -> tuple[list[str | None], str | None]:
    """The files to measure, None for a network without one, and its name."""
    if paths:
        return list(paths), arch
    if arch:
        console.note(f"no CHECKPOINT given: measuring a {new} {arch}")
        return [None], arch
    if Path("model.safetensors").exists():
        console.note("no CHECKPOINT given: measuring model.safetensors in this folder")
        return ["model.safetensors"], None
    console.note("no CHECKPOINT given and no model.safetensors here: measuring a fresh cnn1")
    return [None], "cnn1"


def _pages(path: Path, count: int) -> list[Path]:
    """A page per checkpoint: FILE.png, or FILE-1.png and so on for several."""
    numbered = [path.parent / f"{path.stem}-{number}{path.suffix}" for number in range(1, count + 1)]
    return [path] if count == 1 else numbered


def _check_output(pages: Sequence[Path], sort: str | None, two_formats: bool) -> None:
    """Raise InputError, before any work is done, for what could not be shown in the end."""
    if two_formats:
        raise InputError("`as_csv` and `as_json` cannot be combined; choose one")
    if sort is not None:
        sort_layers([], sort)
    for page in pages:
        check_picture(page)


def _needs_paper_figures(as_json: bool, wide: bool, sort: str | None) -> bool:
    """Whether the paper's figures, whose second product of all maps takes time, are shown or sorted by."""
    return as_json or wide or (sort is not None and sort.removeprefix("-") not in shown_keys(wide=False))


def _draw(report: MeasureReport, page: Path) -> None:
    heat = report.heat or {}
    means = {layer["name"]: layer["fm_corr"] for layer in report.layers if layer["name"] in heat}
    captions = {name: "no pairs" if mean is None else f"fm_corr {mean:.3g}" for name, mean in means.items()}
    title = f"{report.source}, {report.input} inputs; similar filters adjacent"
    if any(map_.pooled for map_ in heat.values()):
        title += "; in large layers a cell shows the strongest of several pairs"
    save_figure(draw_heat(heat, captions, title), page)


def _show(
    reports: Sequence[ReportDocument], console: Console, as_csv: bool, top: int, kind: str, avoidable: bool
) -> None:
    """Show what was found.

    kind: what a network without a file is, "fresh " or "pretrained ". avoidable: whether to advise on `init`.
    """
    if (console.is_screen and not as_csv) or not top:  # elsewhere than on a screen, one stream is one table
        _show_layers(reports, console, as_csv)
    if top:
        _show_pairs(reports, console, as_csv)
    for report in reports:
        show_skipped(report["skipped"], len(report["layers"]), "can be measured", console)
        accuracy = f", test accuracy {report['total']['accuracy']:.2f} %" if "accuracy" in report["total"] else ""
        name = f"{kind}{report['source']}"
        console.note(f"{name}: L_CS {show_cs(report['total']['cs'])}{accuracy} (input: {report['input']})")
        console.note(f"{name}: {what_stands_out(report['layers'])}")
        if reason := why_duplicates(report["layers"]):
            console.note(f"{name}: {reason}")
    short = _differing_ends([report["source"] for report in reports])
    for report in reports[1:]:
        if changed := what_changed(reports[0], report):
            console.note(f"{short[report['source']]} against {short[reports[0]['source']]}: {changed}")
    if not top and len(reports) == 1 and (advice := _what_next(reports[0]["layers"], avoidable)):
        console.note(f"next: {advice}")


def _what_next(layers: Sequence[Record], avoidable: bool) -> str | None:
    """Advice on duplicates or dead filters, or None."""
    page = "the documentation page 'Measure' shows how to remove"
    if avoidable:
        return "convsim init --method dct creates fewer duplicates in first layers, on photographs"
    if any(layer["removable"] for layer in layers):
        return f"--top 3 lists the most correlated pairs, --json all clusters; {page} filters"
    return f"{page} dead filters" if any(layer["dead"] for layer in layers) else None


def _differing_ends(paths: Sequence[str]) -> dict[str, str]:
    """Each path → its last parts, as many as tell the paths apart."""
    split = {path: path.split("/") for path in paths}
    for count in range(1, max(map(len, split.values())) + 1):
        ends = {path: "/".join(parts[-count:]) for path, parts in split.items()}
        if len({*ends.values()}) == len(ends):
            break
    return ends


def _show_layers(reports: Sequence[ReportDocument], console: Console, as_csv: bool) -> None:
    several = len(reports) > 1
    figures = [*shown_keys(console.wide, several), *(f"{key}_change" for key in compared_keys() if several)]
    columns = ["name", *(["source"] if several else []), "filters", "shape", "groups", "assumed", *figures]
    rows: list[list[Any]] = [
        [
            layer["name"],
            *([report["source"]] if several else []),
            layer["filters"],
            shape(layer["shape"]),
            layer["groups"],
            layer["assumed"],
            *(layer[key] for key in figures),
        ]
        for report, layer in side_by_side(reports)
    ]
    if as_csv:
        return console.delimited(columns, rows, ",")
    if several and console.is_screen:
        short = _differing_ends([report["source"] for report in reports])
        for row in rows:
            row[1] = short[row[1]]
            for index, column in enumerate(columns):
                if column.endswith("_change") and row[index] is not None:  # two digits, to leave room
                    row[index] = float(f"{row[index]:.2g}")
    show_layers(columns, rows, ["shape", *least_important_keys(several)], console, above=1 + several)


def _show_pairs(reports: Sequence[ReportDocument], console: Console, as_csv: bool) -> None:
    rows = [
        [layer["name"], *([report["source"]] if len(reports) > 1 else []), *pair["filters"], pair["corr"]]
        for report in reports
        for layer in report["layers"]
        for pair in layer["top"]
    ]
    columns = ["name", *(["source"] if len(reports) > 1 else []), "filter", "most_similar_to", "corr"]
    console.delimited(columns, rows, ",") if as_csv else console.table(columns, rows)
