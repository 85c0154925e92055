"""The tables of the paper's experiments: columns and rows, from the rows of their JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convsim_cli.cli.console import duration
from convsim_cli.cli.tables import Least

Table = tuple[list[str], list[list[Any]]]

LEAST: Least = (  # columns that a narrow terminal does without, in the order in which they go
    ("increase_published", "increase_measured"),
    ("decrease_published", "decrease_measured"),
    "reduction_fixed_norms",
    ("cos_before", "cos_after", "cos_after_fixed_norms"),
    *("time", "epochs", "cs", "epochs_to_99", "train_accuracy", "mean_last5"),
    ("baseline_last", "init_last"),
)


def numerical_table(rows: list[dict[str, Any]]) -> Table:
    """Return Table 1, 2, 3 or 6, with the figures at fixed norms."""
    figures = ("correlation", "reduction", "decrease", "increase")
    columns = ["N", "optimizer", *(f"{figure}_{side}" for figure in figures for side in ("published", "measured"))]
    columns += ["cos_before", "cos_after", "cos_after_fixed_norms", "reduction_fixed_norms"]
    table = []
    for row in rows:
        cells: list[Any] = [row["N"], row["optimizer"]]
        cells += [_cell(row[side], figure) for figure in figures for side in ("published", "measured")]
        cells += [row["measured"]["cos_before"], row["measured"]["cos_after"]]
        table.append([*cells, row["fixed_norms"]["cos_after"], row["fixed_norms"]["reduction_frequency"]])
    return columns, table


def _cell(found: dict[str, float | None], figure: str) -> str | float | None:
    if figure == "reduction":
        return found["reduction_frequency"]
    return _spread(found[f"{figure}_mean"], found[f"{figure}_std"], 3)


def _spread(mean: float | None, std: float | None, digits: int) -> str | None:
    if mean is None:
        return None
    return f"{mean:.{digits}g}" + ("" if std is None else f" ± {std:.2g}")


_LAST = ("epochs_to_99", "cs", "time", "epochs", "diverged")


def _arms_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["arch", "arm", "published", "best_test_accuracy", "last_test_accuracy", "mean_last5", "train_accuracy"]
    return [*columns, *_LAST], [
        [row["arch"], row["arm"], row["published"]["test_accuracy"], *_measured(row["measured"])] for row in rows
    ]


def _measured(found: dict[str, Any]) -> list[Any]:
    keys = ("best_test_accuracy", "last_test_accuracy", "mean_last5_test_accuracy", "last_train_accuracy")
    spreads = [_spread(found[key], found[f"{key}_std"], 4) for key in keys]
    time = None if found["seconds"] is None else duration(found["seconds"])
    return [*spreads, found["epochs_to_99"], found["cs"], time, found["epochs"], found["diverged"]]


def _curves_table(rows: list[dict[str, Any]]) -> Table:
    column = next(key for key in ("cs", "train_loss", "train_accuracy") if key in rows[0])
    return ["arch", "arm", "seed", "epochs", f"first_{column}", f"last_{column}"], [
        [
            row["arch"],
            row["arm"],
            row["seed"],
            len(row[column]),
            *(row[column][i] if row[column] else None for i in (0, -1)),
        ]
        for row in rows
    ]


def _grid_table(rows: list[dict[str, Any]]) -> Table:
    return ["lr", "batch_size", "gain_published", "gain_measured", "baseline", "init", "baseline_last", "init_last"], [
        [row["lr"], row["batch_size"], row["published"]["gain"], row["measured"]["gain"]]
        + [
            _spread(row["measured"][side][key], row["measured"][side][f"{key}_std"], 4)
            for key in ("best_test_accuracy", "last_test_accuracy")
            for side in ("baseline", "init")
        ]
        for row in rows
    ]


def _iterations_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["iterations", "best_test_accuracy", "last_test_accuracy", "mean_last5", "train_accuracy"]
    return [*columns, *_LAST], [[row["iterations"], *_measured(row["measured"])] for row in rows]


EXPERIMENT_TABLES: dict[str, Callable[[list[dict[str, Any]]], Table]] = {
    "table5": _arms_table,
    "figure1": _curves_table,
    "figure2": _curves_table,
    "figure3": _curves_table,
    "figure4": _grid_table,
    "figure5": _iterations_table,
}
