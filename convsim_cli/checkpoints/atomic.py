"""Replace files so that whoever looks, at any moment, finds the former one or the new one, whole.

New files are made in a hidden folder beside the place that they go to. Its lock says that it is in use: the next save
removes what a killed process left. Of files that belong together the folder is first renamed `.convsim-journal`, in one
step: from then on they are going to be in place, and whoever comes after a killed process puts there what it had not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from convsim_cli.checkpoints.scratch import Scratch, flush_folder
from convsim_cli.errors import WriteError

if TYPE_CHECKING:
    from typing_extensions import Self


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
        self._scratch: dict[Path, Scratch] = {}
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
                flush_folder(folder)
        except OSError as error:
            raise WriteError(
                f"{next(iter(self._made))}: written, but its folder could not be flushed to disk "
                f"({error.strerror or error}); if the power fails now the former file may come back"
            ) from error

    def _beside(self, place: Path) -> Scratch:
        if place.parent not in self._scratch:
            self._scratch[place.parent] = Scratch(place.parent)
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
