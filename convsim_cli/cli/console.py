"""What the screen gets: data on stdout, all else on stderr; rich on a terminal, plain lines and TSV elsewhere."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

Cell = str | int | float | bool | None
Advance = Callable[[int], None]

PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal


class Console:
    """The two streams of a command: what it found, and what it says on the way."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json

    def note(self, message: str) -> None:
        """Say something in passing, on stderr."""
        if not self.quiet:
            say(message)

    def warn(self, message: str) -> None:
        """Say something that must not be missed, on stderr, even when quiet."""
        say(f"convsim: warning: {message}")

    def document(self, command: str, content: dict[str, Any]) -> dict[str, Any]:
        """Return the one JSON document of a command, printed where it was asked for."""
        document = {"schema": 1, "command": command, **content}
        if self.as_json:
            with _while_read():
                print(json.dumps(document, indent=2, allow_nan=False))
        return document

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], **usual: Cell) -> None:
        """Print a table: TSV with a header line where stdout is no terminal.

        usual: columns that a terminal is spared where every row has this value.
        """
        if not is_terminal(sys.stdout):
            return self.delimited(columns, rows, "\t")
        plain = [
            index
            for index, column in enumerate(columns)
            if column in usual and all(row[index] == usual[column] for row in rows)
        ]
        kept = [index for index in range(len(columns)) if index not in plain]
        self._rich_table([columns[index] for index in kept], [[row[index] for index in kept] for row in rows])

    def delimited(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], delimiter: str) -> None:
        """Print a header line and rows, their numbers in six digits."""
        with _while_read():
            writer = csv.writer(sys.stdout, delimiter=delimiter, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([printable(show(cell, digits=6)) for cell in row] for row in rows)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Advance]:
        """Show how far a loop of `total` steps has come, with the time left; give the function that advances it."""
        if self.quiet or not total:
            yield lambda steps: None
        elif is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
            with _bar() as bar:
                task = bar.add_task(printable(description), total=total)
                yield lambda steps: bar.advance(task, steps)
        else:
            yield _PlainProgress(printable(description), total)

    @contextmanager
    def epochs(self, total: int) -> Iterator[EpochScreen]:
        """Show a training run: its phases as a bar, its epochs as lines."""
        screen = EpochScreen(self, total)
        try:
            yield screen
        finally:
            screen.close()

    def _rich_table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        from rich import box
        from rich.console import Console as RichConsole
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            numeric = any(isinstance(row[index], int | float) for row in rows)
            header = Text(re.sub("_(before|after|published|measured|fixed_norms)$", r"\n\1", column))
            table.add_column(header, justify="right" if numeric else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(printable(show(cell, digits=4))) for cell in row))
        screen = RichConsole()
        needed = Measurement.get(screen, screen.options.update(max_width=10_000), table).maximum
        screen = RichConsole(
            width=max(screen.width, needed)
        )  # numbers and names are never cut: the terminal wraps them
        screen.print(table)


class EpochScreen:
    """What a training run tells: a bar per phase on a terminal, and a line per epoch with the time left."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._seconds: list[float] = []
        self._stack = ExitStack()
        self._advance: Advance = lambda steps: None

    def phase(self, name: str, steps: int) -> None:
        """Begin a phase of so many steps."""
        self.close()
        live = is_terminal(sys.stderr) or name == "init"  # elsewhere an epoch is one line, when it has ended
        self._advance = self._stack.enter_context(self._console.progress(name, steps if live else 0))

    def advance(self, steps: int) -> None:
        """Advance the phase."""
        self._advance(steps)

    def row(self, row: dict[str, Any]) -> None:
        """Say how an epoch ended."""
        self.close()
        self._seconds.append(row["seconds"])
        left = duration((self._total - row["epoch"]) * sum(self._seconds) / len(self._seconds))
        self._console.note(
            f"epoch {row['epoch']:>{len(str(self._total))}}/{self._total}  "
            f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f} %  "
            f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:5.2f} %  "
            f"L_CS {row['cs']:.4g}  {row['seconds']:.1f} s, {left} left"
        )

    def close(self) -> None:
        """End the phase that is shown."""
        self._stack.close()


class _PlainProgress:
    """One line per ten seconds."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._start = self._said = time.monotonic()

    def __call__(self, steps: int) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._said >= PLAIN_EVERY:
            self._said = now
            left = (now - self._start) * (self._total - self._done) / max(self._done, 1)
            share = 100 * self._done / self._total
            say(f"{self._description}: {share:.0f} %, {duration(left)} left")


def say(message: str) -> None:
    """Print a line on stderr for as long as somebody reads it; work goes on without a listener."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def _while_read() -> Iterator[None]:
    """Write to stdout for as long as somebody reads it: `convsim … | head` has had enough, which is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(cell: Cell, digits: int) -> str:
    """Return a cell as text: floats in so many significant digits, null as an empty cell, truth as true and false."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    return f"{cell:.{digits}g}" if isinstance(cell, float) else str(cell)


def shape(sizes: Sequence[int]) -> str:
    """Return a shape as 64×3×3×3."""
    return "×".join(map(str, sizes))


def duration(seconds: float) -> str:
    """Return a duration as 45 s, 3 min 20 s or 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def printable(text: str) -> str:
    """Return text with control characters spelled out: a file's names do not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal."""
    return stream.isatty()


def _bar() -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=RichConsole(stderr=True), transient=True)
