"""The interface that checkpoints of every format share: tensors are read one at a time, and written back together."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from convsim_cli.checkpoints.atomic import check_regular, free_names
from convsim_cli.errors import CheckpointError, InputError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from convsim_cli.kernels import TensorInfo

MOST_PARTS = 200  # of a tensor's name: what they tell takes time that grows with the square of their number

Changes = Iterable[tuple[str, "Tensor"]]


class Checkpoint(ABC):
    """An open checkpoint.

    path: its file; name: what messages and reports call it, the path unless `open_checkpoint` was given another.
    tensors: name → dtype and shape; unfit: name → why a tensor cannot be changed by itself; notes: choices that reading
    the file involved, a line each, for the user.
    """

    suffixes: tuple[str, ...] = ()  # that its file may be named with, set by `open_checkpoint`; empty for any

    metadata: Mapping[str, str] = MappingProxyType({})  # what a format can hold beside tensors: the `convsim.*` record

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.name = str(path)
        if (parts := max((name.count(".") for name in tensors), default=0)) > MOST_PARTS:
            raise CheckpointError(f"{path}: a tensor has a name with {parts:,} dots; no network has one")
        self.tensors = tensors
        self.unfit: Mapping[str, str] = {}
        self.notes: list[str] = []

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Return one tensor, on the CPU, to be read only."""

    @abstractmethod
    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        """Write the checkpoint to `target`, atomically, with some tensors changed; return the name of the backup.

        changes: (name, tensor) pairs of the stored shape and dtype, consumed one at a time while the file is written;
        an exception from there leaves no trace on disk. record: metadata to add to a safetensors file; a pickle has no
        place for it. backup: keep the former file under the next free of `target.bak`, `target.bak.1`, … Raises
        InputError for a target whose suffix belongs to another format, CheckpointError if in place another process has
        replaced what would be lost, or what would stay beside the new, and WriteError if it cannot be written.
        """

    def keeps_record(self, target: Path) -> bool:
        """Return whether the format of `target` can store the record."""
        return True

    def target_for(self, output: Path) -> Path:
        """Return the file to write for an `output` of the user. Raises InputError if it cannot be written there."""
        check_regular(output)
        check_parent(output)
        self.check_suffix(output)
        return output

    def check_suffix(self, target: Path) -> None:
        """Raise InputError for a suffix of another format than the one that is written.

        The checkpoint's own suffix is always accepted.
        """
        own = target.suffix.lower() == self.path.suffix.lower() or self.is_in_place(target)
        if self.suffixes and not own and not target.name.lower().endswith(self.suffixes):
            raise InputError(
                f"{target}: expected a name that ends in {one_of(self.suffixes)}; a checkpoint is written back in its "
                "own format"
            )

    def is_in_place(self, target: Path) -> bool:
        """Return whether writing to `target` replaces this checkpoint itself, however its path is spelled."""
        return target.exists() and self.path.exists() and target.samefile(self.path)

    def replaced_by(self, target: Path) -> list[Path]:
        """Return the existing files that writing to `target` may replace."""
        return [target] if target.exists() else []

    def backup_for(self, target: Path) -> Path:
        """Return the name under which a backup of `target` would be kept now."""
        return free_names([target.with_name(f"{target.name}.bak")])[0]


class LaidOutCheckpoint(Checkpoint):
    """A checkpoint in another framework's layout, read and written as if in torch's.

    layout: `hwio` for `[*taps, in, out]`, `ohwi` for `[out, *taps, in]`; of every tensor with three axes or more.
    """

    def __init__(self, stored: Checkpoint, layout: str) -> None:
        self._stored, self._layout = stored, layout
        tensors = {
            name: replace(info, shape=tuple(info.shape[axis] for axis in self._axes(len(info.shape))))
            for name, info in stored.tensors.items()
        }
        super().__init__(stored.path, tensors)
        self.unfit, self.notes, self.metadata = stored.unfit, stored.notes, stored.metadata
        self.name, self.suffixes = stored.name, stored.suffixes

    def _axes(self, count: int) -> list[int]:
        """Return the stored axes in torch's order: out, in, taps."""
        if count < 3:
            return list(range(count))
        taps = range(count - 2) if self._layout == "hwio" else range(1, count - 1)
        return [*((count - 1, count - 2) if self._layout == "hwio" else (0, count - 1)), *taps]

    def load(self, name: str) -> Tensor:
        stored = self._stored.load(name)
        return stored.permute(self._axes(stored.ndim)).contiguous()

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        def stored() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in changes:
                axes = self._axes(tensor.ndim)
                yield name, tensor.permute([axes.index(axis) for axis in range(tensor.ndim)]).contiguous()
                del tensor  # one layer less in memory while the next one is changed

        return self._stored.write(target, stored(), record, backup=backup)

    def keeps_record(self, target: Path) -> bool:
        return self._stored.keeps_record(target)

    def target_for(self, output: Path) -> Path:
        return self._stored.target_for(output)

    def check_suffix(self, target: Path) -> None:
        self._stored.check_suffix(target)

    def is_in_place(self, target: Path) -> bool:
        return self._stored.is_in_place(target)

    def replaced_by(self, target: Path) -> list[Path]:
        return self._stored.replaced_by(target)

    def backup_for(self, target: Path) -> Path:
        return self._stored.backup_for(target)


def check_parent(output: Path) -> None:
    """Raise InputError unless the folder of `output` exists and this user may write to it."""
    folder = output.parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{output}: folder {folder} does not exist: it is a file")
    if not folder.is_dir():
        raise InputError(f"{output}: folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{output}: folder {folder} is read-only; choose another `output`")


def tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return the dtype and shape of each tensor."""
    from convsim_cli.kernels import TensorInfo

    return {
        name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def storage_extent(tensor: object) -> tuple[int, int, int] | None:
    """Return the address of a tensor's storage, its first element there, and the one after its last.

    None for what has no values in a storage: an empty or a sparse tensor, or no tensor.
    """
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or not tensor.numel():
        return None
    first = int(tensor.storage_offset())
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), first, first + length
