"""Read any checkpoint without its model's code, and write it back with nothing changed but the kernels.

Three formats, told apart by their content: safetensors (`safetensors_format`), an index of safetensors shards
(`sharded_format`) and pickles of `torch.save` (`pickle_format`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from convsim_cli.atomic import finish_save
from convsim_cli.errors import CheckpointError, InputError
from convsim_cli.kernels import TensorInfo

INDEX = ".index.json"  # how the names of Hugging Face's indices of shards end
SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt")

Changes = Iterable[tuple[str, Tensor]]


class Checkpoint(ABC):
    """An open checkpoint file: what it holds, its tensors one at a time, and the way back to disk."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self.unfit: Mapping[str, str] = {}  # name → why a tensor cannot be changed by itself
        self.note: str | None = None  # what a reader of the file had to choose between

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Return one tensor, on the CPU; not to be written to."""

    @abstractmethod
    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        """Write the checkpoint to `target`, atomically, with the changed tensors in place of the old ones.

        changes: (name, tensor) pairs of the stored shape and dtype, taken one at a time while the file is written; an
        exception from there leaves no trace on disk. record: added to the metadata of a safetensors file (a pickle has
        no place for it). Raises InputError for a target named after the other format, WriteError if it cannot be
        written.
        """

    def target(self, output: Path) -> Path:
        """Return the file to write where the user says `output`. Raises InputError where it cannot be written there."""
        if output.exists() and not output.is_file():
            what = "a folder" if output.is_dir() else "not a regular file"
            raise InputError(f"{output}: {what}; name the file to write")
        if not output.parent.is_dir():
            raise InputError(f"{output}: there is no folder {output.parent}; make it first")
        return output

    def backup(self, target: Path) -> Path | None:
        """Return where a write to `target` keeps the former file: in place, whatever the way it is spelled."""
        in_place = target.exists() and target.samefile(self.path)
        return target.with_name(target.name + ".bak") if in_place else None

    def looks_trained(self) -> bool:
        """Return whether batch normalisation has seen data: a counter above zero, else a running mean not zero."""
        counters = [name for name in self.tensors if name.endswith("num_batches_tracked")]
        names = counters or [name for name in self.tensors if name.endswith("running_mean")]
        return any(_has_counted(self.load(name)) for name in names)


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Open a checkpoint for reading: a file, or a folder that holds an index of shards.

    key: which of a pickle's dictionaries of tensors to take, names joined by dots (`ema.state_dict`). Raises
    CheckpointError, in one line that says what was found and what to do, for anything that is not a checkpoint.
    """
    from convsim_cli.pickle_format import PickledCheckpoint
    from convsim_cli.safetensors_format import SafetensorsCheckpoint
    from convsim_cli.sharded_format import ShardedCheckpoint

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


def tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return the dtype and shape of each tensor."""
    return {
        name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def end_saves(path: Path) -> None:
    """Put in place what a process that was killed had saved to the folders of this file, or to this folder."""
    folders = {path} if path.is_dir() else {path.parent, Path(os.path.realpath(path)).parent}
    for folder in folders:
        try:
            finish_save(folder)
        except OSError as error:
            raise CheckpointError(
                f"{path}: a save to {folder} was cut short and cannot be ended ({error.strerror or error}); "
                "open it once as a user who may write there"
            ) from error


def _has_counted(statistic: Tensor) -> bool:
    if statistic.numel() * statistic.element_size() > statistic.untyped_storage().nbytes():
        return False  # an expanded tensor, of any size: nothing that was counted
    return bool((statistic.to(torch.complex128) != 0).any())


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
