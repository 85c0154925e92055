"""Hidden, locked folders in which new files are made, and the journal that commits a save of several files.

A scratch folder goes through up to three names:

- `.convsim-<random>.tmp` while new files are written to it;
- `.convsim-backup.tmp` while its process chooses the names of backups: one process at a time per folder;
- `.convsim-journal` once every file is complete. The rename commits the save: if the process dies afterwards, the next
  one to open the folder completes the moves.

A locked folder belongs to a running process. The next save removes what a dead one left under the first two names.
"""

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
_TURN = f"{_PREFIX}backup{_SUFFIX}"
_JOURNAL = ".convsim-journal"
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # rename(2): a folder of that name exists and is not empty
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # fsync(2) of a folder, on some file systems
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # link(2), on some file systems
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratch:
    """A locked folder of files that are later moved into its parent folder, each under the name that it has here."""

    def __init__(self, folder: Path) -> None:
        _sweep(folder)
        while True:
            self.path = self._name = folder / f"{_PREFIX}{token_hex(8)}{_SUFFIX}"
            self.path.mkdir(0o700)
            try:
                self._descriptor = os.open(self.path, _FOLDER)
            except FileNotFoundError:  # another process swept it before it was locked
                continue
            except BaseException:
                self.path.rmdir()
                raise
            with suppress(OSError):  # without locks on this file system nobody can sweep either
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if self.path.is_dir():
                return
            os.close(self._descriptor)

    def file_for(self, place: Path) -> Path:
        """Return where the file that goes to `place` is until it is moved."""
        return self.path / place.name

    def holds_file_for(self, place: Path) -> bool:
        """Return whether the file that goes to `place` has not been moved yet."""
        try:  # through the descriptor: another process may already have taken the name of the emptied folder
            os.stat(place.name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def create(self, real: Path) -> BinaryIO:
        """Create the file that goes to `real`, to write and read."""
        mode = 0o600 if real.exists() else 0o666
        descriptor = os.open(self.file_for(real), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            return os.fdopen(descriptor, "w+b")
        except Exception:  # not after an interruption: the file may have closed its descriptor by then
            os.close(descriptor)
            raise

    def keep(self, real: Path, place: Path) -> None:
        """Hold the present file at `real` as the one that goes to `place`."""
        kept = self.file_for(place)
        try:
            os.link(real, kept)
        except OSError:  # no hard links on this file system, or `real` is on another one
            shutil.copy2(real, kept)
            with kept.open("rb") as file:
                os.fsync(file.fileno())

    def keep_if_linkable(self, place: Path) -> Path | None:
        """Hold the present file at `place`, where hard links can be made. Returns its hidden name, None for no file."""
        if not place.exists():
            return None
        name = self.path / f"{_PREFIX}{token_hex(8)}"
        with suppress(OSError):
            os.link(place, name)
        return name

    def take_turn(self) -> None:
        """Wait until no other process chooses names of backups in this folder; none will while this scratch exists.

        On a file system without locks there is no waiting: `move_beside` still overwrites nothing.
        """
        turn = self.path.with_name(_TURN)
        (self.path / f"{_PREFIX}turn").touch()  # rename(2) replaces an empty folder
        while True:
            try:
                self.path = self.path.rename(turn)
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            if not _wait_and_remove(turn):
                break
        finish_save(turn.parent)

    def move(self, place: Path) -> None:
        """Rename a file to its place, over a file that is there."""
        self.file_for(place).replace(place)
        self.file_for(place).unlink(missing_ok=True)  # rename(2) does nothing where both are links to one file

    def move_beside(self, place: Path) -> None:
        """Move a file to its place. Raises FileExistsError, rather than overwrite a file that is there."""
        try:
            os.link(self.file_for(place), place)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.file_for(place).replace(place)  # no other process chooses this name at the same time
        else:
            self.file_for(place).unlink()

    def make_journal(self) -> None:
        """Commit: from now on every file here goes to its place, even if this process dies."""
        flush_folder(self.path)
        while True:
            try:
                self.path = self.path.rename(self.path.with_name(_JOURNAL))
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                finish_save(self.path.parent)
        flush_folder(self.path.parent)

    def unmake_journal(self) -> None:
        """Undo `make_journal`, once no file has been moved or all were moved back."""
        self.path = self.path.rename(self._name)

    def remove(self) -> None:
        """Remove the folder and what it holds, except a journal whose moves the next process has to complete."""
        with suppress(OSError):
            names = _names(self._descriptor)
            if self.path.name != _JOURNAL or all(name.startswith(_PREFIX) for name in names):
                _remove(self.path, self._descriptor)
        os.close(self._descriptor)


def finish_save(folder: Path) -> None:
    """Complete the moves of a dead process's journal; wait for those of a running one. Raises OSError."""
    journal = folder / _JOURNAL
    while True:
        try:
            descriptor = os.open(journal, _FOLDER)
        except FileNotFoundError:
            return
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_still(journal, descriptor):
                continue  # its own process has completed it
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


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where its file system can. Raises OSError."""
    descriptor = os.open(folder, _FOLDER & ~os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Complete what a dead process had committed, and remove the scratch folders that no running process locks."""
    finish_save(folder)
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(path, descriptor):
                    _remove(path, descriptor) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


def _wait_and_remove(turn: Path) -> bool:
    """Wait for the process whose turn it is, and remove what it left if it died. Returns False where locks fail."""
    try:
        descriptor = os.open(turn, _FOLDER)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_still(turn, descriptor):
            _remove(turn, descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether an open file or folder is still the one of this name."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def _remove(folder: Path, descriptor: int) -> None:
    """Remove an open folder with its files. Another process may take its name as soon as it is empty."""
    for name in _names(descriptor):
        os.unlink(name, dir_fd=descriptor)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (*_TAKEN, errno.ENOENT):
            raise


def _names(descriptor: int) -> list[str]:
    with os.scandir(descriptor) as entries:
        return [entry.name for entry in entries]
