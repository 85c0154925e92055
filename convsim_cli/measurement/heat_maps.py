"""Heat maps of feature-map similarity, filter by filter."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


def draw_heat(heat: Mapping[str, Tensor], cosines: Mapping[str, float | None], title: str) -> Figure:
    """Draw |cos| of feature maps, filter by filter, a small square per layer; groups along its diagonal.

    heat: `[groups, side, side]` by layer; cosines: each layer's fm_cos. Readable for 50 layers and more: eight in a
    row.
    """
    from matplotlib.figure import Figure

    columns = min(8, max(2, ceil(len(heat) ** 0.5)))
    rows = max(1, ceil(len(heat) / columns))
    lines = wrap(title, 17 * columns)
    figure = Figure(figsize=(1.45 * columns + 0.6, 1.75 * rows + 0.3 + 0.17 * len(lines)), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    image = None
    for panel, (name, matrix) in zip(axes, heat.items(), strict=False):
        image = panel.imshow(_block_diagonal(matrix), vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        panel.set_title("\n".join([*map(plain_text, wrap(name, 22)), f"fm_cos {cosines[name]:.3g}"]), fontsize=6, pad=3)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in axes[len(heat) :]:
        panel.set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 1.6 / rows), aspect=12, label="mean |cos|, dimensionless")
        bar.ax.tick_params(labelsize=6)
        bar.ax.yaxis.label.set_fontsize(7)
    figure.suptitle("\n".join(map(plain_text, lines)), fontsize=8)
    return figure


def _block_diagonal(matrix: Tensor) -> Any:
    """Groups as blocks on a diagonal; filters of different groups form no pair, and their place is left empty."""
    import torch

    groups, side, _ = matrix.shape
    if groups == 1:
        return matrix[0].numpy()
    whole = torch.full((groups * side, groups * side), float("nan"))
    for group in range(groups):
        part = slice(group * side, (group + 1) * side)
        whole[part, part] = matrix[group]
    return whole.numpy()


def plain_text(text: str) -> str:
    """A text that matplotlib draws as it is: no formulas in it, and no name that keeps it out of the legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
