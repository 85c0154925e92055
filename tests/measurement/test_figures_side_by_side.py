from __future__ import annotations

from typing import Any

import pytest

from convsim_cli.measurement.figures import add_changes, compared_keys, side_by_side


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


@pytest.mark.parametrize("others", [["two"], ["two", "three"]])
def test_reports_without_a_common_layer_are_named(others: list[str]) -> None:
    reports = [report("one", a=1.0), *(report(other, z=1.0) for other in others)]
    assert add_changes(reports) == [f"{other}: has no layer in common with one" for other in others]
