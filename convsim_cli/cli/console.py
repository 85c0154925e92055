"""What the screen gets: data on stdout, all else on stderr; rich on a terminal, plain lines and TSV elsewhere.

A terminal's table is shown whole where it fits, else without its least important columns, else with names on lines of
their own, else stacked: a line per figure. Names and numbers are never cut.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EBADF
from textwrap import wrap
from typing import Any, TextIO

from convsim_cli import __version__

Cell = str | int | float | bool | None
Least = Sequence[str | tuple[str, ...]]  # columns in the order in which they are left out; a tuple goes together

PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal
GAP, TIGHT_GAP = 3, 2  # characters between two columns; those of a table with names above its rows
EDGES = 2  # characters left and right of a table
_SECOND_LINE = re.compile(
    "_(before|after|published|measured|fixed_norms|per_epoch|done|accuracy|last5|to_99|random|change|difference)$"
)  # of a header

_COMMAND = re.compile(  # to copy: up to a comma, a semicolon or a bracket outside quotes
    r"""(convsim (init|measure|train|compare|reproduce|plot)|pip install|python -c|torchrun)"""
    r"""( ('[^']*'|"[^"]*"|[^\s,;()'"])+)+"""
)


class Console:
    """The two streams of a command: what it found, and what it says on the way.

    wide: show all columns.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, wide: bool = False) -> None:
        self.quiet = quiet
        if quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of downloads from the Hub
        self.as_json = as_json
        self.wide = wide

    def note(self, message: str) -> None:
        """Print a note on stderr, unless quiet."""
        if not self.quiet:
            say(message)

    def note_fitting(self, *messages: str) -> None:
        """Print the first message that fits the terminal, or else the last; without a terminal, the first."""
        width = screen_width(sys.stderr) if is_terminal(sys.stderr) else max(map(len, messages))
        self.note(next((message for message in messages if len(message) <= width), messages[-1]))

    def warn(self, message: str) -> None:
        """Print a warning on stderr, even when quiet."""
        say(f"convsim: warning: {message}")

    def document(self, command: str, content: dict[str, Any]) -> dict[str, Any]:
        """Print a command's JSON document with --json, and return it. Write what it names before."""
        document = make_document(command, content)
        if self.as_json:
            with _while_read():
                print(json.dumps(document, indent=2, allow_nan=False))
        return document

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        least: Least = (),
        above: int = 1,
        **usual: Cell,
    ) -> None:
        """Print a table; as TSV with a header line if stdout is not a terminal.

        least: the columns that a terminal does without where they do not fit, in the order in which they go; where the
        others do not fit either, the first `above` columns, which name a row, stand above it. usual: columns that it is
        spared where every row has this value.
        """
        if not self.is_screen:
            return self.delimited(columns, rows, "\t")
        kept = [
            index
            for index, column in enumerate(columns)
            if column not in usual or any(row[index] != usual[column] for row in rows)
        ]
        shown = [[row[index] for index in kept] for row in rows]
        self._on_screen([columns[index] for index in kept], shown, least, above)

    def _on_screen(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], least: Least, above: int) -> None:
        from rich import box
        from rich.cells import cell_len
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        cells = [[printable(show(cell, digits=4)) for cell in row] for row in rows]
        headers = [_SECOND_LINE.sub(r"\n\1", column) for column in columns]
        widths = [
            max(map(cell_len, [*header.split("\n"), *(row[index] for row in cells)]))
            for index, header in enumerate(headers)
        ]
        groups = [(names,) if isinstance(names, str) else names for names in least]
        by_index = [[columns.index(name) for name in names if name in columns] for names in groups]
        screen = 10_000 if self.wide else screen_width(sys.stdout)  # the terminal wraps what is wider
        kept = fitting_columns(widths, by_index, screen)
        name_above = bool(rows) and kept is None and len(columns) > above and max(widths[:above]) + EDGES <= screen
        above, gap = (above, TIGHT_GAP) if name_above else (0, GAP)
        if name_above:
            kept = fitting_columns([0] * above + widths[above:], by_index, screen + above * gap, gap)
        if kept is None:
            self.note(f"the table is wider than {screen} characters: one line per value (--wide shows the table)")
            with _while_read():
                print("\n".join(_stacked(columns, cells)))
            return
        if left_out := [column for index, column in enumerate(columns) if index not in kept]:
            self.note(f"hidden to fit {screen} characters: {', '.join(left_out)} (--wide shows all)")
        rich = RichConsole(width=screen, height=100)  # a dumb terminal is given its width only with a height
        rule = box.SIMPLE_HEAD  # rich would replace it by a frame where the encoding has no lines
        if rich.options.ascii_only:
            rule = box.Box(str(rule).replace("─", "-"), ascii=True)
        table = Table(box=rule, padding=(0, gap - 2, 0, 1), pad_edge=False)
        for index in kept[above:]:
            right = any(isinstance(row[index], int | float) for row in rows)
            table.add_column(Text(headers[index]), justify="right" if right else "left", no_wrap=True)
        for row in cells:
            table.add_row(*(Text(row[index]) for index in kept[above:]))
        with _while_read():
            if not name_above:
                return rich.print(table)
            with rich.capture() as drawn:
                rich.print(table)
            lines = drawn.get().rstrip().split("\n")
            print("\n".join(lines[: -len(cells)]))
            for row, line in zip(cells, lines[-len(cells) :], strict=True):
                names = "  ".join(row[:above])
                print("\n ".join([" " + names] if len(names) + EDGES <= screen else [" " + row[0], *row[1:above]]))
                print(line)

    def delimited(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], delimiter: str) -> None:
        """Print a header line and rows, their numbers in six digits."""
        with _while_read():
            writer = csv.writer(sys.stdout, delimiter=delimiter, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([printable(show(cell, digits=6)) for cell in row] for row in rows)

    @property
    def is_screen(self) -> bool:
        """Whether tables go to a terminal."""
        return is_terminal(sys.stdout)

    @property
    def live(self) -> bool:
        """Whether a bar can be drawn: stderr is a terminal that can move its cursor."""
        return not self.quiet and is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    @contextmanager
    def progress(self, description: str, total: float) -> Iterator[Progress]:
        """Show the progress of a loop of `total` steps, with the time left; yield a function that advances it."""
        bar = _make_bar() if self.live and total else None
        if bar is not None and not _is_drawn(bar.start):
            bar = None
        try:
            yield Progress(description, 0 if self.quiet else total, bar)
        finally:
            if bar is not None:
                _is_drawn(bar.stop)


def make_document(command: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return a command's JSON document."""
    return {"schema": 2, "command": command, **content, "version": __version__}


class Progress:
    """Progress of a task: called with the number of steps done. Without a total, nothing is shown.

    bar: rich's, on a terminal; otherwise a line is printed every ten seconds.
    """

    def __init__(self, description: str = "", total: float = 0.0, bar: Any = None) -> None:
        self._description, self._total, self._done = printable(description), total, 0.0
        self._bar, self._task = bar, None if bar is None else bar.add_task(self._description, total=total)
        self._start = self._said = time.monotonic()

    def __call__(self, steps: float) -> None:
        self._done += steps
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task, steps)
        elif self._total and now - self._said >= PLAIN_EVERY:
            self._said = now
            say(f"{self._description}: {remaining(self._done, self._total, now - self._start)}")

    def describe(self, description: str) -> None:
        """Set the bar's description."""
        if self._bar is not None:
            self._bar.update(self._task, description=printable(description))


def _is_drawn(draw: Callable[[], object]) -> bool:
    """Draw on stderr, and return whether that works; a terminal that was closed gets nothing more."""
    try:
        draw()
    except OSError:
        _silence(sys.stderr)
        return False
    return True


def _make_bar() -> Any:
    from rich import progress
    from rich.console import Console as RichConsole
    from rich.table import Column
    from rich.text import Text

    class Remaining(progress.ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(remaining(task.completed, task.total, task.elapsed or 0.0))

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        Remaining(Column(no_wrap=True)),
    )
    return progress.Progress(*columns, console=RichConsole(stderr=True), transient=True)


def fitting_columns(
    widths: Sequence[int], least: Sequence[Sequence[int]], screen: int, gap: int = GAP
) -> list[int] | None:
    """Return the columns to show on a screen, by index; None if they do not fit even without all of `least`.

    widths: characters of each column; least: groups of columns in the order in which they are left out; gap: characters
    between two columns.
    """
    kept = list(range(len(widths)))
    for group in [(), *least]:
        kept = [index for index in kept if index not in group]
        if sum(widths[index] for index in kept) + gap * (len(kept) - 1) + EDGES <= screen:
            return kept
    return None


def _stacked(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose rows do not fit beside each other: a line per cell, an empty one per row."""
    width = max(map(len, columns))
    lines = []
    for row in cells:
        lines += [f"{column:<{width}}  {cell}".rstrip() for column, cell in zip(columns, row, strict=True) if cell]
        lines.append("")
    return lines[:-1]


def say(message: str) -> None:
    """Print a line on stderr; a closed stderr is ignored.

    A terminal's lines end between words, and never in a command to copy.
    """
    text = printable(message)
    if is_terminal(sys.stderr):
        whole = _COMMAND.sub(lambda found: found[0].replace(" ", "\0"), text)
        lines = wrap(whole, screen_width(sys.stderr), break_long_words=False, break_on_hyphens=False)
        text = "\n".join(lines).replace("\0", " ")
    try:
        if sys.stderr is not None:  # as Python has it where it was closed
            print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


@contextmanager
def _while_read() -> Iterator[None]:
    """Write to stdout for as long as somebody reads it: `convsim … | head` has had enough, which is no failure.

    Raises WriteError if it cannot be written for another reason: a full disk, or a stream that was closed.
    """
    try:
        if sys.stdout is None:  # as Python has it where it was closed
            raise OSError(EBADF, os.strerror(EBADF))
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        from convsim_cli.errors import WriteError

        if sys.stdout is not None:
            _silence(sys.stdout)
        why = error.strerror or error
        raise WriteError(
            f"standard output: cannot be written ({why}); result files, if any, were still written"
        ) from error


def _silence(stream: TextIO) -> None:
    """Send what is still to come nowhere, so that the interpreter does not fail at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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


def remaining(done: float, total: float, seconds: float) -> str:
    """Return how far something has come in so many seconds, and from 5 % on the time left at this pace."""
    left = f", {duration(seconds * (total - done) / done)} left" if done and done >= 0.05 * total else ""
    return f"{100 * done / total:.0f} %{left}"


def printable(text: str) -> str:
    """Return text with control characters spelled out: a file's names do not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; one that was closed is none."""
    return stream is not None and stream.isatty()


def screen_width(stream: TextIO) -> int:
    """Return the width in characters of the terminal that a stream is; 80 where it does not say."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and len(given) < 10 and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
