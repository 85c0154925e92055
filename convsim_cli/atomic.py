"""Replace a file so that whoever looks, at any moment, finds the former one or the new one, whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, BinaryIO

from convsim_cli.errors import WriteError

if TYPE_CHECKING:
    from typing_extensions import Self

_PREFIX, _SUFFIX = ".convsim-", ".tmp"


def replace_file(target: Path, write: Callable[[BinaryIO], object], backup: Path | None = None) -> None:
    """Write a new file in the target's folder, flush it to disk and rename it over the target.

    A symbolic link stays a link; mode and owner are kept, a new file follows the umask. backup: keeps the former file
    under this name (a hard link; a copy where links cannot be made). Raises WriteError naming the file, with the
    former one intact; whatever `write` raises passes through, with the temporary file removed.
    """
    with Replacement(target) as replacement:
        with replacement.writing() as file:
            write(file)
        replacement.flush()
        replacement.commit(backup)


class Replacement:
    """A file in the making, beside the one that it is to replace: a context manager that removes it unless committed.

    `writing`, `flush` and `commit` in this order, and all of one group's files flushed before any is committed, for
    files that belong together. Each raises WriteError naming the target, whose former file is then intact.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._real = target, Path(os.path.realpath(target))
        self._temporary: Path | None = None

    def __enter__(self) -> Self:
        with self._explained():
            _sweep(self._real.parent)
            self._temporary, descriptor = _create(self._real)
            self._file = os.fdopen(descriptor, "w+b")
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """Give the file to write to; can be asked for again."""
        with self._explained():
            yield self._file

    def flush(self) -> None:
        """Give the file the mode and owner of the former one, and have it all on disk."""
        with self._explained():
            self._file.flush()
            _copy_ownership(self._real, self._file.fileno())
            os.fsync(self._file.fileno())

    def commit(self, backup: Path | None = None) -> None:
        """Put the file in the place of the former one, which is kept as `backup` where that is given."""
        assert self._temporary is not None
        with self._explained():
            if backup is not None:
                _keep(self._real, backup)
            self._temporary.replace(self._real)
        try:
            _flush_folder(self._real.parent)
        except OSError as error:
            raise WriteError(
                f"{self._target}: written, but its folder could not be flushed to disk ({error.strerror or error}); "
                "if the power fails now the former file may come back"
            ) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            intact = "; the former file is intact" if self._real.exists() else ""
            raise WriteError(f"{self._target}: cannot be written ({error.strerror or error}){intact}") from error


def _create(real: Path) -> tuple[Path, int]:
    """A new, locked file beside the target: the lock tells the sweep of another process that it is in use."""
    while True:
        path = real.with_name(f"{_PREFIX}{token_hex(8)}{_SUFFIX}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if real.exists() else 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # not swept between its creation and its lock
            return path, descriptor
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left behind: temporary files that nobody holds a lock on."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _copy_ownership(real: Path, descriptor: int) -> None:
    try:
        former = real.stat()
    except FileNotFoundError:
        return
    with suppress(PermissionError):  # only the superuser gives files away
        os.fchown(descriptor, former.st_uid, former.st_gid)
    os.fchmod(descriptor, former.st_mode & 0o7777)


def _keep(real: Path, backup: Path) -> None:
    """Make `backup` a second name of the former file, replacing an older backup in one step."""
    fresh = backup.with_name(f"{_PREFIX}{token_hex(8)}{_SUFFIX}")
    try:
        try:
            os.link(real, fresh)
        except OSError:  # no hard links here, or another file system
            shutil.copy2(real, fresh)
        fresh.replace(backup)
    finally:
        fresh.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
