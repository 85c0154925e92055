"""Picture files: the formats that a suffix chooses, and which files a picture may replace.

matplotlib is the extra `plot`. Importing this module imports neither it nor torch: help texts are made from its table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convsim_cli.checkpoints.atomic import check_regular, replace_file
from convsim_cli.errors import InputError, one_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200


@dataclass(frozen=True)
class PictureFormat:
    """A picture format, under matplotlib's name.

    recognizes: takes a file's first 4,096 bytes. metadata: without the date, so that equal figures give equal files.
    """

    name: str
    recognizes: Callable[[bytes], bool]
    metadata: dict[str, None]


PICTURES = {  # by suffix
    ".png": PictureFormat("png", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), {}),
    ".pdf": PictureFormat("pdf", lambda start: start.startswith(b"%PDF-"), {"CreationDate": None}),
    ".svg": PictureFormat("svg", lambda start: start.lstrip()[:1] == b"<" and b"<svg" in start, {"Date": None}),
}


def require_matplotlib() -> None:
    """Raise InputError, saying what to install, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("figures need matplotlib, which is not installed: pip install matplotlib") from error


def check_picture(path: Path) -> None:
    """Raise InputError, before any work is done, for a name under which no picture can be saved.

    A picture replaces only a picture of its own format, or an empty file, and creates no folder.
    """
    known = one_of(PICTURES)
    if path.suffix.lower() not in PICTURES:
        raise InputError(f"{path}: expected a name that ends in {known}")
    check_regular(path, f"a {known}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it first")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise InputError(f"{path}: exists and cannot be read ({error.strerror}); name a new file") from error
    if start and not PICTURES[path.suffix.lower()].recognizes(start):
        raise InputError(f"{path}: exists and is no {path.suffix[1:].upper()} picture; name a new file")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its suffix says. Raises as `check_picture`, and WriteError."""
    from matplotlib import rc_context

    check_picture(path)
    picture = PICTURES[path.suffix.lower()]
    with rc_context({"svg.hashsalt": "convsim"}):  # the ids in an SVG are random otherwise
        replace_file(path, lambda file: figure.savefig(file, format=picture.name, dpi=DPI, metadata=picture.metadata))
