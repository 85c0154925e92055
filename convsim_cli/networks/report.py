"""What is measured of one checkpoint, and what a reader has to know about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convsim_cli.kernels import Selection
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.inference_statistics import INPUTS
from convsim_cli.measurement.mean_cosines import HeatMap


class Report(dict[str, Any]):
    """The JSON document of one checkpoint, without the keys that all commands share.

    Keys: `source`, `input`, `bn_statistics` (`stored`, `inputs`, or None where no batch normalization was run),
    `layers`, `skipped`, and `total` with `cs` and, where there are labels, `accuracy` in per cent. Beside them:

    notes: lines that explain figures; warnings: lines that must not be missed; heat: the layers' heat maps, where they
    were asked for.
    """

    def __init__(self, source: str, input_name: str, selection: Selection) -> None:
        super().__init__(
            source=source, input=input_name, bn_statistics=None, layers=[], skipped=_entries(selection), total={}
        )
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.heat: dict[str, HeatMap] = {}


def call_notes(layers: Sequence[Record]) -> list[str]:
    """Return what a reader has to know of layers that the network does not call exactly once."""
    never = [layer["name"] for layer in layers if layer["calls"] == 0]
    often = [f"{layer['name']} ({layer['calls']} times)" for layer in layers if layer["calls"] > 1]
    notes = [f"never called, so without feature maps: {', '.join(never)}"] if never else []
    return notes + ([f"called more than once, every call counts: {', '.join(often)}"] if often else [])


def statistics_notes(chosen: str | None, wanted: str) -> list[str]:
    """Return which batch-norm statistics were taken, where they are not simply the stored ones."""
    if chosen != INPUTS:
        return []
    why = "" if wanted == INPUTS else ": the stored ones do not belong to these kernels"
    return [f"batch-norm statistics are re-estimated on the inputs{why}"]


def bound_notes(layers: Sequence[Record]) -> list[str]:
    """Return which layers have too many pairs of filters to keep a mean cosine for each."""
    large = [layer["name"] for layer in layers if layer["fm_cos"] is not None and layer["fm_rank"] is None]
    figures = "fm_rank, redundant, opposite, removable and clusters are null"
    return [f"too many filters to keep every pair's mean cosine, so {figures}: {', '.join(large)}"] if large else []


def _entries(selection: Selection) -> list[dict[str, Any]]:
    return [{"name": entry.name, "shape": list(entry.shape), "reason": entry.reason} for entry in selection.skipped]
