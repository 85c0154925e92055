from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from convsim_cli.plots import Curve, draw_arms, draw_grid, draw_iterations, draw_runs, save_figure

HISTORY = [
    {"epoch": e, "cs": 900 / e, "train_loss": 2 / e, "train_accuracy": 9.0 * e, "test_accuracy": 8.0 * e}
    for e in range(1, 6)
]
MEASURED = {"best_test_accuracy": 60.0, "best_test_accuracy_std": None, "last_test_accuracy": 58.0}
FIGURES = MEASURED | {"last_test_accuracy_std": None}


def test_curves_differ_without_their_color() -> None:
    figure = draw_runs([Curve(f"run {n}", [HISTORY]) for n in range(16)], "")
    for axes in figure.axes:
        lines = axes.get_lines()
        assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 16  # type: ignore[attr-defined]
        assert len({str(line._dash_pattern) for line in lines[:8]}) == 8  # type: ignore[attr-defined]


def test_axes_bear_their_units_and_falling_quantities_a_log_scale() -> None:
    figure = draw_runs([Curve("a", [HISTORY])], "")
    said = {axes.get_ylabel(): axes.get_yscale() for axes in figure.axes}
    assert said == {
        "training loss (nats)": "log",
        "test accuracy (%)": "linear",
        "train accuracy (%)": "linear",
        "$L_{CS}$ (Eq. 10, weight$^4$)": "log",
    }
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}


def test_seeds_of_an_arm_are_one_curve_with_a_band() -> None:
    rows = [
        {"arch": arch, "arm": arm, "seed": seed, "epoch": [1, 2], "cs": [900.0 + seed, 800.0]}
        for arch in ("cnn1", "cnn2")
        for arm in ("baseline", "init")
        for seed in (0, 2)
    ]
    figure = draw_arms(rows, "title")
    assert [axes.get_title() for axes in figure.axes] == ["CNN1", "CNN2"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.get_lines()] == ["baseline", "init"]
        assert list(axes.get_lines()[0].get_ydata()) == [901, 800]
        assert len(axes.collections) == 2


def test_the_band_is_one_standard_deviation_to_either_side_of_the_mean() -> None:
    seeds = [[{**row, "test_accuracy": row["test_accuracy"] + shift} for row in HISTORY] for shift in (0, 3, 9)]
    axes = draw_runs([Curve("seeds", seeds)], "").axes[1]
    spread = stdev([0, 3, 9])
    box = axes.collections[0].get_paths()[0].get_extents()
    assert list(axes.get_lines()[0].get_ydata()) == [row["test_accuracy"] + 4 for row in HISTORY]
    assert (box.ymin, box.ymax) == (pytest.approx(8 + 4 - spread), pytest.approx(40 + 4 + spread))


def test_a_band_on_a_log_scale_stays_above_zero() -> None:
    seeds = [[{**row, "cs": scale * row["cs"]} for row in HISTORY] for scale in (1.0, 1.0, 100.0)]
    axes = draw_runs([Curve("seeds", seeds)], "").axes[3]
    assert axes.collections[0].get_paths()[0].get_extents().ymin == pytest.approx(900 / 5)


def smallest_text(figure: Figure) -> float:
    """The size of a figure's smallest visible text, in points."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible() and text.get_text()]
    return min(text.get_fontsize() for text in found)


def ticks(axes: Axes, which: str) -> list[str]:
    """The labels on an axis within its limits, from both of its scales."""
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    return [
        label
        for minor in (False, True)
        for place, label in zip(
            axis.get_ticklocs(minor=minor), [text.get_text() for text in axis.get_ticklabels(minor=minor)], strict=True
        )
        if low <= place <= high and label
    ]


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_epochs_on_an_axis_are_whole(epochs: int) -> None:
    figure = draw_runs([Curve("a", [HISTORY[:epochs]])], "")
    figure.draw_without_rendering()
    for axes in figure.axes:
        found = ticks(axes, "x")
        assert found
        assert set(found) <= {str(epoch) for epoch in range(1, epochs + 1)}


@pytest.mark.parametrize(("epochs", "expected"), [(7, range(1, 8)), (30, range(0, 31, 5)), (100, range(0, 101, 20))])
def test_the_epochs_on_an_axis_are_round(epochs: int, expected: Sequence[int]) -> None:
    rows = [{**HISTORY[0], "epoch": epoch, "turned": 1.0, "turn_per_step": 1.0} for epoch in range(1, epochs + 1)]
    figure = draw_runs([Curve("a", [rows])], "")
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert ticks(axes, "x") == [str(epoch) for epoch in expected]


@pytest.mark.parametrize("turned", [None, 1.0])
def test_a_figure_of_runs_is_as_wide_as_a_page_and_can_be_read_there(turned: float | None) -> None:
    rows = [{**row, "turned": turned, "turn_per_step": turned} for row in HISTORY]
    figure = draw_runs([Curve("mode=init", [rows])], "cnn1, 5 epochs")
    assert figure.get_figwidth() == 7.2
    assert smallest_text(figure) >= 6
    assert figure.get_suptitle() == "cnn1, 5 epochs"


def test_the_legend_of_eight_arms_takes_two_rows_within_the_figure() -> None:
    names = ["baseline", "init", "init, preserve_norm=true", "reg, beta=auto", "init, method=dct"]
    names += ["init, method=orthogonal", "rescale, factor=0.07", "rescale, factor=0.07, warmup=2"]
    figure = draw_runs([Curve(f"mode={name}", [HISTORY]) for name in names], "")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == 4  # columns
    box = legend.get_window_extent()
    assert (box.x0 >= 0, box.x1 <= figure.bbox.width) == (True, True)
    assert smallest_text(figure) >= 6


@pytest.mark.parametrize(("networks", "width"), [(1, 3.5), (2, 7.2), (5, 7.2)])
def test_networks_stand_side_by_side_on_a_page(networks: int, width: float) -> None:
    rows = [{"arch": f"net{n}", "arm": "init", "epoch": [1, 2], "cs": [9.0, 8.0]} for n in range(networks)]
    figure = draw_arms(rows, "title")
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert ([axes.get_title() for axes in drawn], figure.get_figwidth()) == ([row["arch"] for row in rows], width)
    assert smallest_text(figure) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0001, 1.05, 1.5, 3, 9.9, 50, 1e5])
def test_a_log_scale_has_several_labels_however_little_it_spans(factor: float) -> None:
    rows = [{**row, "train_loss": factor ** (row["epoch"] / 5), "cs": 1.0} for row in HISTORY]
    figure = draw_runs([Curve("a", [rows])], "")
    figure.draw_without_rendering()
    found = ticks(figure.axes[0], "y")
    assert 2 <= len(found) <= 12
    assert len(set(found)) == len(found)


def test_a_mean_ends_with_the_first_of_its_seeds_and_the_others_go_on() -> None:
    figure = draw_runs([Curve("arm", [HISTORY, HISTORY[:2], []])], "")
    for axes in figure.axes:
        both, rest = axes.get_lines()
        assert list(both.get_xdata()) == [1, 2]
        assert list(rest.get_xdata()) == [2, 3, 4, 5]


def test_any_name_is_drawn_as_it_is_and_stands_in_the_legend(tmp_path: Path) -> None:
    names = ["a$b_$c", "a$x^^$", "_hidden"]
    figure = draw_runs([Curve(name, [HISTORY]) for name in names], "")
    save_figure(figure, tmp_path / "x.png")
    said = [text.get_text().strip().replace(r"\$", "$") for text in figure.legends[0].get_texts()]
    assert said == names


def test_a_run_that_diverged_leaves_a_gap_and_no_error() -> None:
    gone = dict.fromkeys(FIGURES)
    rows = [{"lr": 0.1, "batch_size": 64, "measured": {"baseline": FIGURES, "init": gone}}]
    assert len(draw_grid(rows, "title").axes[0].patches) == 2
    draw_iterations([{"iterations": 0, "measured": FIGURES}, {"iterations": 9, "measured": gone}], "title")


def test_a_long_title_stays_within_the_figure(tmp_path: Path) -> None:
    figure = draw_iterations([{"iterations": 0, "measured": FIGURES}], "a long title " * 30)
    save_figure(figure, tmp_path / "x.png")
    figure.draw_without_rendering()
    (title,) = (text for text in figure.texts if "a long title" in text.get_text())
    box = title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize("label", ["momentum=0.9, " * 12, "x" * 150])
def test_a_long_label_stays_within_the_figure(label: str) -> None:
    figure = draw_runs([Curve(label, [HISTORY]), Curve("short", [HISTORY])], "")
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert (box.x0 >= 0, box.x1 <= figure.bbox.width) == (True, True)
    assert box.y1 < min(axes.get_window_extent().y0 for axes in figure.axes)


def test_no_band_on_a_log_scale_reaches_far_below_its_lowest_seed() -> None:
    histories = [[{**row, "cs": value} for row in HISTORY] for value in (10000.0, 1720.0)]
    axes = draw_runs([Curve("a", histories)], "").axes[3]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].min() == 1720  # type: ignore[union-attr, index, call-overload]


def test_runs_that_all_diverged_at_once_leave_an_empty_panel(tmp_path: Path) -> None:
    rows = [
        {"arch": arch, "arm": "init", "seed": seed, "epoch": epochs, "cs": [9.0] * len(epochs)}
        for arch, epochs in (("cnn1", []), ("cnn2", [1, 2]))
        for seed in range(2)
    ]
    figure = draw_arms(rows, "title")
    save_figure(figure, tmp_path / "x.png")  # a log scale of nothing fails when it is drawn
    empty, drawn = figure.axes
    assert [len(line.get_xdata()) for axes in (empty, drawn) for line in axes.get_lines()] == [0, 2]  # type: ignore[arg-type]
    assert (empty.get_yscale(), drawn.get_yscale()) == ("linear", "log")


def test_values_that_are_all_zero_get_no_log_scale(tmp_path: Path) -> None:
    figure = draw_runs([Curve("a", [[{**row, "cs": 0.0} for row in HISTORY]])], "")
    save_figure(figure, tmp_path / "x.png")
    assert figure.axes[3].get_yscale() == "linear"
    assert list(figure.axes[3].get_lines()[0].get_ydata()) == [0] * len(HISTORY)  # type: ignore[arg-type]


def test_figure_5_shows_both_error_bars_in_the_order_of_the_iterations() -> None:
    measured = FIGURES | {"best_test_accuracy_std": 1.0, "last_test_accuracy_std": 1.0}
    axes = draw_iterations([{"iterations": n, "measured": measured} for n in (200, 0, 50)], "").axes[0]
    best, last = (sorted(line.get_xdata()) for line in axes.get_lines() if line.get_marker() in ("o", "s"))
    assert [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"] == [best]
    assert not set(best) & set(last)


def test_the_labels_of_twenty_configurations_do_not_overlap() -> None:
    sides = {"baseline": FIGURES, "init": FIGURES}
    rows = [
        {"lr": lr, "batch_size": size, "measured": sides} for lr in (0.1, 0.03, 0.01, 0.003) for size in range(64, 69)
    ]
    figure = draw_grid(rows, "")
    figure.draw_without_rendering()
    boxes = sorted((label.get_window_extent() for label in figure.axes[0].get_xticklabels()), key=lambda box: box.x0)
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
