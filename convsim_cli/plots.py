"""Figures: training curves, the paper's Figures 1 to 5, and heat maps of feature-map similarity.

Curves and bars can be read in gray and by color-blind readers: the colors are Okabe and Ito's, each curve also has its
own dash pattern, and each bar its own hatching. Figures are as wide as a column or a page of a paper, and their
texts have 6 points or more there. A figure is saved in the format that the file's suffix names.

Importing this module imports neither matplotlib nor torch: help texts name the `PICTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import ceil, nan
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill, wrap
from typing import TYPE_CHECKING, Any

from convsim_cli.checkpoints.atomic import check_regular, replace_file
from convsim_cli.errors import InputError, one_of, open_regular

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from convsim_cli.measurement.pairs import HeatMap
    from convsim_cli.training.run import Row

COLORS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A8A00")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (2, 1)), (0, (4, 1, 1, 1)))
UNITS = {  # by column of results.csv, and of layers.csv as a median over layers
    "cs": "$L_{CS}$ (Eq. 10, weight$^4$)",
    "train_loss": "training loss (nats)",
    "test_loss": "test loss (nats)",
    "train_accuracy": "train accuracy (%)",
    "test_accuracy": "test accuracy (%)",
    "turned": "turn since the start (degrees)",
    "turn_per_step": "turn per step (degrees)",
}
LOGARITHMIC = {"cs", "train_loss", "turn_per_step"}

COLUMN, PAGE = 3.5, 7.2  # inches: the width of a column and of a page
MOST_LABELED = 12  # pairs of bars, each with its numbers
TEXT, SMALL = 7, 6  # points; a smaller text cannot be read in print
DPI = 300  # of a PNG


@dataclass(frozen=True)
class PictureFormat:
    """A picture format, under matplotlib's name.

    recognizes: takes a file's first 4,096 bytes. metadata: omits the date, so that equal figures give equal files.
    """

    name: str
    recognizes: Callable[[bytes], bool]
    metadata: dict[str, None]


PICTURES = {  # by suffix
    ".png": PictureFormat("png", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), {}),
    ".pdf": PictureFormat("pdf", lambda start: start.startswith(b"%PDF-"), {"CreationDate": None}),
    ".svg": PictureFormat("svg", lambda start: start.lstrip()[:1] == b"<" and b"<svg" in start, {"Date": None}),
}


@dataclass(frozen=True)
class Curve:
    """A line over epochs: its label, and one history of rows of results.csv per seed.

    Several seeds are drawn as their mean, in a band of one standard deviation to either side.
    """

    label: str
    histories: Sequence[Sequence[Row]]


def draw_runs(curves: Sequence[Curve], title: str) -> Figure:
    """Draw the loss, accuracies and L_CS of runs in one figure, and how far their filters turned if that is known."""
    turns = [row for curve in curves for rows in curve.histories for row in rows if row.get("turned") is not None]
    columns = ["train_loss", "test_accuracy", "train_accuracy", "cs"]
    columns[2:2] = ["turned"] if turns else []
    columns += ["turn_per_step"] if turns else []
    figure, axes = _panels(len(columns), len(columns) // 2)
    for panel, column in zip(axes, columns, strict=True):
        _draw_curves(panel, curves, column)
    _finish(figure, axes[0], title)
    return figure


def draw_experiment(name: str, rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw one of the paper's figures, `figure1` to `figure5`, from the rows of its JSON."""
    return {"figure4": draw_grid, "figure5": draw_iterations}.get(name, draw_arms)(rows, title)


def draw_arms(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw Figure 1, 2 or 3: a panel per network, a curve per arm.

    rows: those of the figure's JSON, each with `arch`, `arm`, `epoch` and the one column of `UNITS` that is drawn.
    """
    column = next(column for column in UNITS if column in rows[0])
    by_arch = [(arch, list(found)) for arch, found in groupby(rows, key=lambda row: row["arch"])]
    figure, axes = _panels(len(by_arch), min(3, len(by_arch)))
    for panel, (arch, found) in zip(axes, by_arch, strict=True):
        curves = []
        for arm, seeds in groupby(found, key=lambda row: row["arm"]):
            histories = [
                [{"epoch": epoch, column: value} for epoch, value in zip(row["epoch"], row[column], strict=True)]
                for row in seeds
            ]
            curves.append(Curve(arm, histories))
        _draw_curves(panel, curves, column)
        panel.set_title(plain_text(arch.upper() if arch.startswith("cnn") else arch), fontsize=TEXT)
    _finish(figure, axes[0], title)
    return figure


def draw_grid(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw Figure 4: test accuracy with and without Algorithm 1, in bars, for each learning rate and batch size."""
    figure, (axes,) = _panels(1, 1, COLUMN if len(rows) <= 4 else PAGE)
    sides = (("baseline", "baseline", "#BBBBBB", ""), ("init", "Algorithm 1 before training", COLORS[2], "///"))
    for index, (side, label, color, hatch) in enumerate(sides):
        heights, spreads = _over_seeds([row["measured"][side] for row in rows], "best_test_accuracy")
        places = [position + 0.4 * index - 0.2 for position in range(len(rows))]
        style: dict[str, Any] = {"color": color, "edgecolor": "black", "linewidth": 0.6, "hatch": hatch}
        bars = axes.bar(places, heights, 0.38, yerr=spreads, label=label, **style)
        if len(rows) <= MOST_LABELED:
            axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, fontsize=SMALL)
    if len(rows) <= MOST_LABELED:
        axes.set_xticks(range(len(rows)), [f"lr {row['lr']:g}\nbatch {row['batch_size']}" for row in rows])
    else:
        names = [f"{row['lr']:g}, {row['batch_size']}" for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=SMALL)
    axes.set_xlabel("learning rate and batch size (images)")
    axes.set_ylabel("best test accuracy (%)")
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    _finish(figure, axes, title)
    return figure


def draw_iterations(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw Figure 5: test accuracy against the iterations I of Algorithm 1."""
    figure, (axes,) = _panels(1, 1)
    rows = sorted(rows, key=lambda row: row["iterations"])
    counts = [row["iterations"] for row in rows]
    beside = 0.004 * (counts[-1] - counts[0])  # so that both error bars are seen
    for index, (key, label) in enumerate((("best_test_accuracy", "best"), ("last_test_accuracy", "last epoch"))):
        values, spreads = _over_seeds([row["measured"] for row in rows], key)
        style = {"color": COLORS[2 + index], "linestyle": DASHES[index], "marker": "os"[index], "markersize": 3}
        places = [count + (beside if index else -beside) for count in counts]
        axes.errorbar(places, values, yerr=spreads, label=label, capsize=2, **style)
    axes.set_xlabel("iterations I of Algorithm 1 (0 is the baseline)")
    axes.set_ylabel("test accuracy (%)")
    _finish(figure, axes, title)
    return figure


def draw_heat(heat: Mapping[str, HeatMap], captions: Mapping[str, str], title: str) -> Figure:
    """Draw heat maps side by side, from −1 (opposite) over 0 to 1 (the same), with the indices of the filters.

    captions: a line below each layer's name. Readable for 50 layers and more, which fit a page.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = max(1, len(heat)) if len(heat) <= 3 else min(8, ceil(len(heat) ** 0.5))
    rows = max(1, ceil(len(heat) / columns))
    width = COLUMN if len(heat) <= 1 else PAGE
    panel = (width - 0.9) / columns - 0.25  # inches, beside the labels of the filters and the scale
    letters = int(22 * (panel + 0.2))  # of a name, in a line
    ending = ".weight" if any(len(name) > letters for name in heat) else ""
    names = {}
    for name in heat:
        short = name.removesuffix(ending)
        parts = [short] if len(short) <= letters else wrap(short.replace(".", ". "), letters)  # it breaks after dots
        names[name] = [plain_text(part.replace(". ", ".")) for part in parts]
    lines = wrap(title, int(17 * width))
    around = 0.3 + 0.11 * max((len(parts) for parts in names.values()), default=0)
    figure = Figure(figsize=(width, (panel + around) * rows + 0.25 + 0.13 * len(lines)), layout="compressed")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    colors = colormaps["RdBu_r"].with_extremes(bad="0.88")
    image = None
    for index, (axis, (name, drawn)) in enumerate(zip(axes, heat.items(), strict=False)):
        image = axis.imshow(drawn.cells.numpy(), vmin=-1, vmax=1, cmap=colors, interpolation="nearest")
        axis.set_title("\n".join([*names[name], captions[name]]), fontsize=SMALL, pad=2)
        room = 0.06 + 0.05 * len(str(max(drawn.labels)))  # inches that the label of a filter takes
        step = 1
        while len(drawn.labels) * room > step * panel:
            step *= 2
        places = range(0, len(drawn.labels), step)
        shown = [str(drawn.labels[place]) for place in places]
        axis.set_xticks(places, shown, fontsize=SMALL)
        axis.set_yticks(places, shown, fontsize=SMALL)
        axis.tick_params(length=2, pad=1, width=0.4)
        axis.set_xlabel("filter" if index + columns >= len(heat) else "", fontsize=SMALL, labelpad=1)
        axis.set_ylabel("" if index % columns else "filter", fontsize=SMALL, labelpad=1)
    for axis in axes[len(heat) :]:
        axis.set_visible(False)
    if image is not None:
        shape: dict[str, Any] = {"shrink": min(1.0, 1.6 / rows), "aspect": 28, "pad": 0.02}
        bar = figure.colorbar(image, ax=axes, ticks=(-1, -0.5, 0, 0.5, 1), **shape)
        bar.set_label("correlation of two feature maps", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL, length=2)
    figure.suptitle("\n".join(map(plain_text, lines)), fontsize=TEXT)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its suffix names. Raises as `check_picture`, and WriteError."""
    from matplotlib import rc_context

    check_picture(path)
    picture = PICTURES[path.suffix.lower()]
    # Type 3 fonts, which journals refuse, and text as outlines otherwise; and ids in an SVG that are random
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "convsim"}):
        replace_file(path, lambda file: figure.savefig(file, format=picture.name, dpi=DPI, metadata=picture.metadata))


def check_picture(path: Path) -> None:
    """Raise InputError early if no picture can be saved there.

    A picture replaces only a picture of its own format, or an empty file, and creates no folder.
    """
    if path.suffix.lower() not in PICTURES:
        raise InputError(f"{path}: expected a name that ends in {PICTURE_SUFFIXES}")
    check_regular(path, f"a {PICTURE_SUFFIXES}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist; create it first")
    if not path.exists():
        return
    try:
        with open_regular(path) as file:
            start = file.read(4096)
    except OSError as error:
        raise InputError(f"{path}: exists and cannot be read ({error.strerror}); choose a new file") from error
    if start and not PICTURES[path.suffix.lower()].recognizes(start):
        raise InputError(f"{path}: exists and is not a {path.suffix[1:].upper()} picture; choose a new file")


PICTURE_SUFFIXES = one_of(PICTURES)


def plain_text(text: str) -> str:
    """Return a text that matplotlib draws as it is: without formulas, and with a name that a legend shows."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)  # no font has it
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _panels(count: int, columns: int, width: float | None = None) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows, width = ceil(count / columns), width or (COLUMN if columns == 1 else PAGE)
    figure = Figure(figsize=(width, rows * min(2.7, 0.55 * width / columns + 0.7)), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(color="#DDDDDD", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=TEXT)
        panel.xaxis.label.set_fontsize(TEXT)
        panel.yaxis.label.set_fontsize(TEXT)
    for panel in axes[count:]:
        panel.set_visible(False)
    return figure, axes[:count]


def _draw_curves(axes: Axes, curves: Sequence[Curve], column: str) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = False  # a value above 0
    for index, curve in enumerate(curves):
        round_ = index // len(COLORS)  # after eight curves the colors repeat, with other dash patterns
        style = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[(index + round_) % len(DASHES)]}
        seeds = [{row["epoch"]: row[column] for row in rows if row.get(column) is not None} for rows in curve.histories]
        seeds = [seed for seed in seeds if seed]
        drawn |= any(value > 0 for seed in seeds for value in seed.values())
        epochs = sorted(set.intersection(*map(set, seeds))) if seeds else []  # those of a diverged seed, and no more
        values = [[seed[epoch] for seed in seeds] for epoch in epochs]
        marker = "o" if len(epochs) == 1 else None
        means, label = [mean(found) for found in values], plain_text(curve.label)
        axes.plot(epochs, means, linewidth=1.2, marker=marker, markersize=4, label=label, **style)
        for seed in seeds:  # by itself where another has ended, from the last mean
            rest = [(epoch, seed[epoch]) for epoch in sorted(seed) if not epochs or epoch > epochs[-1]]
            if rest:
                joint = [(epochs[-1], means[-1])] if epochs else []
                axes.plot(*zip(*joint, *rest, strict=True), linewidth=0.6, **style)
        if len(seeds) > 1 and epochs:
            spreads = [stdev(found) for found in values]
            low = [center - spread for center, spread in zip(means, spreads, strict=True)]
            high = [center + spread for center, spread in zip(means, spreads, strict=True)]
            if column in LOGARITHMIC:  # which has no room for 0, and much for what is near
                least = [min(found) for found in values]
                low = [bottom if bottom > lowest / 2 else lowest for bottom, lowest in zip(low, least, strict=True)]
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if column in LOGARITHMIC and drawn:
        _use_log_scale(axes)
    round_steps = MaxNLocator(7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)  # a single epoch is a single tick
    axes.xaxis.set_major_locator(round_steps)
    axes.set_xlabel("epoch")
    axes.set_ylabel(UNITS[column])


def _use_log_scale(axes: Axes) -> None:
    """Label a log scale with 0.1 and 1000, not powers of ten, and more densely if it spans few decades."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    if top < 10 * bottom:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
    elif top < 100 * bottom:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _over_seeds(measured: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float] | None]:
    """A figure's means over the seeds, and their standard deviations where there are any."""
    spreads = [figures[f"{key}_std"] or 0.0 for figures in measured]
    return [nan if figures[key] is None else figures[key] for figures in measured], spreads if any(spreads) else None


def _finish(figure: Figure, axes: Axes, title: str) -> None:
    """Add the title and one legend for all panels, and make the figure higher for them."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    labels = [fill(label, int((width - 0.5) / 0.06), break_on_hyphens=False) for label in labels]
    style: dict[str, Any] = {"frameon": False, "handlelength": 3, "columnspacing": 1.2}
    for rows, size in product(range(1, max(1, len(labels)) + 1), (TEXT, SMALL)):  # as few rows as fit
        columns = max(1, ceil(len(labels) / rows))
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=size, **style)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or (columns, size) == (1, SMALL):
            break
        legend.remove()
    lines = wrap(title, int(17 * width))
    figure.suptitle("\n".join(map(plain_text, lines)), fontsize=TEXT)
    figure.set_figheight(height + box.height / figure.dpi + 0.13 * len(lines))
