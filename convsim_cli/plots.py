"""Figures: curves over epochs, and the paper's Figures 1 to 5.

They can be read in gray and by color-blind readers: the colors are Okabe and Ito's, and each curve also has its own
dash pattern, each bar its own hatching.

Heat maps of feature-map similarity, filter by filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from statistics import mean, stdev
from textwrap import fill, wrap
from typing import TYPE_CHECKING, Any

from convsim_cli.measurement.pairs import HeatMap
from convsim_cli.reproduction.experiments import CURVES
from convsim_cli.training.run import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A8A00")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (2, 1)), (0, (4, 1, 1, 1)))
HATCHES = ("", "///")
UNITS = {
    "cs": "$L_{CS}$ (Eq. 10, dimensionless)",
    "train_loss": "training loss (cross entropy, nats)",
    "test_loss": "test loss (cross entropy, nats)",
    "train_accuracy": "train accuracy (%)",
    "test_accuracy": "test accuracy (%)",
}
LOGARITHMIC = {"cs", "train_loss"}


@dataclass(frozen=True)
class Curve:
    """A line over epochs: its label, and one history of rows of results.csv per seed.

    Several seeds are drawn as their mean, in a band of one standard deviation to either side.
    """

    label: str
    histories: Sequence[Sequence[Row]]


def draw_experiment(name: str, rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw one of the paper's figures from the rows of its JSON."""
    if name == "figure4":
        return draw_grid(rows, title)
    if name == "figure5":
        return draw_iterations(rows, title)
    return draw_arms(rows, CURVES[name], title)


def draw_runs(curves: Sequence[Curve]) -> Figure:
    """Draw the loss, accuracies and L_CS of runs in one figure."""
    figure, axes = _panels(2, 2)
    for panel, column in zip(axes, ("train_loss", "test_accuracy", "train_accuracy", "cs"), strict=True):
        _draw_curves(panel, curves, column)
    _finish(figure, axes[0], "")
    return figure


def draw_arms(rows: Sequence[dict[str, Any]], column: str, title: str) -> Figure:
    """Draw Figure 1, 2 or 3: a panel per network, a curve per arm.

    rows: those of the figure's JSON, each with `arch`, `arm`, `epoch` and the column.
    """
    by_arch = [(arch, list(found)) for arch, found in groupby(rows, key=lambda row: row["arch"])]
    figure, axes = _panels(1, len(by_arch))
    for panel, (arch, found) in zip(axes, by_arch, strict=True):
        by_arm = groupby(found, key=lambda row: row["arm"])
        _draw_curves(panel, [Curve(arm, [_history(row, column) for row in of_arm]) for arm, of_arm in by_arm], column)
        panel.set_title(plain_text(arch.upper() if arch.startswith("cnn") else arch), fontsize=9)
    _finish(figure, axes[0], title)
    return figure


def draw_grid(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw Figure 4: test accuracy with and without Algorithm 1, in bars, for each learning rate and batch size."""
    figure, (axes,) = _panels(1, 1, width=max(4.5, 1.5 + 0.8 * len(rows)))
    for index, side in enumerate(("baseline", "init")):
        measured = [row["measured"][side] for row in rows]
        heights = [_number(figures["best_test_accuracy"]) for figures in measured]
        spreads = [figures["best_test_accuracy_std"] or 0.0 for figures in measured]
        bars = axes.bar(
            [position + 0.4 * index - 0.2 for position in range(len(rows))],
            heights,
            0.38,
            yerr=spreads if any(spreads) else None,
            color=("#BBBBBB", COLORS[2])[index],
            edgecolor="black",
            linewidth=0.6,
            hatch=HATCHES[index],
            label=("baseline", "Algorithm 1 before training")[index],
        )
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, fontsize=7)
    axes.set_xticks(range(len(rows)), [f"lr {row['lr']:g}\nbatch {row['batch_size']}" for row in rows], fontsize=7)
    axes.set_xlabel("learning rate and batch size (images)")
    axes.set_ylabel("best test accuracy (%)")
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    _finish(figure, axes, title)
    return figure


def draw_iterations(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw Figure 5: test accuracy against the iterations I of Algorithm 1."""
    figure, (axes,) = _panels(1, 1)
    counts = [row["iterations"] for row in rows]
    for index, (key, label) in enumerate((("best_test_accuracy", "best"), ("last_test_accuracy", "last epoch"))):
        values = [_number(row["measured"][key]) for row in rows]
        spreads = [row["measured"][f"{key}_std"] or 0.0 for row in rows]
        axes.errorbar(
            counts,
            values,
            yerr=spreads if any(spreads) else None,
            marker=("o", "s")[index],
            markersize=4,
            capsize=2,
            color=(COLORS[2], COLORS[3])[index],
            linestyle=DASHES[index],
            label=label,
        )
    axes.set_xlabel("iterations I of Algorithm 1 (0 is the baseline)")
    axes.set_ylabel("test accuracy (%)")
    _finish(figure, axes, title)
    return figure


def _panels(rows: int, columns: int, width: float | None = None) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    size = (width or (4.5 if columns == 1 else 3.6 * columns), 3.4 if rows == 1 else 2.7 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(color="#DDDDDD", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
        panel.xaxis.label.set_fontsize(9)
        panel.yaxis.label.set_fontsize(9)
    return figure, axes


def _draw_curves(axes: Axes, curves: Sequence[Curve], column: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, curve in enumerate(curves):
        round_ = index // len(COLORS)  # after eight curves the colors repeat, with other dash patterns
        style = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[(index + round_) % len(DASHES)]}
        points = sorted((row["epoch"], row[column]) for rows in curve.histories for row in rows)
        by_epoch = {epoch: [v for _, v in found] for epoch, found in groupby(points, key=lambda point: point[0])}
        epochs, values = list(by_epoch), list(by_epoch.values())  # a diverged seed has fewer epochs
        marker = "o" if len(epochs) == 1 else None
        means, label = [mean(seeds) for seeds in values], plain_text(curve.label)
        axes.plot(epochs, means, linewidth=1.4, marker=marker, label=label, **style)
        if len(curve.histories) > 1:
            low, high = (
                zip(*(_band(seeds, column in LOGARITHMIC) for seeds in values), strict=True) if values else ((), ())
            )
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if column in LOGARITHMIC:
        _use_log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # a single epoch is a single tick
    axes.set_xlabel("epoch")
    axes.set_ylabel(UNITS[column])


def _band(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """The mean of an epoch's seeds minus and plus their standard deviation; a log scale has no room for 0 and below."""
    center, spread = mean(values), stdev(values) if len(values) > 1 else 0.0
    low = center - spread
    return (min(values) if logarithmic and low <= 0 else low), center + spread


def _use_log_scale(axes: Axes) -> None:
    """Label a log scale with 0.1 and 1000, not powers of ten: more densely the fewer decades it spans."""
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


def _finish(figure: Figure, axes: Axes, title: str) -> None:
    """Add the title and one legend for all panels, and make the figure higher for them."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    labels = [fill(label, int((width - 0.75) / 0.08), break_on_hyphens=False) for label in labels]
    columns = max(1, min(len(labels), int(width / (0.75 + 0.065 * max(map(len, labels), default=1)))))
    legend_lines = sum(label.count("\n") for label in labels) + ceil(len(labels) / columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, handlelength=4)
    lines = wrap(title, int(15 * width))
    figure.suptitle("\n".join(map(plain_text, lines)), fontsize=9)
    figure.set_figheight(height + 0.17 * (legend_lines + len(lines)))


def _history(row: dict[str, Any], column: str) -> list[Row]:
    return [{"epoch": epoch, column: value} for epoch, value in zip(row["epoch"], row[column], strict=True)]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


_LABEL = 0.062  # inches that a label of the smallest font takes
_PANELS = ((1, 6.0), (4, 4.2), (9, 3.0), (16, 2.4))  # inches of a panel, up to so many layers
_SMALL_PANEL = 1.9


def draw_heat(heat: Mapping[str, HeatMap], captions: Mapping[str, str], title: str) -> Figure:
    """Draw heat maps side by side, from −1 (opposite) over 0 to 1 (the same), with the indices of the filters.

    captions: a line below each layer's name. Readable for 50 layers and more.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panel = next((inches for most, inches in _PANELS if len(heat) <= most), _SMALL_PANEL)
    columns = min(8, max(1, ceil(len(heat) ** 0.5)))
    rows = max(1, ceil(len(heat) / columns))
    lines = wrap(title, int(12 * panel * columns))
    size = ((panel + 0.25) * columns + 0.8, (panel + 0.45) * rows + 0.3 + 0.17 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    colors = colormaps["RdBu_r"].with_extremes(bad="0.88")
    image = None
    for axis, (name, drawn) in zip(axes, heat.items(), strict=False):
        image = axis.imshow(drawn.cells.numpy(), vmin=-1, vmax=1, cmap=colors, interpolation="nearest")
        names = map(plain_text, wrap(name, int(14 * panel)))
        axis.set_title("\n".join([*names, captions[name]]), fontsize=6, pad=3)
        _label_filters(axis, drawn.labels, panel)
    for axis in axes[len(heat) :]:
        axis.set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 1.6 / rows), aspect=14, label="mean cosine, signed")
        bar.ax.tick_params(labelsize=6)
        bar.ax.yaxis.label.set_fontsize(7)
    figure.suptitle("\n".join(map(plain_text, lines)), fontsize=8)
    return figure


def plain_text(text: str) -> str:
    """Return a text that matplotlib draws as it is: without formulas, and with a name that a legend shows."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _label_filters(axis: Axes, labels: list[int], panel: float) -> None:
    """Write the filters' indices at both axes, as many of them as there is room for."""
    step = ceil(len(labels) * _LABEL / panel)
    places = range(0, len(labels), step)
    shown = [str(labels[place]) for place in places]
    axis.set_xticks(places, shown, fontsize=3.5, rotation=90)
    axis.set_yticks(places, shown, fontsize=3.5)
    axis.tick_params(length=1.5, pad=1, width=0.3)
