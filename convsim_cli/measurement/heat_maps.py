"""Heat maps of feature-map similarity, filter by filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convsim_cli.measurement.mean_cosines import similarity_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDERS = ("similarity", "index")
MOST_CELLS = 128  # along each axis of a heat map; of more filters, a cell shows the strongest of several pairs
_LABEL = 0.062  # inches that a label of the smallest font takes
_PANELS = ((1, 6.0), (4, 4.2), (9, 3.0), (16, 2.4))  # inches of a panel, up to so many layers
_SMALL_PANEL = 1.9


@dataclass(frozen=True)
class HeatMap:
    """The mean signed cosine of every pair of a layer's maps, as it is drawn.

    cells: `[n, n]`, NaN where two filters form no pair; labels: the filter that each row begins with; pooled: whether a
    cell stands for several pairs.
    """

    cells: Tensor
    labels: list[int]
    pooled: bool


def make_heat_map(mean: Tensor, order: str = "similarity") -> HeatMap:
    """Return the heat map of mean cosines `[groups, S / groups, S / groups]`, groups as blocks along its diagonal.

    order: of the filters within their group, by `similarity` (average linkage) or by `index`. Dead filters form no
    pairs.
    """
    mean = mean.cpu()
    groups, each, _ = mean.shape
    order_ = similarity_order(mean) if order == "similarity" else torch.arange(each).expand(groups, -1)
    side = min(each, max(1, MOST_CELLS // groups))
    cells = torch.full((groups * side, groups * side), torch.nan)
    for group in range(groups):
        block = slice(group * side, (group + 1) * side)
        cells[block, block] = _pooled(_without_dead(mean[group])[order_[group]][:, order_[group]], side)
    starts = torch.arange(side) * each // side
    labels = (torch.arange(groups)[:, None] * each + order_[:, starts]).flatten().tolist()
    return HeatMap(cells, labels, side < each)


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


def _without_dead(mean: Tensor) -> Tensor:
    alive = mean.diagonal() > 0
    return torch.where(alive[:, None] & alive[None, :], mean, torch.nan)


def _pooled(mean: Tensor, side: int) -> Tensor:
    """Keep the strongest pair of those that share a cell, with its sign; NaN where no pair is alive."""
    if side == len(mean):
        return mean
    pairs = mean.clone().fill_diagonal_(torch.nan)  # a filter is no partner of its own
    highest = _pool(torch.where(pairs.isnan(), -torch.inf, pairs), side)
    lowest = -_pool(torch.where(pairs.isnan(), -torch.inf, -pairs), side)
    strongest = torch.where(highest >= -lowest, highest, lowest)
    return torch.where(strongest.isinf(), torch.nan, strongest)


def _pool(values: Tensor, side: int) -> Tensor:
    pooled: Any = torch.nn.functional.adaptive_max_pool2d(values[None], side)
    return pooled[0]
