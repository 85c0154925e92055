"""What stands out among the layers of a checkpoint, and their order by a figure."""

from __future__ import annotations

from collections.abc import Sequence

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.measurement.figures import FIGURES, Record

_NAMED = 3  # layers, at most
_ALIKE, _LOW = 1.5, 2 / 3  # times chance, from which a layer's fm_cos and up to which its fm_rank stand out


def what_stands_out(layers: Sequence[Record]) -> str:
    """Return one line: the layers whose maps are most alike against chance, the lowest rank, and removable filters."""
    alike = sorted(_against_chance(layers, "fm_cos"), key=lambda found: -found[0])
    ranks = sorted(_against_chance(layers, "fm_rank"), key=lambda found: found[0])
    removable = sum(layer["removable"] or 0 for layer in layers)
    listed = [f"{layer['name']} ({ratio:.1f} times)" for ratio, layer in alike[:_NAMED] if ratio >= _ALIKE]
    said = [f"maps most alike against chance: {', '.join(listed)}"] if listed else []
    if ranks and ranks[0][0] <= _LOW:
        layer = ranks[0][1]
        said.append(f"lowest rank: {layer['name']} ({layer['fm_rank']:.1f}, chance {layer['fm_rank_random']:.1f})")
    said = said or ["no layer's maps stand out against chance"]
    return "; ".join([*said, f"{removable} filter{'s' * (removable != 1)} removable"])


def sort_layers(layers: list[Record], by: str) -> None:
    """Sort records by a figure, in place: the largest first, or the smallest with a minus before it; null last.

    Raises InputError for an unknown figure.
    """
    key = by.removeprefix("-")
    known = [figure.key for figure in FIGURES if figure.shown]
    if key not in known:
        raise InputError(f"`sort` {by}: {did_you_mean(key, known)}")
    sign = 1 if by.startswith("-") else -1
    layers.sort(key=lambda layer: (layer[key] is None, sign * (layer[key] or 0)))


def _against_chance(layers: Sequence[Record], key: str) -> list[tuple[float, Record]]:
    return [(layer[key] / layer[f"{key}_random"], layer) for layer in layers if layer[key] and layer[f"{key}_random"]]
