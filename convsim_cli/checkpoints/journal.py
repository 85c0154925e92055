"""Hidden, locked folders in which new files are made, and the journal that commits a save of several files.

A scratch folder lies in the folder that it writes to, and goes through up to three names:

- `.convsim-<16 hexadecimal digits>.tmp` while new files are written to it;
- `.convsim-backup.tmp` while its process chooses the names of backups: one process at a time per folder;
- `.convsim-journal` once every file of a save of several is complete. This rename commits the save: every file then
  moves to its place in the parent folder, and the emptied journal is removed.

A locked folder belongs to a running process, and others wait for it. If the process dies before the commit, the next
save removes what it left; it opens nothing but folders of this user, and touches no other names that begin or end like
these. If it dies after the commit, the journal stays. Commands that write to the folder complete its moves first;
commands that read it end with an error, because reading never writes.

A journal replaces files, so it is trusted only if convsim made it in this very folder:

- It is a folder, not a link, that belongs to this user and that nobody else may write to.
- Its `.convsim-manifest` names the inode of the parent folder, of the journal, and of each file, with the file's size
  and digest. A copy, unpacked from an archive for example, has other inodes. Device numbers are left out: they may
  change when a disk is mounted again, and a crash of the machine is what journals are for.
- Every file is named like one of a checkpoint, and is either in the journal or, already moved, in its place.
- A file that is still to be moved has no other name, and its place holds the regular file that was there at the commit,
  or nothing. A backup's place holds nothing.

All of this is checked before the first move. A journal that fails any check is left alone, with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from convsim_cli.checkpoints.diagnose import is_backup, is_checkpoint_file
from convsim_cli.errors import CheckpointError, ConvsimWarning, some_of, wait_for_lock

JOURNAL, MANIFEST = ".convsim-journal", ".convsim-manifest"
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # rename(2): a folder of that name exists and is not empty
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # fsync(2) of a folder, on some file systems
_HIDDEN = re.compile(r"\.convsim-(?:manifest|turn|[0-9a-f]{16})")  # files that stay when others move to their place
_CHUNK = 1 << 20
_TURN, _MARK = ".convsim-backup.tmp", ".convsim-turn"  # a folder, and the file by which it is known as convsim's
_NAME = re.compile(r"\.convsim-(?:[0-9a-f]{16}|backup)\.tmp")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # link(2), on some file systems

Fingerprint = list[int | str]  # inode, size and digest of a file


def is_scratch(path: Path) -> bool:
    """Return whether a path is that of a folder in which a save prepares its files, as a kill leaves it."""
    return _NAME.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


class ForeignJournalError(FileExistsError):
    """A file or folder of the journal's name is not an interrupted save that can be completed."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder / JOURNAL} is not an interrupted save of this folder: {reason}")


@dataclass(frozen=True)
class _Journal:
    """A journal that is checked and locked: descriptors of its parent and itself, and the files still to be moved."""

    parent: int
    descriptor: int
    to_move: list[str]


def complete_save(folder: Path) -> list[str]:
    """Complete an interrupted save to a folder; return the names of the files that were still to be moved.

    Waits for a running process. Raises ForeignJournalError, OSError.
    """
    with _opened(folder) as journal:
        if journal is None:
            return []
        for name in journal.to_move:
            os.replace(name, name, src_dir_fd=journal.descriptor, dst_dir_fd=journal.parent)
            with suppress(FileNotFoundError):  # rename(2) does nothing where both are links to one file
                os.unlink(name, dir_fd=journal.descriptor)
        flush_folder(folder)
        remove_folder(folder / JOURNAL, journal.descriptor)
        return journal.to_move


def is_interrupted(folder: Path) -> bool:
    """Return whether files of an interrupted save to a folder are still to be moved; waits as `complete_save`."""
    with _opened(folder) as journal:
        return journal is not None and bool(journal.to_move)


def warn_of_completed(folder: Path, names: Sequence[str]) -> None:
    """Warn that files were moved to their places for a save that was interrupted."""
    if names:
        message = f"{folder}: an interrupted save was completed; it wrote {some_of(names)}"
        warnings.warn(message, ConvsimWarning, stacklevel=2)


@cache
def warn_of_foreign(message: str) -> None:
    """Warn about a journal that is left alone: once, however many files a run saves beside it."""
    warnings.warn(f"{message}; it is ignored", ConvsimWarning, stacklevel=2)


def write_manifest(parent: Path, descriptor: int) -> None:
    """Write the manifest of an open scratch folder that becomes the parent's journal. Raises OSError."""
    files = {name: _fingerprint(descriptor, name) for name in list_names(descriptor) if not _HIDDEN.fullmatch(name)}
    for name in files:
        if not is_checkpoint_file(name):
            raise OSError(errno.EINVAL, f"{name} is not named like a file of a checkpoint")
    replaced = {name: _state(parent / name) for name in files}
    inodes = {"folder": parent.stat().st_ino, "journal": os.fstat(descriptor).st_ino}
    manifest = {**inodes, "files": files, "replaced": replaced}
    new = os.open(MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=descriptor)
    with open(new, "w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(new)


def is_still(path: Path, descriptor: int) -> bool:
    """Return whether an open folder is still the one of this name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where its file system can. Raises OSError."""
    descriptor = os.open(folder, FOLDER & ~os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path, descriptor: int) -> None:
    """Remove an open folder with its files. Another process may take its name as soon as it is empty.

    What tells whose folder it is goes last: a process that is killed here leaves a folder that is known as convsim's.
    """
    for name in sorted(list_names(descriptor), key=lambda name: name in (_MARK, MANIFEST)):
        os.unlink(name, dir_fd=descriptor)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (*TAKEN, errno.ENOENT):
            raise


def list_names(descriptor: int) -> list[str]:
    """Return the names in an open folder."""
    with os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


@contextmanager
def _opened(folder: Path) -> Iterator[_Journal | None]:
    """Yield a folder's journal, once no running process holds it and every check has passed; None if there is none.

    Raises ForeignJournalError.
    """
    path = folder / JOURNAL
    while os.path.lexists(path):
        with ExitStack() as opened:
            parent = os.open(folder, FOLDER & ~os.O_NOFOLLOW)
            opened.callback(os.close, parent)
            try:
                descriptor = os.open(JOURNAL, FOLDER, dir_fd=parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ForeignJournalError(folder, f"it is not a folder that you can open ({error.strerror})") from error
            opened.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid():
                raise ForeignJournalError(folder, f"it belongs to another user (uid {status.st_uid})")
            if status.st_mode & 0o022:
                raise ForeignJournalError(folder, f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})")
            with suppress(OSError):  # a file system without locks
                wait_for_lock(descriptor, f"is saving to {folder}")
            if not is_still(path, descriptor):
                continue  # its own process has completed it
            names = list_names(descriptor)
            if irregular := [name for name in names if not _is_regular(descriptor, name)]:
                raise ForeignJournalError(folder, f"{irregular[0]} in it is not a regular file")
            to_move = [name for name in names if not _HIDDEN.fullmatch(name)]
            if to_move and (reason := _find_fault(folder, parent, descriptor, to_move)):
                raise ForeignJournalError(folder, reason)
            yield _Journal(parent, descriptor, to_move)
            return
    yield None


def _find_fault(folder: Path, parent: int, journal: int, to_move: list[str]) -> str | None:
    """Return why a journal's files must not be moved, None if they can be.

    Raises CheckpointError if files in their places were replaced since the commit.
    """
    if not _is_regular(journal, MANIFEST):
        return "it has no manifest"
    try:
        with open(os.open(MANIFEST, _FILE, dir_fd=journal), "rb") as file:
            manifest = json.loads(file.read(100 * _CHUNK))
        inodes, files = [manifest["folder"], manifest["journal"]], dict(manifest["files"])
        replaced = dict(manifest.get("replaced", {}))  # which version 0.3.0 did not write
    except (ValueError, TypeError, KeyError, RecursionError):
        return "its manifest is damaged"
    if inodes != [os.fstat(parent).st_ino, os.fstat(journal).st_ino]:
        return "it was made elsewhere and copied here"
    if unnamed := [name for name in to_move if name not in files]:
        return f"its manifest does not name {unnamed[0]}"
    for name, fingerprint in files.items():
        if not is_checkpoint_file(name):
            return f"{name} is not named like a file of a checkpoint"
        where = journal if name in to_move else parent
        if not _is_regular(where, name) or _fingerprint(where, name) != fingerprint:
            return f"{name} has changed or is missing"
    for name in to_move:
        if reason := _find_obstacle(parent, journal, name):
            return reason
        found = _state(name, parent)
        if name in replaced and found not in (None, replaced[name], _state(name, journal)):
            raise CheckpointError(
                f"{folder}: a save was interrupted, and {name} was replaced since, so the save cannot be completed; "
                f"restore or fetch every file of the checkpoint, then remove {folder / JOURNAL}"
            )
    return None


def _find_obstacle(parent: int, journal: int, name: str) -> str | None:
    """Return why a file of the journal cannot take its place, None if it can."""
    new = os.stat(name, dir_fd=journal, follow_symlinks=False)
    try:
        old = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        old = None
    is_moved = old is not None and os.path.samestat(new, old)  # both names exist for a moment
    if old is not None and not stat.S_ISREG(old.st_mode):
        return f"{name} beside it is not a regular file"
    if is_backup(name):
        return f"{name} has been created beside it" if old is not None and not is_moved else None
    return f"{name} in it has another hard link" if new.st_nlink > 1 + is_moved else None


def _is_regular(folder: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except (FileNotFoundError, ValueError):  # no file can have every name that a manifest can hold
        return False


def _state(name: str | Path, folder: int | None = None) -> list[int] | None:
    """Return inode, size and time of the last change of a file, None if there is none."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _fingerprint(folder: int, name: str) -> Fingerprint:
    """Return what identifies a regular file in an open folder: its inode, its size, and a digest of its content."""
    digest = blake2b(digest_size=32)
    with open(os.open(name, _FILE, dir_fd=folder), "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        status = os.fstat(file.fileno())
    return [status.st_ino, status.st_size, digest.hexdigest()]


class Scratch:
    """A locked folder of files that are later moved into its parent folder, each under the name that it has here."""

    def __init__(self, folder: Path) -> None:
        _complete_or_warn(folder)
        for path in folder.glob(".convsim-*.tmp"):
            if _NAME.fullmatch(path.name):
                _remove_left(path, wait=False)
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
                wait_for_lock(self._descriptor, f"is saving to {folder}")
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
        (self.path / _MARK).touch()  # rename(2) replaces an empty folder
        while True:
            try:
                self.path = self.path.rename(turn)
                break
            except OSError as error:
                if error.errno not in TAKEN and not os.path.lexists(turn):
                    raise
            if not _remove_left(turn, wait=True):
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

    def prepare_journal(self) -> None:
        """Write the manifest to disk, which takes time: it holds a digest of each file."""
        write_manifest(self.path.parent, self._descriptor)
        flush_folder(self.path)

    def make_journal(self) -> None:
        """Commit: from now on every file here goes to its place, even if this process dies.

        The parent folder still has to be flushed.
        """
        journal = self.path.with_name(JOURNAL)
        while True:
            try:
                self.path = self.path.rename(journal)
                break
            except OSError as error:
                if error.errno not in TAKEN and not os.path.lexists(journal):
                    raise
                complete_save(journal.parent)

    def unmake_journal(self) -> None:
        """Undo `make_journal`, once no file has been moved or all were moved back."""
        self.path = self.path.rename(self._name)

    def remove(self) -> None:
        """Remove the folder and what it holds, except a journal whose moves the next process has to complete."""
        with suppress(OSError):
            if self.path.name != JOURNAL or all(_HIDDEN.fullmatch(name) for name in list_names(self._descriptor)):
                remove_folder(self.path, self._descriptor)
        os.close(self._descriptor)


def _complete_or_warn(folder: Path) -> None:
    try:
        warn_of_completed(folder, complete_save(folder))
    except ForeignJournalError as foreign:
        warn_of_foreign(str(foreign))


def _remove_left(path: Path, wait: bool) -> bool:
    """Remove a scratch folder that a dead process left. wait: for a running one to end; otherwise its folder stays.

    Returns False where that fails: another user's folder, one that convsim did not make, or no locks here.
    """
    try:
        descriptor = os.open(path, FOLDER)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    try:
        names = list_names(descriptor)
        if os.fstat(descriptor).st_uid != os.geteuid() or (path.name == _TURN and names and _MARK not in names):
            return False
        if wait:
            wait_for_lock(descriptor, f"is saving to {path.parent}")
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_still(path, descriptor):
            remove_folder(path, descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
