"""Replace files so that a crash at any moment leaves either the complete old file or the complete new one.

convsim writes a temporary file in the same directory, fsyncs it and renames it. Files that belong together are all
complete on disk before the first rename, and a journal commits them together (`journal`). A backup never overwrites an
existing file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from convsim_cli.checkpoints.diagnose import is_checkpoint_file, is_index
from convsim_cli.checkpoints.journal import (
    ForeignJournalError,
    Scratch,
    complete_save,
    flush_folder,
    is_interrupted,
    warn_of_completed,
    warn_of_foreign,
)
from convsim_cli.errors import CheckpointError, InputError, WriteError, quoted

if TYPE_CHECKING:
    from typing_extensions import Self

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def replace_file(target: Path, write: Callable[[BinaryIO], object], backup: Path | None = None) -> Path | None:
    """Write a file and rename it over the target; return the name under which the old file is kept, if it is.

    A symbolic link stays a link; an existing file keeps its mode and owner, a new one follows the umask. backup: the
    name to keep the old file under (a hard link, or a copy where links cannot be made), with .1, .2, … added where it
    exists. Raises InputError if the target is no regular file, and WriteError that names the target, with the old
    file intact; an exception of `write` passes through once the temporary file is removed.
    """
    with Replacements() as files:
        with files.writing(target) as file:
            write(file)
        return files.commit({target: backup} if backup else {}).get(target)


def check_regular(target: Path, replaceable: str = "a regular one") -> None:
    """Raise InputError if a name is taken by anything but a regular file, or a link to one.

    replaceable: what may be replaced, for the message.
    """
    try:
        mode = target.stat().st_mode
    except OSError:  # mostly no such file; whatever else it is, writing reports it
        if not target.is_symlink():
            return
        kind = "a broken link"
    else:
        if stat.S_ISREG(mode):
            return
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
    raise InputError(f"{target}: is {kind}; choose a new file or {replaceable} to replace, or move it away")


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder that is read-only, or has links: what they lead to would change."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: is read-only; allow writing there, or copy it elsewhere and use the copy")
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and file.exists():
            raise InputError(
                f"{file}: is a link to {file.readlink()}; replace the link with a copy, or the original would change"
            )


def free_names(names: Collection[Path]) -> list[Path]:
    """Return the names, all with the same number added (.1, .2, …) where at least one of them exists.

    Raises InputError for a name that the file system finds too long.
    """

    def numbered(name: Path, number: int) -> Path:
        return name.with_name(f"{name.name}.{number}") if number else name

    free = next(n for n in count() if not any(os.path.lexists(numbered(name, n)) for name in names))
    found = [numbered(name, free) for name in names]
    for name in found:
        try:
            name.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise InputError(f"{name}: the name of the backup is too long; shorten the name of the file") from error
    return found


def finish_saves(path: Path, *, strict: bool = False) -> dict[Path, list[str]]:
    """Complete interrupted saves in the folders of a checkpoint; return folder → the names of the files that it moved.

    path: a file or a folder, which need not exist. Waits for a save that is running. A journal that cannot be trusted
    (`journal`) is left alone, with a warning. strict: raise CheckpointError for it. Raises CheckpointError if the
    files cannot be moved.
    """
    moved = {}
    for folder in _folders(path):
        with _explained_journal(path, folder, strict):
            moved[folder] = complete_save(folder)
    return {folder: names for folder, names in moved.items() if names}


def settle(path: Path, for_writing: bool) -> None:
    """Complete interrupted saves in a checkpoint's folders, with a warning. For reading, raise CheckpointError."""
    if not for_writing:
        return refuse_interrupted(path)
    for folder, names in finish_saves(path).items():
        warn_of_completed(folder, names)


def refuse_interrupted(path: Path) -> None:
    """Raise CheckpointError if a save in the folders of a checkpoint was interrupted; waits as `finish_saves`."""
    for folder in _folders(path):
        with _explained_journal(path, folder):
            if is_interrupted(folder):
                raise CheckpointError(
                    f"{path}: a save to {folder} was interrupted; to complete it, run {_recovery(path)}"
                )


def _folders(path: Path) -> list[Path]:
    """Return the folders that hold the files of a checkpoint, those behind links too."""
    folder = path if path.is_dir() else path.parent
    files = [] if folder == path else [path]
    if folder == path or is_index(path):
        files += sorted(file for file in folder.glob("*") if file.is_symlink() and is_checkpoint_file(file.name))
    behind = [Path(os.path.realpath(file)).parent for file in files]
    return [folder, *dict.fromkeys(other for other in behind if other != Path(os.path.realpath(folder)))]


def _recovery(path: Path) -> str:
    return f"convsim init {quoted(path)} --recover"


@contextmanager
def _explained_journal(path: Path, folder: Path, strict: bool = False) -> Iterator[None]:
    try:
        yield
    except ForeignJournalError as foreign:
        if strict:
            raise CheckpointError(str(foreign)) from foreign
        warn_of_foreign(str(foreign))
    except OSError as error:
        raise CheckpointError(
            f"{path}: a save to {folder} was interrupted and cannot be completed ({error.strerror or error}); "
            f"once you have write permission, run {_recovery(path)}"
        ) from error


@dataclass(frozen=True)
class _Move:
    """A file that goes to its place, for a target; a backup never replaces what is there."""

    target: Path
    place: Path
    is_backup: bool = False


class Replacements:
    """New files that replace old ones together: a context manager that removes them unless they are committed.

    Together means in one folder, after following links; several folders are committed one right after the other. Each
    method raises WriteError that names a target, `writing` InputError for one that is no regular file; the old files
    are then intact.
    """

    def __init__(self) -> None:
        self._scratch: dict[Path, Scratch] = {}
        self._made: dict[Path, tuple[Path, BinaryIO]] = {}  # target → the real path behind links, and its new file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for _, file in self._made.values():
            with suppress(OSError):
                file.close()
        for scratch in self._scratch.values():
            scratch.remove()

    @contextmanager
    def writing(self, target: Path) -> Iterator[BinaryIO]:
        """Yield the new file of a target to write to, the same one each time."""
        with _explained(target):
            if target not in self._made:
                check_regular(target)
                real = Path(os.path.realpath(target))
                self._made[target] = real, self._scratch_in(real.parent).create(real)
            yield self._made[target][1]

    def commit(self, backups: Mapping[Path, Path] = {}, reserved: Collection[Path] = ()) -> dict[Path, Path]:
        """Move every new file to its place; return target → the name of its backup.

        backups: target → the name to keep its old file under. Where one of these or of the `reserved` names exists, all
        get the same free number.
        """
        for target, (real, file) in self._made.items():
            with _explained(target):
                file.flush()
                _copy_attributes(real, file.fileno())
                os.fsync(file.fileno())
        kept = self._keep(backups, reserved)
        moves = [_Move(target, place, is_backup=True) for target, place in kept.items()]
        moves += [_Move(target, real) for target, (real, _) in self._made.items()]
        folders = list(dict.fromkeys(move.place.parent for move in moves))  # of backups first: they may come too early
        self._move(moves, folders if len(self._made) > 1 else [])
        try:
            for folder in folders:
                flush_folder(folder)
        except OSError as error:
            raise WriteError(
                f"{next(iter(self._made))}: written, but its folder could not be flushed to disk "
                f"({error.strerror or error}); after a power failure the old file may reappear"
            ) from error
        return {target: backups[target].with_name(place.name) for target, place in kept.items()}

    def _keep(self, backups: Mapping[Path, Path], reserved: Collection[Path]) -> dict[Path, Path]:
        """Hold the old files, and return target → the place of its backup.

        No other process takes backups here until this save is done: nothing that it writes is lost in between.
        """
        places = [Path(os.path.realpath(backup.parent), backup.name) for backup in backups.values()]
        for folder in sorted({place.parent for place in places}):
            with _explained(next(iter(backups))):
                self._scratch_in(folder).take_turn()
        numbered = dict(zip(backups, free_names([*places, *reserved] if places else []), strict=False))
        for target, place in numbered.items():
            with _explained(target):
                self._scratch[place.parent].keep(self._made[target][0], place)
        return numbered

    def _scratch_in(self, folder: Path) -> Scratch:
        if folder not in self._scratch:
            self._scratch[folder] = Scratch(folder)
        return self._scratch[folder]

    def _move(self, moves: list[_Move], journals: list[Path]) -> None:
        """Move each file to its place; if one cannot be moved, move back those before it.

        The last move completes the save: an interruption after it changes nothing.
        """
        begun: list[tuple[_Move, Path | None]] = []
        try:
            with _explained(moves[0].target):
                for folder in journals:
                    self._scratch[folder].prepare_journal()
                for folder in journals:  # one right after the other: a kill in between mixes old and new files
                    self._scratch[folder].make_journal()
                for folder in journals:
                    flush_folder(folder)
            for move in moves:
                with _explained(move.target):
                    scratch = self._scratch[move.place.parent]
                    old = None if move.is_backup or move == moves[-1] else scratch.keep_if_linkable(move.place)
                    begun.append((move, old))
                    scratch.move_beside(move.place) if move.is_backup else scratch.move(move.place)
        except BaseException as failure:
            if len(begun) == len(moves) and self._is_moved(moves[-1]):
                raise
            self._undo(begun, journals, moves[-1].target, failure)
            raise

    def _undo(
        self, begun: list[tuple[_Move, Path | None]], journals: list[Path], last: Path, failure: BaseException
    ) -> None:
        try:
            for move, old in reversed(begun):
                self._move_back(move, old)
            for folder in reversed(journals):
                self._scratch[folder].unmake_journal()
        except OSError as error:
            if journals:
                raise WriteError(
                    f"{last}: the save failed ({failure}), and files that had been replaced could not "
                    f"be restored ({error.strerror or error}); to complete the save, run {_recovery(last)}"
                ) from failure

    def _move_back(self, move: _Move, old: Path | None) -> None:
        place, new = move.place, self._scratch[move.place.parent].file_for(move.place)
        if not self._is_moved(move):
            if move.is_backup and place.exists() and place.samefile(new):
                place.unlink()  # interrupted between the two steps of `move_beside`
        elif old is None:
            place.replace(new)
        else:
            os.link(place, new)  # so that a process killed here leaves a complete journal
            old.replace(place)

    def _is_moved(self, move: _Move) -> bool:
        """Return whether a file has left for its place: read from disk, as an interruption may come at any moment."""
        return not self._scratch[move.place.parent].holds_file_for(move.place)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        intact = "; the original is intact" if target.exists() else ""
        raise WriteError(f"{target}: cannot be written ({error.strerror or error}){intact}") from error


def _copy_attributes(real: Path, descriptor: int) -> None:
    """Give a new file the mode, owner, group and extended attributes of the old one, as far as this user may."""
    try:
        old = real.stat()
    except FileNotFoundError:
        return
    for owner in (old.st_uid, -1):  # only the superuser may change the owner, but a user may set one of their groups
        try:
            os.fchown(descriptor, owner, old.st_gid)
            break
        except PermissionError:
            continue
    new = os.fstat(descriptor)
    lost = (0 if new.st_uid == old.st_uid else 0o4000) | (0 if new.st_gid == old.st_gid else 0o2000)
    with suppress(OSError, AttributeError):  # an access list that the folder gives to new files
        for name in {*os.listxattr(descriptor)} - {*os.listxattr(real)}:
            with suppress(OSError):
                os.removexattr(descriptor, name)
    os.fchmod(descriptor, old.st_mode & 0o7777 & ~lost)  # drop setuid or setgid if ownership changed
    with suppress(OSError, AttributeError):  # not every file system has them, nor every system
        for name in os.listxattr(real):  # after the mode, which an access list changes
            with suppress(OSError):  # some belong to the system
                os.setxattr(descriptor, name, os.getxattr(real, name))
