"""The hidden, locked folders in which new files are made, and the journal that ends a save that was cut short."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

_PREFIX, _SUFFIX = ".convsim-", ".tmp"
_JOURNAL = ".convsim-journal"
_NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what some file systems answer to the flush of a folder
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratch:
    """A locked folder for what is going to be moved up into the folder that it is in, under the same name."""

    def __init__(self, folder: Path) -> None:
        _sweep(folder)
        while True:
            self.path = self._name = folder / f"{_PREFIX}{token_hex(8)}{_SUFFIX}"
            self.path.mkdir(0o700)
            try:
                self._descriptor = os.open(self.path, _FOLDER)
            except FileNotFoundError:  # swept between its creation and its lock
                continue
            except BaseException:
                self.path.rmdir()
                raise
            with suppress(OSError):  # where locks are not offered nobody can sweep
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if self.path.is_dir():
                return
            os.close(self._descriptor)

    def holds(self, place: Path) -> Path:
        """Return where the file that goes to this place is now."""
        return self.path / place.name

    def create(self, real: Path) -> BinaryIO:
        mode = 0o600 if real.exists() else 0o666
        descriptor = os.open(self.holds(real), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            return os.fdopen(descriptor, "w+b")
        except BaseException:
            os.close(descriptor)
            raise

    def keep(self, real: Path, name: str) -> None:
        """Hold the former file, too, under the name that it is kept by."""
        kept = self.path / name
        try:
            os.link(real, kept)
        except OSError:  # no hard links here, or another file system
            shutil.copy2(real, kept)
            with kept.open("rb") as file:
                os.fsync(file.fileno())

    def second_name(self, place: Path) -> Path | None:
        """Hold what is in a place now, as far as links can be made. Returns under which name, None for nothing."""
        if not place.exists():
            return None
        name = self.path / f"{_PREFIX}{token_hex(8)}"
        with suppress(OSError):
            os.link(place, name)
        return name

    def make_journal(self) -> None:
        """Say that all is going to be moved, whatever happens."""
        flush_folder(self.path)
        while True:
            try:
                self.path = self.path.rename(self.path.with_name(_JOURNAL))
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                finish_save(self.path.parent)
        flush_folder(self.path.parent)

    def unmake_journal(self) -> None:
        self.path = self.path.rename(self._name)

    def remove(self) -> None:
        """Remove it with all that it holds, except where the next one has to end the moves."""
        with suppress(OSError):
            if self.path.name != _JOURNAL or all(path.name.startswith(_PREFIX) for path in self.path.iterdir()):
                _remove(self.path)
        os.close(self._descriptor)


def finish_save(folder: Path) -> None:
    """Put in place the files that a killed process left in its journal; wait for a living one. Raises OSError."""
    journal = folder / _JOURNAL
    while True:
        try:
            descriptor = os.open(journal, _FOLDER)
        except FileNotFoundError:
            return
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not (journal.exists() and os.path.samestat(journal.stat(), os.fstat(descriptor))):
                continue  # its own process has ended it
            for path in journal.iterdir():
                place = folder / path.name
                if path.name.startswith(_PREFIX) or (place.exists() and place.samefile(path)):
                    path.unlink()
                else:
                    path.replace(place)
            flush_folder(folder)
            with suppress(OSError):
                journal.rmdir()
        finally:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """End what a killed process had begun, and remove what it left behind: the hidden folders that nobody locks."""
    finish_save(folder)
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, _FOLDER & ~os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)
