"""Replace files so that whoever looks, at any moment, finds the former one or the new one, whole.

New files are made in a hidden folder beside the place that they go to. Its lock says that it is in use: the next save
removes what a killed process left. Of files that belong together the folder is first renamed `.convsim-journal`, in one
step: from then on they are going to be in place, and whoever comes after a killed process puts there what it had not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, BinaryIO

from convsim_cli.errors import WriteError

if TYPE_CHECKING:
    from typing_extensions import Self

_PREFIX, _SUFFIX = ".convsim-", ".tmp"
_JOURNAL = ".convsim-journal"
_NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what some file systems answer to the flush of a folder
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def replace_file(target: Path, write: Callable[[BinaryIO], object], backup: Path | None = None) -> None:
    """Write a new file beside the target, flush it to disk and rename it over the target.

    A symbolic link stays a link; mode and owner are kept, a new file follows the umask. backup: keeps the former file
    under this name (a hard link; a copy where links cannot be made). Raises WriteError naming the file, with the
    former one intact; whatever `write` raises passes through, with the temporary file removed.
    """
    with Replacements() as files:
        with files.writing(target) as file:
            write(file)
        files.commit({target: backup} if backup else {})


class Replacements:
    """Files in the making that take their places together: a context manager that removes them unless committed.

    Together means in one folder, links followed. Each method raises WriteError naming a target; the former files are
    then intact.
    """

    def __init__(self) -> None:
        self._scratch: dict[Path, _Scratch] = {}
        self._made: dict[Path, tuple[Path, BinaryIO]] = {}  # target → where it really is, and its new file

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
        """Give the new file of a target to write to; can be asked for again."""
        with _explained(target):
            if target not in self._made:
                real = Path(os.path.realpath(target))
                self._made[target] = real, self._beside(real).create(real)
            yield self._made[target][1]

    def commit(self, backups: Mapping[Path, Path] = {}) -> None:
        """Put every new file in its place. backups: target → the name under which its former file is kept."""
        for target, (real, file) in self._made.items():
            with _explained(target):
                file.flush()
                _copy_ownership(real, file.fileno())
                os.fsync(file.fileno())
        moves = []
        for target, backup in backups.items():
            with _explained(target):
                place = Path(os.path.realpath(backup.parent), backup.name)
                self._beside(place).keep(self._made[target][0], place.name)
                moves.append((target, place))
        moves += [(target, real) for target, (real, _) in self._made.items()]
        folders = list(dict.fromkeys(place.parent for _, place in moves))  # of backups first: they may come too early
        self._move(moves, folders if len(self._made) > 1 else [])
        try:
            for folder in folders:
                _flush_folder(folder)
        except OSError as error:
            raise WriteError(
                f"{next(iter(self._made))}: written, but its folder could not be flushed to disk "
                f"({error.strerror or error}); if the power fails now the former file may come back"
            ) from error

    def _beside(self, place: Path) -> _Scratch:
        if place.parent not in self._scratch:
            self._scratch[place.parent] = _Scratch(place.parent)
        return self._scratch[place.parent]

    def _move(self, moves: list[tuple[Path, Path]], journals: list[Path]) -> None:
        """Rename each new file to its place; where one cannot be, those before it make room for the former ones.

        Once the last one is in its place all of it is done, and an interruption changes nothing more.
        """
        begun: list[tuple[Path, Path | None]] = []
        try:
            for folder in journals:
                with _explained(moves[0][0]):
                    self._scratch[folder].make_journal()
            for target, place in moves:
                with _explained(target):
                    scratch = self._scratch[place.parent]
                    former = None if (target, place) == moves[-1] else scratch.second_name(place)
                    begun.append((place, former))
                    scratch.holds(place).replace(place)
                    scratch.holds(place).unlink(missing_ok=True)  # still there if both are names of one file
        except BaseException as failure:
            if len(begun) == len(moves) and self._is_moved(moves[-1][1]):
                raise
            try:
                self._move_back(begun)
                for folder in reversed(journals):
                    self._scratch[folder].unmake_journal()
            except OSError as error:
                if journals:
                    raise WriteError(
                        f"{moves[-1][0]}: was being saved when that failed ({failure}), and the files before it could "
                        f"not be put back ({error.strerror or error}); the next command that opens it ends the save"
                    ) from failure
            raise

    def _move_back(self, begun: Iterable[tuple[Path, Path | None]]) -> None:
        for place, former in reversed(list(begun)):
            if self._is_moved(place):
                new = self._scratch[place.parent].holds(place)
                if former is None:
                    place.replace(new)
                else:
                    os.link(place, new)  # whoever is killed here leaves a journal that is complete
                    former.replace(place)

    def _is_moved(self, place: Path) -> bool:
        """Whether a new file has left for its place: seen on disk, for an interruption comes between any two steps."""
        return not self._scratch[place.parent].holds(place).exists()


class _Scratch:
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
        _flush_folder(self.path)
        while True:
            try:
                self.path = self.path.rename(self.path.with_name(_JOURNAL))
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                finish_save(self.path.parent)
        _flush_folder(self.path.parent)

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
            _flush_folder(folder)
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


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        intact = "; the former file is intact" if target.exists() else ""
        raise WriteError(f"{target}: cannot be written ({error.strerror or error}){intact}") from error


def _copy_ownership(real: Path, descriptor: int) -> None:
    """Give a new file the mode, owner and group of the former one, as far as this user may."""
    try:
        former = real.stat()
    except FileNotFoundError:
        return
    for owner in (former.st_uid, -1):  # only the superuser gives files away, but one's own groups anyone may set
        try:
            os.fchown(descriptor, owner, former.st_gid)
            break
        except PermissionError:
            continue
    new = os.fstat(descriptor)
    lost = (0 if new.st_uid == former.st_uid else 0o4000) | (0 if new.st_gid == former.st_gid else 0o2000)
    os.fchmod(descriptor, former.st_mode & 0o7777 & ~lost)  # nobody gets to run as whom he is not


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, _FOLDER & ~os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)
