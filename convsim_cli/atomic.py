"""Replace a file so that whoever looks, at any moment, finds the former one or the new one, whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from convsim_cli.errors import WriteError

_PREFIX, _SUFFIX = ".convsim-", ".tmp"


def replace_file(target: Path, write: Callable[[BinaryIO], object], backup: Path | None = None) -> None:
    """Write a new file in the target's folder, flush it to disk and rename it over the target.

    A symbolic link stays a link; mode and owner are kept, a new file follows the umask. backup: keeps the former file
    under this name (a hard link; a copy where links cannot be made). Raises WriteError naming the file, with the
    former one intact; whatever `write` raises passes through, with the temporary file removed.
    """
    real = Path(os.path.realpath(target))
    temporary: Path | None = None
    try:
        _sweep(real.parent)
        temporary, descriptor = _create(real)
        with os.fdopen(descriptor, "w+b") as file:
            write(file)
            file.flush()
            _copy_ownership(real, descriptor)
            os.fsync(descriptor)
            if backup is not None:
                _keep(real, backup)
            temporary.replace(real)
        _flush_folder(real.parent)
    except OSError as error:
        intact = "; the former file is intact" if real.exists() else ""
        raise WriteError(f"{target}: cannot be written ({error.strerror or error}){intact}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


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
