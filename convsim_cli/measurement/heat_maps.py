"""Heat maps of feature-map similarity, filter by filter."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from textwrap import wrap
from typing import TYPE_CHECKING

from convsim_cli.measurement.mean_cosines import HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
