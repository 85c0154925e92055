"""The checkpoint formats, registered in one table, and how a file of any of them is opened or newly written.

Formats are told apart by the content of a file. Importing this module imports no torch: help texts are made from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from convsim_cli.checkpoints.atomic import finish_saves, refuse_interrupted
from convsim_cli.checkpoints.folders import PICKLES, SAFETENSORS, checkpoint_in, is_index
from convsim_cli.checkpoints.unreadable import describe_unknown, is_pickle
from convsim_cli.errors import CheckpointError, InputError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from convsim_cli.checkpoints.checkpoint import Checkpoint


_START = 512  # bytes that tell what a file is


@dataclass(frozen=True)
class Format:
    """A checkpoint format: a new one is an entry in `FORMATS`, and a module that reads and writes it.

    name: what a file of it is called, with its article; suffixes: of its file names; recognizes: takes a path and the
    file's first bytes; open: takes the path and a key, which only formats with `keys` have; write: takes a new
    file, a state dict and metadata, None for a format that can only be written back.
    """

    name: str
    suffixes: tuple[str, ...]
    recognizes: Callable[[Path, bytes], bool]
    open: Callable[[Path, str | None], Checkpoint]
    write: Callable[[BinaryIO, Mapping[str, Tensor], Mapping[str, str]], None] | None
    keys: bool = False


def _open_index(path: Path, _: str | None) -> Checkpoint:
    from convsim_cli.checkpoints.sharded_format import ShardedCheckpoint

    return ShardedCheckpoint(path)


def _open_safetensors(path: Path, _: str | None) -> Checkpoint:
    from convsim_cli.checkpoints.safetensors_format import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path)


def _write_safetensors(file: BinaryIO, state: Mapping[str, Tensor], record: Mapping[str, str]) -> None:
    from convsim_cli.checkpoints.safetensors_format import write_safetensors

    write_safetensors(file, state, record)


def _open_pickle(path: Path, key: str | None) -> Checkpoint:
    from convsim_cli.checkpoints.pickle_format import PickledCheckpoint

    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: named .safetensors but holds a pickle; rename it to .pt if you trust where it came from"
        )
    return PickledCheckpoint(path, key)


def _write_pickle(file: BinaryIO, state: Mapping[str, Tensor], _: Mapping[str, str]) -> None:
    from convsim_cli.checkpoints.pickle_format import write_pickle

    write_pickle(file, dict(state))


FORMATS: tuple[Format, ...] = (
    Format("an index of shards", (".index.json",), lambda path, _: is_index(path), _open_index, None),
    Format(
        "a safetensors file",
        SAFETENSORS,
        lambda _, start: len(start) > 8 and start[8:9] == b"{",
        _open_safetensors,
        _write_safetensors,
    ),
    Format(
        "a pickle",
        PICKLES,
        lambda _, start: is_pickle(start),
        _open_pickle,
        _write_pickle,
        keys=True,
    ),
)


def open_checkpoint(path: str | Path, key: str | None = None, *, for_writing: bool = False) -> Checkpoint:
    """Open a checkpoint: a file of any known format, or a folder that holds one checkpoint.

    key: which dictionary of tensors in a pickle to take, names joined by dots (`ema.state_dict`). for_writing: complete
    an interrupted save first; otherwise it is an error. Raises CheckpointError, in one line that says what was found
    and what to do, for anything that is not a checkpoint.
    """
    path = Path(path)
    finish_saves(path) if for_writing else refuse_interrupted(path)
    if path.is_dir():
        path = checkpoint_in(path, new_suffixes())
    start = _first_bytes(path)
    for format_ in FORMATS:
        if format_.recognizes(path, start):
            break
    else:
        raise CheckpointError(f"{path}: {describe_unknown(start)}, not a checkpoint ({one_of(new_suffixes())})")
    if key is not None and not format_.keys:
        raise InputError(f"`key` applies only to pickled checkpoints; {path} is {format_.name}")
    checkpoint = format_.open(path, key)
    checkpoint.suffixes = format_.suffixes
    return checkpoint


def format_for(target: Path) -> Format:
    """Return the format of a new file, by its suffix. Raises InputError for a suffix that no format has."""
    for format_ in FORMATS:
        if format_.write and target.name.lower().endswith(format_.suffixes):
            return format_
    what = f"unknown suffix {target.suffix}" if target.suffix else "has no suffix"
    raise InputError(f"{target}: {what}; name it {one_of(new_suffixes())}")


def is_checkpoint(path: Path) -> bool:
    """Return whether a regular file looks like a checkpoint of any format; an empty one may become any."""
    with path.open("rb") as file:
        start = file.read(_START)
    return not start or any(format_.recognizes(path, start) for format_ in FORMATS)


def new_suffixes() -> list[str]:
    """Return the suffixes that a new file may have."""
    return [suffix for format_ in FORMATS if format_.write for suffix in format_.suffixes]


def _first_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: a pipe or a device; save what it gives to a file first")
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, siblings, n=1)
        raise CheckpointError(f"{path}: no such file" + (f"; did you mean {close[0]}?" if close else "")) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from error
    if not start:
        raise CheckpointError(f"{path}: an empty file; fetch it again")
    return start
