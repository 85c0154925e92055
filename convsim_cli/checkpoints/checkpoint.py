"""What every checkpoint file offers, whatever its format: its tensors one at a time, and the way back to disk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from convsim_cli.checkpoints.scratch import finish_save
from convsim_cli.errors import CheckpointError, InputError
from convsim_cli.kernels import TensorInfo

INDEX = ".index.json"  # how the names of Hugging Face's indices of shards end
SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt")
Changes = Iterable[tuple[str, Tensor]]


class Checkpoint(ABC):
    """An open checkpoint file: what it holds, its tensors one at a time, and the way back to disk."""

    metadata: Mapping[str, str] = MappingProxyType({})  # what a format can hold beside tensors: the `convsim.*` record

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
        """Return whether batch normalization has seen data: a counter above zero, else a running mean not zero."""
        counters = [name for name in self.tensors if name.endswith("num_batches_tracked")]
        names = counters or [name for name in self.tensors if name.endswith("running_mean")]
        return any(_has_counted(self.load(name)) for name in names)


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
