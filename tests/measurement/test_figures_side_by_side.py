from __future__ import annotations

from typing import Any

import pytest

from convsim_cli.measurement.figures import add_changes, compared_keys, side_by_side, what_changed


def report(source: str, **layers: float | None) -> dict[str, Any]:
    records = [{"name": name, **dict.fromkeys(compared_keys(), value)} for name, value in layers.items()]
    return {"source": source, "layers": records}


def test_layers_have_their_change_from_the_first_report() -> None:
    reports = [report("one", a=1.0, b=2.0), report("two", b=2.5, a=0.5, c=1.0), report("three", a=None)]
    assert add_changes(reports) == []
    for key in compared_keys():
        changes = [{layer["name"]: layer[f"{key}_change"] for layer in found["layers"]} for found in reports]
        assert changes == [{"a": None, "b": None}, {"b": 0.5, "a": -0.5, "c": None}, {"a": None}]


def test_rows_of_one_layer_stand_together_in_the_order_of_the_first_report() -> None:
    reports = [report("one", a=1.0, b=2.0), report("two", b=2.5, c=1.0, a=0.5)]
    rows = [(found["source"], layer["name"]) for found, layer in side_by_side(reports)]
    assert rows == [("one", "a"), ("two", "a"), ("one", "b"), ("two", "b"), ("two", "c")]


def test_names_that_differ_by_a_common_prefix_are_paired() -> None:
    reports = [report("one", **{"x.a": 1.0, "x.b": 2.0}), report("two", **{"module.x.a": 3.0, "module.x.b": 4.0})]
    assert add_changes(reports) == []
    assert [layer["ncs_change"] for layer in reports[1]["layers"]] == [2.0, 2.0]
    assert [layer["name"] for _, layer in side_by_side(reports)] == ["x.a", "module.x.a", "x.b", "module.x.b"]


def test_what_changed_is_a_median_over_the_layers_of_both() -> None:
    first, second = report("one", a=1.0, b=0.5, c=None, d=3.0), report("two", a=0.5, b=0.4, c=2.0, e=9.0)
    for layer, norm in zip(first["layers"], (10.0, 2.0, 0.0, 1.0), strict=True):
        layer["norm"] = norm
    for layer, norm, turned in zip(second["layers"], (6.0, 1.6, 1.0, 8.0), (30.0, 40.0, None, None), strict=True):
        layer |= {"norm": norm, "turned": turned}
    add_changes([first, second])
    assert what_changed(first, second) == "median turned 35°, norm −30 %, fm_corr −0.3"
    assert what_changed(first, report("other", z=1.0)) == ""


@pytest.mark.parametrize("others", [["two"], ["two", "three"]])
def test_reports_without_a_common_layer_are_named(others: list[str]) -> None:
    reports = [report("one", a=1.0), *(report(other, z=1.0) for other in others)]
    assert add_changes(reports) == [f"{other}: has no layer in common with one" for other in others]
