"""Files that must not be replaced unasked: marked read-only, or in a store that names files by their content."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from convsim_cli.errors import InputError

_DIGEST = r"(?<![0-9a-f])(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})(?![0-9a-f])"
_LINKED = re.compile(_DIGEST)
_NAMED = re.compile(rf"(?:[A-Za-z0-9]+[-:_](?:s\d+--)?)?(?!.{{32}}$){_DIGEST}")  # 32 digits alone may be a random name


def check_replaceable(files: Iterable[Path]) -> None:
    """Raise InputError for a file that is read-only, or that others share through a store.

    A store such as a Hugging Face cache names files by digests of their content, and links to them. Mode bits decide
    what is read-only, since the superuser may write anywhere.
    """
    for file in files:
        real = Path(os.path.realpath(file))
        reason = _reason(file, real)
        if reason:
            name = f"{file} is a link to {real}, which" if file.name != real.name else f"{file}"
            raise InputError(f"{name} {reason}; save elsewhere with `output`, or replace it with `force`")


def _reason(file: Path, real: Path) -> str | None:
    if _is_stored(file, real):
        return "is named by a digest of its content, so others rely on what it holds"
    mode = stat.S_IMODE(real.stat().st_mode)
    if not mode & 0o222 or not os.access(real, os.W_OK):
        return f"is read-only (mode {mode:04o})"
    return None


def _is_stored(file: Path, real: Path) -> bool:
    """Return whether a store holds a file: a link leads to a digest, or the name is nothing else.

    Some stores use the first two digits as the folder.
    """
    if len(real.parent.name) == 2 and re.fullmatch(_DIGEST, real.parent.name + real.stem):
        return True
    return bool(_LINKED.search(real.name) if file.name != real.name else _NAMED.fullmatch(real.stem))
