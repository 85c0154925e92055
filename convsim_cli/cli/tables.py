"""Tables on a terminal: side by side where they fit, without their least important columns, or stacked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, TextIO

Least = Sequence[str | tuple[str, ...]]  # columns in the order in which they are left out; a tuple goes together

GAP = 3  # characters between two columns
EDGES = 2  # characters left and right of a table
_SECOND_LINE = re.compile(
    "_(before|after|published|measured|fixed_norms|accuracy|last5|to_99|random|change|difference)$"
)  # of a header


def header_lines(column: str) -> list[str]:
    """Return a column's header, in two lines where its name has a common ending."""
    return _SECOND_LINE.sub(r"\n\1", column).split("\n")


def fitting_columns(widths: Sequence[int], least: Sequence[Sequence[int]], screen: int) -> list[int] | None:
    """Return the columns to show on a screen, by index; None where they do not fit even without all of `least`.

    widths: characters of each column; least: groups of columns in the order in which they are left out.
    """
    kept = list(range(len(widths)))
    for group in [(), *least]:
        kept = [index for index in kept if index not in group]
        if sum(widths[index] for index in kept) + GAP * (len(kept) - 1) + EDGES <= screen:
            return kept
    return None


def choose_columns(
    columns: Sequence[str], cells: Sequence[Sequence[str]], least: Least, screen: int
) -> list[int] | None:
    """Return the columns of a table of texts to show on a screen (`fitting_columns`)."""
    from rich.cells import cell_len

    widths = [
        max(map(cell_len, [*header_lines(column), *(row[index] for row in cells)]))
        for index, column in enumerate(columns)
    ]
    groups = [(names,) if isinstance(names, str) else names for names in least]
    return fitting_columns(widths, [[columns.index(n) for n in names if n in columns] for names in groups], screen)


def screen_width(stream: TextIO) -> int:
    """Return the width in characters of the terminal that a stream is; 80 where it does not say."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def make_table(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> Any:
    """Return a rich table; its cells are never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(Text("\n".join(header_lines(column))), justify="right" if right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def stacked(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose rows do not fit beside each other: a line per cell, an empty one per row."""
    width = max(map(len, columns))
    lines = []
    for row in cells:
        lines += [f"{column:<{width}}  {cell}".rstrip() for column, cell in zip(columns, row, strict=True) if cell]
        lines.append("")
    return lines[:-1]
