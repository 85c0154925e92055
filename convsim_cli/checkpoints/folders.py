"""How the files of checkpoints are named, and which checkpoint a folder holds when there is only one candidate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from convsim_cli.errors import CheckpointError

_INDEX = re.compile(
    r"\.index(\.[\w-]+)?\.json$"
)  # of shards, by Hugging Face's naming; a variant such as fp16 comes last
SAFETENSORS, PICKLES = (".safetensors",), (".pt", ".pth", ".th", ".bin", ".ckpt")  # suffixes
_BACKUP = re.compile(r"\.bak(\.\d+)?$")
_DIGEST = re.compile(r"[0-9a-f]{30,128}")  # how a store names a file; some use the first two digits as the folder
_LISTED = 6  # names in an error, at most


def is_index(path: Path) -> bool:
    """Return whether a file is named like an index of shards."""
    return _INDEX.search(path.name) is not None


def is_backup(name: str) -> bool:
    """Return whether a file is named like a backup."""
    return _BACKUP.search(name) is not None


def is_checkpoint_file(name: str) -> bool:
    """Return whether a file is named like one of a checkpoint, behind a store's link too, or like its backup."""
    name = _BACKUP.sub("", name)
    suffixed = name.lower().endswith((*SAFETENSORS, *PICKLES)) or is_index(Path(name))
    return "/" not in name and (suffixed or _DIGEST.fullmatch(name) is not None)


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
