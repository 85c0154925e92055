"""Compare what was measured of several checkpoints: which layers belong together, and what changed.

A report is a dictionary with a `source` and its `layers`, the records of `measurement.layer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from convsim_cli.measurement.figures import Record, compared_keys

Report = dict[str, Any]


def add_changes(reports: Sequence[Report]) -> list[str]:
    """Add `KEY_change` to every layer, for each figure that is compared, and return warnings.

    A change is the difference from the first report; None in the first report itself, where a layer has no partner
    there, and where a figure is None.
    """
    warnings = []
    for report in reports:
        partners = _partners(reports[0], report)
        if not partners:
            warnings.append(f"{report['source']}: has no layer in common with {reports[0]['source']}")
        for layer in report["layers"]:
            first = None if report is reports[0] else partners.get(layer["name"])
            layer |= {f"{key}_change": _change(first, layer, key) for key in compared_keys()}
    return warnings


def side_by_side(reports: Sequence[Report]) -> list[tuple[Report, Record]]:
    """Return the layers of all reports, those that belong together next to each other, each with its report."""
    places: dict[str, int] = {}
    rows = []
    for report in reports:
        partners = _partners(reports[0], report)
        for layer in report["layers"]:
            name = partners[layer["name"]]["name"] if layer["name"] in partners else layer["name"]
            rows.append((places.setdefault(name, len(places)), report, layer))
    rows.sort(key=lambda row: row[0])
    return [(report, layer) for _, report, layer in rows]


def _partners(first: Report, report: Report) -> dict[str, Record]:
    """Which layer of the first report each layer of another one is, by name.

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


def _change(first: Record | None, layer: Record, key: str) -> float | None:
    if first is None or None in (first[key], layer[key]):
        return None
    return float(layer[key] - first[key])
