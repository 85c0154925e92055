"""Hidden, locked folders in which new files are made.

A scratch folder goes through up to three names:

- `.convsim-<16 hexadecimal digits>.tmp` while new files are written to it;
- `.convsim-backup.tmp` while its process chooses the names of backups: one process at a time per folder;
- `.convsim-journal` once every file of a save of several is complete. The rename commits the save (`journal`).

A locked folder belongs to a running process. The next save removes what a dead process of the same user left under the
first two names. It opens nothing but folders, and touches no other names that begin or end like these.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from convsim_cli.checkpoints.journal import (
    FOLDER,
    JOURNAL,
    TAKEN,
    ForeignJournalError,
    complete_save,
    flush_folder,
    is_hidden,
    is_still,
    list_names,
    remove_folder,
    wait_for_lock,
    warn_of_foreign,
    write_manifest,
)

_TURN = ".convsim-backup.tmp"
_NAME = re.compile(r"\.convsim-(?:[0-9a-f]{16}|backup)\.tmp")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # link(2), on some file systems


class Scratch:
    """A locked folder of files that are later moved into its parent folder, each under the name that it has here."""

    def __init__(self, folder: Path) -> None:
        _sweep(folder)
        while True:
            self.path = self._name = folder / f".convsim-{token_hex(8)}.tmp"
            self.path.mkdir(0o700)
            try:
                self._descriptor = os.open(self.path, FOLDER)
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
        name = self.path / f".convsim-{token_hex(8)}"
        with suppress(OSError):
            os.link(place, name)
        return name

    def take_turn(self) -> None:
        """Wait until no other process chooses names of backups in this folder; none will while this scratch exists.

        There is no waiting on a file system without locks, nor for what another user has put there under that name:
        `move_beside` still overwrites nothing.
        """
        turn = self.path.with_name(_TURN)
        (self.path / ".convsim-turn").touch()  # rename(2) replaces an empty folder
        while True:
            try:
                self.path = self.path.rename(turn)
                break
            except OSError as error:
                if error.errno not in TAKEN and not os.path.lexists(turn):
                    raise
            if not _wait_and_remove(turn):
                break
        _complete_or_warn(turn.parent)

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
        write_manifest(self.path.parent, self._descriptor)
        flush_folder(self.path)
        journal = self.path.with_name(JOURNAL)
        while True:
            try:
                self.path = self.path.rename(journal)
                break
            except OSError as error:
                if error.errno not in TAKEN and not os.path.lexists(journal):
                    raise
                complete_save(journal.parent)
        flush_folder(journal.parent)

    def unmake_journal(self) -> None:
        """Undo `make_journal`, once no file has been moved or all were moved back."""
        self.path = self.path.rename(self._name)

    def remove(self) -> None:
        """Remove the folder and what it holds, except a journal whose moves the next process has to complete."""
        with suppress(OSError):
            if self.path.name != JOURNAL or all(is_hidden(name) for name in list_names(self._descriptor)):
                remove_folder(self.path, self._descriptor)
        os.close(self._descriptor)


def _complete_or_warn(folder: Path) -> None:
    try:
        complete_save(folder)
    except ForeignJournalError as foreign:
        warn_of_foreign(str(foreign))


def _sweep(folder: Path) -> None:
    """Complete what a dead process had committed, and remove the scratch folders that no running process locks."""
    _complete_or_warn(folder)
    for path in folder.glob(".convsim-*.tmp"):
        if not _NAME.fullmatch(path.name):
            continue
        with suppress(OSError):
            descriptor = os.open(path, FOLDER)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_own(descriptor) and is_still(path, descriptor):
                    remove_folder(path, descriptor)
            finally:
                os.close(descriptor)


def _wait_and_remove(turn: Path) -> bool:
    """Wait for the process whose turn it is, and remove what it left if it died.

    Returns False where locks fail, or where that name is not a scratch folder of this user.
    """
    try:
        descriptor = os.open(turn, FOLDER)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not _is_own(descriptor):
            return False
        wait_for_lock(descriptor, turn.parent)
        if is_still(turn, descriptor):
            remove_folder(turn, descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_own(descriptor: int) -> bool:
    return os.fstat(descriptor).st_uid == os.geteuid()
