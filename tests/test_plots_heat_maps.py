from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matplotlib.text import Text

from convsim_cli.measurement import pairs as pairs_module
from convsim_cli.measurement.pairs import make_heat_map
from convsim_cli.plots import draw_heat


def mean_of(*values: tuple[int, int, float], filters: int = 6) -> torch.Tensor:
    mean = torch.eye(filters)
    for i, j, value in values:
        mean[i, j] = mean[j, i] = value
    return mean[None]


def test_similar_filters_are_neighbours_with_their_own_labels() -> None:
    mean = mean_of((0, 3, 0.9), (1, 5, 0.8), (2, 4, -0.7))
    drawn = make_heat_map(mean)
    assert sorted(drawn.labels) == list(range(6))
    assert torch.equal(drawn.cells, mean[0][drawn.labels][:, drawn.labels])
    for pair in ((0, 3), (1, 5)):
        assert abs(drawn.labels.index(pair[0]) - drawn.labels.index(pair[1])) == 1
    assert drawn.cells.min() == pytest.approx(-0.7)


def test_groups_are_blocks_and_dead_filters_make_no_pair() -> None:
    mean = torch.stack([mean_of((0, 1, 0.5), filters=3)[0], mean_of((0, 2, -0.5), filters=3)[0]])
    mean[1, 1, 1] = 0
    drawn = make_heat_map(mean)
    assert (sorted(drawn.labels[:3]), sorted(drawn.labels[3:5]), drawn.labels[5]) == ([0, 1, 2], [3, 5], 4)
    assert drawn.cells[:3, 3:].isnan().all()
    assert drawn.cells[5].isnan().all()
    assert drawn.cells[3, 4] == -0.5


@pytest.mark.parametrize("value", [0.9, -0.9])
def test_of_many_filters_a_cell_shows_the_strongest_pair_with_its_sign(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "MOST_CELLS", 4)
    monkeypatch.setattr(pairs_module, "similarity_order", lambda mean: torch.arange(mean.shape[-1])[None])
    drawn = make_heat_map(mean_of((1, 6, value), (0, 7, -0.1), filters=8))
    assert drawn.pooled
    assert drawn.cells.shape == (4, 4)
    assert drawn.cells[0, 3] == drawn.cells[3, 0] == pytest.approx(value)
    assert drawn.cells.diagonal().abs().max() < 0.5  # a filter is no partner of its own
    assert drawn.labels == [0, 2, 4, 6]


def test_the_scale_is_signed_and_filters_are_numbered() -> None:
    heat = {"a": make_heat_map(mean_of((0, 3, 0.9))), "b": make_heat_map(torch.eye(120)[None])}
    figure = draw_heat(heat, {"a": "fm_corr 0.1", "b": "fm_corr 0.2"}, "title")
    small, large, *scales = figure.axes
    assert small.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in small.get_yticklabels()] == [str(label) for label in heat["a"].labels]
    assert [label.get_text() for label in large.get_yticklabels()] == [str(label) for label in heat["b"].labels[::16]]
    assert list(large.get_yticks()) == list(range(0, 120, 16))
    assert small.get_title() == "a\nfm_corr 0.1"
    assert [scale.get_ylabel() for scale in scales] == ["correlation of two feature maps"]


@pytest.mark.parametrize(("layers", "width"), [(1, 3.5), (3, 7.2), (20, 7.2), (53, 7.2)])
def test_heat_maps_fit_a_page_and_can_be_read_there(layers: int, width: float) -> None:
    heat = {f"layer{n}.0.downsample.0.weight": make_heat_map(torch.eye(64 if n else 1024)[None]) for n in range(layers)}
    figure = draw_heat(heat, dict.fromkeys(heat, "fm_corr 0.0123"), "title")
    figure.draw_without_rendering()
    assert figure.get_figwidth() == width
    assert figure.get_figheight() <= 9.7
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        assert text.get_fontsize() >= 6 or not (text.get_visible() and text.get_text())
    for axes in figure.axes[:layers]:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            assert len(boxes) >= 2
            assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_the_outer_axes_of_heat_maps_say_filter() -> None:
    heat = {str(n): make_heat_map(torch.eye(4)[None]) for n in range(5)}
    axes = draw_heat(heat, dict.fromkeys(heat, "caption"), "title").axes[:5]
    assert [found.get_ylabel() for found in axes] == ["filter", "", "", "filter", ""]
    assert [found.get_xlabel() for found in axes] == ["", "", "filter", "filter", "filter"]


def test_a_long_name_of_a_layer_breaks_after_dots() -> None:
    heat = {f"features.{n}.depthwise_separable.conv.weight": make_heat_map(torch.eye(4)[None]) for n in range(36)}
    names = [axes.get_title() for axes in draw_heat(heat, dict.fromkeys(heat, "caption"), "title").axes[:36]]
    assert names[0] == "features.0.\ndepthwise_separable.\nconv\ncaption"
