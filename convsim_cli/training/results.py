"""A run's `results.csv`: one row per epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.errors import InputError

COLUMNS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "cs", "seconds")
VALIDATION_COLUMNS = ("validation_loss", "validation_accuracy")  # of a run with validation images, after the others
FILE = "results.csv"
LAST_EPOCHS = 5  # that the mean of the last test accuracies is over
Row = dict[str, Any]


def read_results(folder: Path) -> list[Row]:
    """Return a run's results as rows of numbers. Raises InputError if there are none, or the file is damaged."""
    try:
        with (folder / FILE).open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = tuple(reader.fieldnames or ())
            if columns not in (COLUMNS, COLUMNS + VALIDATION_COLUMNS):
                raise ValueError(f"its columns are {reader.fieldnames}")
            return [{key: int(row[key]) if key == "epoch" else float(row[key]) for key in columns} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{folder}: not a run's folder (no readable {FILE}: {error})") from error


def write_results(folder: Path, history: Sequence[Row], validated: bool = False) -> None:
    """Replace a run's results. validated: whether it has validation images. Raises WriteError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS + VALIDATION_COLUMNS * validated, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    data = text.getvalue().encode()
    replace_file(folder / FILE, lambda file: file.write(data))


def best_row(history: Sequence[Row]) -> Row:
    """Return the row of the best epoch, by validation accuracy if there is one; the first if several are equal."""
    return max(history, key=lambda row: row["validation_accuracy" if "validation_accuracy" in row else "test_accuracy"])


def epochs_done(folder: Path) -> int:
    """Return how many whole epochs a run has in its results, 0 if it has none yet."""
    return len(read_results(folder)) if (folder / FILE).exists() else 0
