"""The figures that convsim measures per layer, each defined once.

A figure is one entry of `FIGURES`: the record of a layer, JSON, tables, CSV, `measure --help` and the README's table
follow from it. This module imports no torch, so that help texts can read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]  # what is known of one layer: which it is, and its figures


@dataclass(frozen=True)
class Figure:
    """A number that is measured of every layer.

    key: its name in JSON and in tables; meaning: one line for help texts and the README; value: takes it from a
    `layer.Layer`, None where no number can be given; unit: empty where it is dimensionless; moves_with_scale: whether
    scaling a layer's weights changes it; shown: whether tables have a column for it (JSON has every figure); compared:
    whether several checkpoints also get its change, under `KEY_change`; keep: on a terminal that is too narrow for all
    columns, those with a lower number go first.
    """

    key: str
    meaning: str
    value: Callable[[Any], Any]
    unit: str = ""
    moves_with_scale: bool = False
    shown: bool = True
    compared: bool = False
    keep: int = 0


FIGURES: tuple[Figure, ...] = (
    Figure(
        "cs", "L_CS, Eq. 10 of the paper", lambda layer: layer.kernels["cs"], "weight⁴", moves_with_scale=True, keep=5
    ),
    Figure(
        "ncs",
        "L_CS per pair over ‖K_i‖²‖K_j‖²: below 1 filters share the spectrum, above 1 they crowd the same frequencies",
        lambda layer: layer.kernels["ncs"],
        compared=True,
        keep=3,
    ),
    Figure("kernel_cos", "mean abs cosine between filters", lambda layer: layer.kernel_cos, keep=1),
    Figure("fm_cos", "mean abs cosine between feature maps", lambda layer: layer.maps.fm_cos, compared=True, keep=9),
    Figure("fm_cos_random", "fm_cos of random kernels on the same inputs", lambda layer: layer.fm_cos_random, keep=8),
    Figure(
        "fm_rank",
        "effective rank of the feature maps: how many of them say something of their own",
        lambda layer: layer.fm_rank,
        "filters",
        compared=True,
        keep=7,
    ),
    Figure(
        "fm_rank_random",
        "fm_rank of random kernels on the same inputs",
        lambda layer: layer.fm_rank_random,
        "filters",
        keep=6,
    ),
    Figure(
        "fm_inner2",
        "the paper's feature-map similarity, mean ⟨F_i, F_j⟩²",
        lambda layer: layer.maps.fm_inner2,
        "map⁴",
        moves_with_scale=True,
    ),
    Figure("norm", "‖W‖ of the layer", lambda layer: layer.kernels["norm"], "weight", moves_with_scale=True, keep=4),
    Figure(
        "dead",
        "filters whose norm is below 1e-6 of the layer's largest, or whose map is zero on every input",
        lambda layer: layer.dead,
        "filters",
        keep=2,
    ),
    Figure(
        "redundant",
        "filters with a partner whose mean cosine exceeds the threshold",
        lambda layer: layer.redundant,
        "filters",
        keep=2,
    ),
    Figure(
        "opposite",
        "filters with a partner whose mean cosine is below minus the threshold: complementary after a rectifier",
        lambda layer: layer.opposite,
        "filters",
    ),
    Figure(
        "removable",
        "filters that could go while each cluster of duplicates keeps one",
        lambda layer: layer.removable,
        "filters",
        keep=6,
    ),
    Figure(
        "clusters",
        "the clusters of duplicates, in which every two filters exceed the threshold: lists of filter indices",
        lambda layer: layer.clusters,
        "filters",
        shown=False,
    ),
)


def make_record(layer: Any) -> Record:
    """Return every figure of a layer, by key. Raises InputError for a kernel with NaN or Inf."""
    return {figure.key: figure.value(layer) for figure in FIGURES}


def compared_keys() -> list[str]:
    """Return the keys of the figures whose change is shown from checkpoint to checkpoint."""
    return [figure.key for figure in FIGURES if figure.compared]


def least_important_keys() -> list[str]:
    """Return the columns of tables in the order in which a narrow terminal does without them, with their changes."""
    figures = sorted((figure for figure in FIGURES if figure.shown), key=lambda figure: figure.keep)
    return [key for figure in figures[:-1] for key in (figure.key, f"{figure.key}_change")]


def shown_keys() -> list[str]:
    """Return the keys that are columns of tables."""
    return [figure.key for figure in FIGURES if figure.shown]
