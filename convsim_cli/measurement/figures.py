"""The figures that convsim measures per layer, each declared once, and summaries of them.

A figure is one entry of `FIGURES` and one line of `kernel_figures.measure_layer`: the record of a layer, JSON, tables,
CSV and `measure --figures` follow; .docs/measure.md repeats the table. This module imports no torch, so that help texts
can read it.

A report is a dictionary with the `source` of a checkpoint and its `layers`, the records of `measure_layer`. Reports of
several checkpoints are compared layer by layer; of one, a line tells what stands out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from statistics import median
from typing import Any

from convsim_cli.errors import InputError, did_you_mean

Record = dict[str, Any]  # what is known of one layer: which it is, and its figures
ReportDocument = dict[str, Any]
_NAMED = 3  # layers, at most
_ALIKE, _LOW = 1.5, 2 / 3  # times chance, from which a layer's fm_corr and up to which its fm_rank stand out
LAST = 9  # `Figure.keep` of the columns that every table has


@dataclass(frozen=True)
class Figure:
    """A number that is measured for every layer.

    key: its name in JSON and in tables; meaning: one line for `--figures` and .docs/measure.md; unit: empty where it is
    dimensionless; moves_with_scale: whether scaling a layer's weights changes it; shown: whether tables have a column
    for it (JSON has every figure), wide: whether only with `--wide`; compared: whether several checkpoints also get its
    change, under `KEY_change`; several: whether only they have it; keep: on a terminal that is too narrow for all
    columns, those with a lower number go first, and with them their changes; keep_beside: the same number for several
    checkpoints, where it is another.
    """

    key: str
    meaning: str
    unit: str = ""
    moves_with_scale: bool = False
    shown: bool = True
    wide: bool = False
    compared: bool = False
    several: bool = False
    keep: int = 0
    keep_beside: int | None = None


FIGURES: tuple[Figure, ...] = (
    Figure("cs", "L_CS, Eq. 10 of the paper", "weight⁴", moves_with_scale=True, keep=4),
    Figure(
        "ncs",
        "mean over pairs of L_CS with each filter scaled to norm 1: below 1 if filters use different frequencies, "
        "above 1 if they use the same; compare only layers with equal filter counts",
        compared=True,
        keep=3,
    ),
    Figure("kernel_cos", "mean abs cosine between filters, 0 to 1", keep=1),
    Figure(
        "fm_corr",
        "mean abs correlation between feature maps over all inputs and positions, 0 to 1; lower is less similar",
        compared=True,
        keep=LAST,
    ),
    Figure("fm_corr_random", "fm_corr of random kernels on the same inputs", keep=LAST, keep_beside=0),
    Figure(
        "fm_rank",
        "effective rank of the feature maps' correlation matrix: number of effectively independent maps",
        "filters",
        compared=True,
        keep=LAST,
    ),
    Figure(
        "fm_rank_random",
        "fm_rank of random kernels, one per filter that is not dead, on the same inputs",
        "filters",
        keep=LAST,
        keep_beside=0,
    ),
    Figure("redundant", "filters with a partner whose correlation exceeds the threshold", "filters", keep=2),
    Figure(
        "opposite",
        "filters with a partner whose correlation is below minus the threshold: complementary after a ReLU",
        "filters",
    ),
    Figure(
        "removable",
        "filters that can be removed if each cluster of duplicates keeps one; a lower bound, ignoring linear "
        "combinations",
        "filters",
        keep=LAST,
    ),
    Figure(
        "clusters",
        "clusters of duplicates, in which all pairs exceed the threshold: lists of filter indices",
        "filters",
        shown=False,
    ),
    Figure("fm_cos", "mean abs cosine between feature maps on the same input, not mean-centered", wide=True),
    Figure(
        "fm_inner2",
        "the square of the paper's feature-map similarity: mean ⟨F_i, F_j⟩²",
        "map⁴",
        moves_with_scale=True,
        wide=True,
    ),
    Figure("norm", "‖W‖ of the layer", "weight", moves_with_scale=True, keep=3, keep_beside=LAST),
    Figure(
        "dead",
        "filters whose norm is below 1e-6 of the layer's largest, or whose map is constant on all inputs",
        "filters",
        keep=5,
    ),
    Figure(
        "turned",
        "with several checkpoints: median angle between a filter and the same filter in the first checkpoint",
        "degrees",
        several=True,
        keep=LAST,
    ),
)


def compared_keys() -> list[str]:
    """Return the keys of the figures whose change is shown from checkpoint to checkpoint."""
    return [figure.key for figure in FIGURES if figure.compared]


def least_important_keys(several: bool = False) -> list[tuple[str, str]]:
    """Return the figures in the order in which a narrow terminal does without them, each with its change."""
    beside = {figure.key: figure.keep_beside for figure in FIGURES if several and figure.keep_beside is not None}
    keep = {figure.key: beside.get(figure.key, figure.keep) for figure in FIGURES if figure.shown}
    return [(key, f"{key}_change") for key in sorted(keep, key=keep.__getitem__) if keep[key] < LAST]


def shown_keys(wide: bool = True, several: bool = True) -> list[str]:
    """Return the keys that are columns of tables, those for `wide` ones and for `several` checkpoints included."""
    return [figure.key for figure in FIGURES if figure.shown and wide >= figure.wide and several >= figure.several]


def add_changes(reports: Sequence[ReportDocument]) -> list[str]:
    """Add `KEY_change` to every layer, for each figure that is compared, and return warnings.

    A change is the difference from the first report; None in the first report itself, where a layer has no partner
    there, and where a figure is None.
    """
    warnings = []
    for report in reports:
        partners = partners_of(reports[0], report)
        if not partners:
            warnings.append(f"{report['source']}: has no layer in common with {reports[0]['source']}")
        for layer in report["layers"]:
            first = {} if report is reports[0] else partners.get(layer["name"], {})
            for key in compared_keys():
                unknown = None in (first.get(key), layer[key])
                layer[f"{key}_change"] = None if unknown else float(layer[key] - first[key])
    return warnings


def side_by_side(reports: Sequence[ReportDocument]) -> list[tuple[ReportDocument, Record]]:
    """Return the layers of all reports, those that belong together next to each other, each with its report."""
    places: dict[str, int] = {}
    rows = []
    for report in reports:
        partners = partners_of(reports[0], report)
        for layer in report["layers"]:
            name = partners[layer["name"]]["name"] if layer["name"] in partners else layer["name"]
            rows.append((places.setdefault(name, len(places)), report, layer))
    rows.sort(key=lambda row: row[0])
    return [(report, layer) for _, report, layer in rows]


def partners_of(first: ReportDocument, report: ReportDocument) -> dict[str, Record]:
    """Return which layer of the first report each layer of another one is, by name.

    Where no two names are equal, what all names of a checkpoint begin with, such as `module.`, is left out.
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


def what_changed(first: ReportDocument, report: ReportDocument) -> str:
    """Return how far a report's filters turned from the first report's, and the changes of norm and fm_corr.

    Each is the median over the layers that both have; empty where they have none. `add_changes` comes first.
    """
    partners = partners_of(first, report)
    pairs = [(partners[layer["name"]], layer) for layer in report["layers"] if layer["name"] in partners]
    turned = [layer["turned"] for _, layer in pairs if layer.get("turned") is not None]
    norms = [100 * (layer["norm"] / former["norm"] - 1) for former, layer in pairs if former.get("norm")]
    corr = [layer["fm_corr_change"] for _, layer in pairs if layer["fm_corr_change"] is not None]
    said = [f"turned {median(turned):.0f}°"] if turned else []
    said += [f"norm {median(norms):+.0f} %"] if norms else []
    said += [f"fm_corr {median(corr):+.2g}"] if corr else []
    return "median " * bool(said) + ", ".join(said).replace("-", "−")


def what_stands_out(layers: Sequence[Record]) -> str:
    """Return one line: the most correlated maps and lowest rank relative to chance, and what can be removed."""
    alike = sorted(_against_chance(layers, "fm_corr"), key=lambda found: -found[0])
    ranks = sorted(_against_chance(layers, "fm_rank"), key=lambda found: found[0])
    listed = [f"{layer['name']} ({ratio:.1f} times)" for ratio, layer in alike[:_NAMED] if ratio >= _ALIKE]
    said = [f"most correlated maps relative to chance: {', '.join(listed)}"] if listed else []
    if ranks and ranks[0][0] <= _LOW:
        layer = ranks[0][1]
        rank = f"{layer['fm_rank']:.1f}, chance {layer['fm_rank_random']:.1f}"
        said.append(f"lowest rank relative to chance: {layer['name']} ({rank})")
    said = said or ["no layer's maps are much more similar than chance"]
    for key in ("removable", "dead"):
        counts = {layer["name"]: layer[key] for layer in layers if layer[key]}
        count, most = sum(counts.values()), sorted(counts, key=counts.__getitem__, reverse=True)
        where = ", ".join(f"{counts[name]} of {name}" for name in most[:_NAMED])
        more = " and others" * (len(most) > _NAMED)
        what = f" filter{'s' * (count != 1)}" * (key == "removable")
        if count or key == "removable":
            said.append(f"{count}{what} {key}" + f" ({where}{more})" * bool(where))
    return "; ".join(said)


def why_duplicates(layers: Sequence[Record]) -> str | None:
    """Return one line about the first layer with duplicates whose filters have one spatial pattern each, or None.

    There `ncs` is over half the way from 1 to its lower bound (S − c) / (S − 1), where c is ‖A‖² of a constant kernel
    of norm 1, as after minimizing L_CS at unchanged norms and after `dct`. Fresh filters stay near 1.
    """
    for layer in layers:
        if not layer["removable"] or layer["ncs"] is None or prod(layer["shape"][2:]) < 3:  # two taps: by chance
            continue
        constant = prod((2 * size**2 + 1) / (3 * size) for size in layer["shape"][2:])
        if (1 - layer["ncs"]) * (layer["filters"] / layer["groups"] - 1) > max(1e-6, (constant - 1) / 2):
            return (
                f"{layer['name']} has duplicates because its ncs is near its lower bound, as after L_CS at unchanged "
                "norms or dct: each filter has one pattern, and with few input channels filters of one pattern are "
                "nearly equal"
            )
    return None


def sort_layers(layers: list[Record], by: str) -> None:
    """Sort records by a figure, in place: the largest first, or the smallest with a minus before it; null last.

    Raises InputError for an unknown figure.
    """
    key = by.removeprefix("-")
    if key not in shown_keys():
        raise InputError(f"`sort` {by}: {did_you_mean(key, shown_keys())}")
    sign = 1 if by.startswith("-") else -1
    layers.sort(key=lambda layer: (layer[key] is None, sign * (layer[key] or 0)))


def sort_reports(reports: Sequence[ReportDocument], by: str) -> None:
    """Sort the layers of every report, in place, as `sort_layers`: those of the first one by the first that has `by`.

    The first one leads where reports are shown side by side, and has no `turned`.
    """
    if len(reports) == 1 and by.removeprefix("-") not in shown_keys(several=False):
        raise InputError(f"`sort` {by}: only for several checkpoints; {did_you_mean(by, shown_keys(several=False))}")
    for report in reports:
        sort_layers(report["layers"], by)
    key = by.removeprefix("-")
    leader = next((report for report in reports if any(layer[key] is not None for layer in report["layers"])), None)
    if leader not in (None, reports[0]):
        places = {layer["name"]: place for place, layer in enumerate(partners_of(reports[0], leader).values())}
        reports[0]["layers"].sort(key=lambda layer: places.get(layer["name"], len(places)))


def _against_chance(layers: Sequence[Record], key: str) -> list[tuple[float, Record]]:
    return [(layer[key] / layer[f"{key}_random"], layer) for layer in layers if layer[key] and layer[f"{key}_random"]]
