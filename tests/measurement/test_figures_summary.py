from __future__ import annotations

from typing import Any

import pytest

from convsim_cli.errors import InputError
from convsim_cli.measurement.figures import sort_layers, what_stands_out, why_duplicates


def record(name: str, cos: float | None, rank: float | None, removable: int | None = 0) -> dict[str, Any]:
    chance = {"fm_corr_random": 0.1 if cos else None, "fm_rank_random": 20.0 if rank else None}
    return {"name": name, "fm_corr": cos, "fm_rank": rank, "removable": removable, "dead": 0, **chance}


def test_what_stands_out_is_named() -> None:
    layers = [record("a", 0.2, 18.0), record("b", 0.4, 6.0, 3), record("c", 0.12, 19.0), record("d", None, None, None)]
    assert what_stands_out(layers) == (
        "most correlated maps relative to chance: b (4.0 times), a (2.0 times); lowest rank relative to chance: "
        "b (6.0, chance 20.0); "
        "3 filters removable (3 of b)"
    )


def test_at_most_three_layers_that_stand_out_are_named() -> None:
    many = [record(name, 0.3, 19.0) for name in "abcde"]
    assert "a (3.0 times), b (3.0 times), c (3.0 times); 0 filters" in what_stands_out(many)
    one = what_stands_out([record("a", 0.11, 19.0, 1)])
    assert one == "no layer's maps are much more similar than chance; 1 filter removable (1 of a)"
    removable = what_stands_out([record(name, 0.11, 19.0, number) for number, name in enumerate("abcde")])
    assert removable.endswith("; 10 filters removable (4 of e, 3 of d, 2 of c and others)")
    assert what_stands_out([record("a", None, None, None)]).startswith("no layer's maps are much more similar")


def test_dead_filters_are_counted_beside_removable_ones() -> None:
    layers = [
        record("a", None, None, 2),
        {**record("b", None, None), "dead": 14},
        {**record("c", None, None), "dead": 1},
    ]
    assert what_stands_out(layers).endswith("; 2 filters removable (2 of a); 15 dead (14 of b, 1 of c)")
    assert what_stands_out(layers[1:]).endswith("; 0 filters removable; 15 dead (14 of b, 1 of c)")


def test_only_one_pattern_per_filter_explains_duplicates() -> None:
    layer = {**record("a", 0.2, 18.0, 2), "filters": 64, "groups": 1, "shape": [64, 3, 3, 3], "ncs": 0.962}
    assert (why_duplicates([layer]) or "").startswith("a has duplicates because its ncs is near its lower bound")
    assert why_duplicates([{**layer, "removable": 0}]) is None
    assert why_duplicates([{**layer, "ncs": 0.98}]) is None  # half the way is 0.9726
    assert why_duplicates([{**layer, "ncs": None}]) is None
    assert why_duplicates([{**layer, "shape": [64, 3, 1, 1], "ncs": 1.0}]) is None
    assert why_duplicates([{**layer, "filters": 1}]) is None


def test_layers_are_sorted_by_a_figure_with_null_last() -> None:
    layers = [record("a", 0.2, 18.0), record("b", None, None), record("c", 0.4, 6.0)]
    sort_layers(layers, "fm_corr")
    assert [layer["name"] for layer in layers] == ["c", "a", "b"]
    sort_layers(layers, "-fm_corr")
    assert [layer["name"] for layer in layers] == ["a", "c", "b"]


@pytest.mark.parametrize("by", ["fm_rnk", "-fm_rnk"])
def test_an_unknown_figure_to_sort_by_is_refused_with_a_suggestion(by: str) -> None:
    with pytest.raises(InputError, match=f"`sort` {by}: did you mean 'fm_rank'"):
        sort_layers([], by)
