"""What can go wrong, each with the exit code that the command line gives it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConvsimError(Exception):
    """Anything that convsim says in one line instead of a traceback: it failed while running (exit code 1)."""

    exit_code = 1


class InputError(ConvsimError, ValueError):
    """What was given cannot be used: a file, a name, a value (exit code 2)."""

    exit_code = 2


class CheckpointError(InputError):
    """A file that cannot be read as a checkpoint, or holds nothing to work on."""


class BusyError(InputError):
    """Another process is working on it."""


class DivergedError(ConvsimError):
    """A loss stopped being a finite number."""


class FollowedError(ConvsimError):
    """The leading process of a run has failed, and says why: this one ends as it does, without a word."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__("the leading process failed")
        self.exit_code = exit_code


class WriteError(ConvsimError):
    """A file could not be written; the former one is intact."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean …?" for the closest known name, or the list of all that are known."""
    known = list(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
