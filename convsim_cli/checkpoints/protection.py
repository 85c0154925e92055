"""Files that must not be replaced unasked: read-only, no checkpoint, or in a store that names files by content."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from convsim_cli.checkpoints.atomic import check_regular
from convsim_cli.checkpoints.formats import is_checkpoint
from convsim_cli.errors import InputError

_DIGEST = r"(?<![0-9a-f])(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})(?![0-9a-f])"
_LINKED = re.compile(_DIGEST)
_NAMED = re.compile(rf"(?:[A-Za-z0-9]+[-:_](?:s\d+--)?)?(?!.{{32}}$){_DIGEST}")  # 32 digits alone may be a random name


def check_replaceable(files: Iterable[Path], named: Path) -> None:
    """Raise InputError for a file that is read-only, no checkpoint, or that others share through a store.

    named: the file or folder that the user named. A link beside it, such as a shard, must not lead out of its folder.
    A store such as a Hugging Face cache names files by digests of their content, and links to them. Mode bits decide
    what is read-only, since the superuser may write anywhere.
    """
    for file in files:
        check_regular(file)
        real = Path(os.path.realpath(file))
        reason = _reason(file, real, named)
        if reason:
            name = f"{file} is a link to {real}, which" if file.is_symlink() else f"{file}"
            raise InputError(f"{name} {reason}; save elsewhere with `output`, or replace it with `force`")


def _reason(file: Path, real: Path, named: Path) -> str | None:
    if _is_stored(file, real):
        return "is named by a digest of its content, so others rely on what it holds"
    mode = stat.S_IMODE(real.stat().st_mode)
    if not mode & 0o222 or not os.access(real, os.W_OK):
        return f"is read-only (mode {mode:04o})"
    if file != named and real.parent != Path(os.path.realpath(file.parent)):
        return "is in another folder than the one that you named"
    if not os.access(real, os.R_OK):
        return "cannot be read"
    return None if is_checkpoint(real) else "is not a checkpoint"


def _is_stored(file: Path, real: Path) -> bool:
    """Return whether a store holds a file: a link leads to a digest, or the name is nothing else.

    Some stores use the first two digits as the folder.
    """
    if len(real.parent.name) == 2 and re.fullmatch(_DIGEST, real.parent.name + real.stem):
        return True
    return bool(_LINKED.search(real.name) if file.name != real.name else _NAMED.fullmatch(real.stem))
