"""Which checkpoint a folder holds, when there is only one candidate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from convsim_cli.errors import CheckpointError

_INDEX = re.compile(
    r"\.index(\.[\w-]+)?\.json$"
)  # of shards, by Hugging Face's naming; a variant such as fp16 comes last
_LISTED = 6  # names in an error, at most


def is_index(path: Path) -> bool:
    """Return whether a file is named like an index of shards."""
    return _INDEX.search(path.name) is not None


def checkpoint_in(folder: Path, suffixes: Sequence[str]) -> Path:
    """Return the only index of shards in a folder, or without an index its only checkpoint file.

    suffixes: of checkpoint files. Raises CheckpointError that names what was found instead.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if is_index(path)] or [p for p in files if p.name.lower().endswith(tuple(suffixes))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:_LISTED]) + (", …" if len(found) > _LISTED else "")
    holds = f"a folder with {len(found)} checkpoints ({names})" if found else "a folder without a checkpoint"
    raise CheckpointError(f"{folder}: {holds}; name a checkpoint file")
