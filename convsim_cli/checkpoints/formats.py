"""Read any checkpoint without its model's code, and write it back with nothing changed but the kernels.

Three formats, told apart by their content: safetensors (`safetensors_format`), an index of safetensors shards
(`sharded_format`) and pickles of `torch.save` (`pickle_format`).
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from convsim_cli.checkpoints.checkpoint import INDEX, SUFFIXES, Checkpoint, end_saves
from convsim_cli.errors import CheckpointError, InputError


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Open a checkpoint for reading: a file, or a folder that holds an index of shards.

    key: which of a pickle's dictionaries of tensors to take, names joined by dots (`ema.state_dict`). Raises
    CheckpointError, in one line that says what was found and what to do, for anything that is not a checkpoint.
    """
    from convsim_cli.checkpoints.pickle_format import PickledCheckpoint
    from convsim_cli.checkpoints.safetensors_format import SafetensorsCheckpoint
    from convsim_cli.checkpoints.sharded_format import ShardedCheckpoint

    end_saves(path)
    indices = sorted(path.glob(f"*{INDEX}")) if path.is_dir() else []
    if len(indices) == 1:
        path = indices[0]
    start = _first_bytes(path)
    pickled = start.startswith((b"PK", b"\x80"))
    if key is not None and not pickled:
        raise InputError(f"--key {key}: {path} is no pickle, all of its tensors are in one place")
    if path.name.endswith(INDEX):
        return ShardedCheckpoint(path)
    if len(start) > 8 and start[8:9] == b"{":
        return SafetensorsCheckpoint(path)
    if pickled:
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path}: named .safetensors but holds a pickle; rename it .pt if you trust where it came from"
            )
        return PickledCheckpoint(path, key)
    raise CheckpointError(f"{path}: {_what_it_is(start)}, not a checkpoint ({', '.join(SUFFIXES)})")


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; name a checkpoint file in it")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, siblings, n=1)
        raise CheckpointError(f"{path}: no such file" + (f"; did you mean {close[0]}?" if close else "")) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from error
    if not start:
        raise CheckpointError(f"{path}: an empty file; fetch it again")
    return start


def _what_it_is(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer (run git lfs pull)"
    if start.lstrip()[:1] == b"<":
        return "a web page (the download led to a page; fetch the raw file)"
    return "an unknown kind of file"
