"""What can go wrong, each with the exit code that the command line gives it; and waiting for locks.

A message names an argument of the failing call in backticks (`lr`), never a command-line option: the command line shows
the option of that name instead (--lr). Only a whole command to copy (convsim train --resume RUN) is spelled as typed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

_LISTED = 12  # names in an error, at most
_NAMED = 3  # of a list in a line
PATIENCE = 2.0  # seconds of waiting for another process before a warning


class ConvsimError(Exception):
    """An error reported in one line instead of a traceback; by itself, a failure while running (exit code 1)."""

    exit_code = 1


class InputError(ConvsimError, ValueError):
    """A file, a name or a value that was given cannot be used (exit code 2)."""

    exit_code = 2


class CheckpointError(InputError):
    """A file that cannot be read as a checkpoint, or holds nothing to work on."""


class ReadError(ConvsimError):
    """A file could not be read for a reason outside it: too little memory, too many open files, a failing disk."""


class DownloadError(ConvsimError):
    """Something is not available locally and cannot be downloaded."""


class BusyError(InputError):
    """Another process is working on it."""


class DivergedError(ConvsimError):
    """A loss is no longer finite."""


class RankZeroFailedError(ConvsimError):
    """Rank 0 failed and reports why; this process exits silently with the same code."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__("rank 0 failed")
        self.exit_code = exit_code


class WriteError(ConvsimError):
    """A file could not be written; the former one is intact."""


class ConvsimWarning(UserWarning):
    """A warning that users must see; the command line shows it even when quiet."""


class IrregularFileError(OSError):
    """A pipe, a device or a folder, where a regular file is expected."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EINVAL, "not a regular file", path)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, IrregularFileError for anything but a regular file.

    Nothing else is even opened: a pipe would be waited for, and a device may already act on it.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise IrregularFileError(path)
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)  # another has taken its name since
    raise IrregularFileError(path)


def wait_for_lock(descriptor: int, what: str, shared: bool = False) -> None:
    """Lock an open file or folder; after two seconds, warn that another process holds it.

    what: the other process does, such as `is saving to FOLDER`. shared: let others hold shared locks as well. Raises
    OSError if locks fail.
    """
    lock = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
    warnings.warn(f"waiting for another process that {what}", ConvsimWarning, stacklevel=2)
    fcntl.flock(descriptor, lock)


def brief(error: BaseException) -> str:
    """Return what an error says, in one short line; with the name of its type where it says one word or nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if "int_max_str_digits" in str(error):
        return "a number with thousands of digits"
    said = " ".join(str(error).split())[:200]
    return said if " " in said else ": ".join(filter(None, (type(error).__name__, said)))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory: torch raises RuntimeError.

    Errors of other kinds may quote a file.
    """
    said = ("allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
    from_system = isinstance(error, RuntimeError | OSError)
    return isinstance(error, MemoryError) or (from_system and any(words in str(error) for words in said))


def quoted(path: str | Path) -> str:
    """Return a path as it is typed in a command, where it is no option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for duplicate names. A hook for `json.loads`.

    JSON does not define which of their values counts, and readers differ.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} appears twice")
    return found


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean …?" for the closest known name, or else a list of the first known names.

    prefix: what is typed before a name. The case of letters does not count.
    """
    known = list(known)
    lower = {each.lower(): each for each in known}
    close = get_close_matches(str(name).lower(), lower, n=1)
    if close:
        return f"did you mean {prefix + lower[close[0]]!r}?"
    between = "; " if any("," in each for each in known) else ", "
    more = f"{between}… ({len(known)} in all)" if len(known) > _LISTED else ""
    return f"choose from {between.join(known[:_LISTED])}{more}"


def is_number(value: object, whole: bool = False) -> bool:
    """Return whether a value is a number, including numpy's, in the range of a float unless `whole`; a bool is not."""
    if not isinstance(value, Integral if whole else Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return whole
    return True


def kind_of(value: object) -> str:
    """Return what a value is: "None", "the class Conv2d", "an OrderedDict"."""
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def describe_tensor(tensor: Any) -> str:
    """Return a tensor's dtype and shape: "torch.float32 [2, 3]", after "meta" if it has no values."""
    return f"{'meta ' * tensor.is_meta}{tensor.dtype} {list(tensor.shape)}"


def model_failed(images: str, error: Exception) -> InputError:
    """Return what to raise in place of a model's own error on images, described as by `describe_tensor`."""
    return InputError(
        f"the model fails on images {images} ({brief(error)}); expected a batch [B, C, …] that it accepts"
    )


def one_of(names: Iterable[str]) -> str:
    """Return "a", "a or b", "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def some_of(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are: "a, b, c and 37 more"."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def to_install(extra: str) -> str:
    """Return the command that installs an extra of convsim, from an index and in a clone."""
    return f"pip install 'convsim[{extra}]', or in a clone pip install -e '.[{extra}]'"
