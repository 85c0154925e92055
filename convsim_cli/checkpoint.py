"""Read any checkpoint without its model's code, and write it back with nothing changed but the kernels.

Two formats, told apart by their content: safetensors (read through a memory map, written by copying every other byte as
it stands), and pickles of `torch.save`, in today's zip or the older stream, unpickled with `weights_only=True` alone.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from convsim_cli.atomic import replace_file
from convsim_cli.errors import CheckpointError, InputError
from convsim_cli.kernels import TensorInfo

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt")
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_SAFETENSORS_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_TORN = (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError)  # of torch.load
_COPY_BUFFER = 1 << 22

Changes = Iterable[tuple[str, Tensor]]


class Checkpoint(ABC):
    """An open checkpoint file: what it holds, its tensors one at a time, and the way back to disk."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self.shared: Mapping[str, str] = {}  # name → the name that the same memory has before it
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

    def looks_trained(self) -> bool:
        """Return whether batch normalisation has seen data: a counter above zero, or a running mean that is not
        zero."""
        counters = [name for name in self.tensors if name.endswith("num_batches_tracked")]
        names = counters or [name for name in self.tensors if name.endswith("running_mean")]
        return any(bool((self.load(name) != 0).any()) for name in names)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint for reading.

    Raises CheckpointError, in one line that says what was found and what to do, for anything that is not a checkpoint.
    """
    start = _first_bytes(path)
    if _is_safetensors(start):
        return _SafetensorsCheckpoint(path)
    if start.startswith((b"PK", b"\x80")):
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path}: named .safetensors but holds a pickle; rename it .pt if you trust where it came from"
            )
        return _PickledCheckpoint(path)
    raise CheckpointError(f"{path}: {_what_it_is(start)}, not a checkpoint ({', '.join(SUFFIXES)})")


def save_state_dict(
    state: Mapping[str, Tensor], target: Path, record: Mapping[str, str], backup: Path | None = None
) -> None:
    """Write a state dict to a file, atomically: safetensors, or a pickle where the name says .pt or its kin.

    record: metadata of a safetensors file, where tensors that share memory are written under each of their names.
    Raises WriteError.
    """
    if target.suffix in SUFFIXES[1:]:
        return replace_file(target, lambda file: torch.save(dict(state), file), backup)
    memory: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in memory else tensor
        memory.add(address)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(content[:8], "little")
    header = _make_header({"format": "pt", **record}, json.loads(content[8:start]))  # metadata in an order that stays
    replace_file(target, lambda file: file.writelines((header, memoryview(content)[start:])), backup)


class StateDict(Checkpoint):
    """A state dict in memory that has no file yet. path: what to call it."""

    def __init__(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)
        super().__init__(path, _tensor_infos(state))

    def load(self, name: str) -> Tensor:
        return self._state[name]

    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        save_state_dict(self._state | dict(changes), target, record, backup)


class _SafetensorsCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch it again") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
        self._data_start = 8 + length
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
        names = sorted(self._header, key=_natural)  # the format keeps no order of layers
        super().__init__(path, {name: _tensor_info(self._header[name]) for name in names})

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        if target.suffix in SUFFIXES[1:]:
            raise InputError(
                f"{target}: the checkpoint is a safetensors file and is written back as one; name it .safetensors"
            )
        replace_file(target, lambda file: self._write(file, changes, record), backup)

    def _write(self, file: BinaryIO, changes: Changes, record: Mapping[str, str]) -> None:
        """A new header, the old data byte for byte, then the changed tensors over it: offsets stay as they were."""
        metadata = {key: value for key, value in self.metadata.items() if not key.startswith("convsim.")} | dict(record)
        header = _make_header(metadata, self._header)
        file.write(header)
        with self.path.open("rb") as former:
            former.seek(self._data_start)
            copyfileobj(former, file, _COPY_BUFFER)
        for name, tensor in changes:
            file.seek(len(header) + self._header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


class _PickledCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        self._zipped = zipfile.is_zipfile(path)
        self._root = _unpickle(path, self._zipped)
        found = sorted(_state_dicts(self._root), key=lambda item: _preference(*item))
        if not found:
            raise CheckpointError(f"{path}: holds no dictionary of named tensors; save model.state_dict()")
        self._state = found[0][1]
        tensors = {name: tensor for name, tensor in self._state.items() if isinstance(tensor, Tensor)}
        super().__init__(path, _tensor_infos(tensors))
        if len(found) > 1:
            taken, *others = (".".join(place) or "the top level" for place, _ in found)
            self.note = f"{path}: took the tensors under {taken}; there are others under {', '.join(others)}"
        owners: dict[tuple[Any, ...], str] = {}
        memory = {
            name: (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride())
            for name, t in tensors.items()
        }
        self.shared = {name: owners[key] for name, key in memory.items() if owners.setdefault(key, name) != name}

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name].detach()
        return tensor

    def write(self, target: Path, changes: Changes, record: Mapping[str, str], backup: Path | None = None) -> None:
        if target.suffix == ".safetensors":
            raise InputError(
                f"{target}: the checkpoint is a pickle and is written back as one; name it {self.path.suffix or '.pt'}"
            )
        replace_file(target, lambda file: self._write(file, changes), backup)

    def _write(self, file: BinaryIO, changes: Changes) -> None:
        for name, tensor in changes:
            self._state[name].detach().copy_(tensor)  # into its own memory: whoever shares it, and the structure, stay
        torch.save(self._root, file, _use_new_zipfile_serialization=self._zipped)


def _unpickle(path: Path, zipped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_TORN) as error:
        refused = re.search(r"GLOBAL (\S+)|global (\S+)|Unsupported \w+", str(error))
        if refused and isinstance(error, pickle.UnpicklingError):
            found = refused[1] or refused[2] or refused[0]
            raise CheckpointError(
                f"{path}: holds Python objects beside tensors ({found}), which could run "
                'code, and is not loaded; if you trust it: python -c "import torch; '
                "torch.save(torch.load('OLD', weights_only=False).state_dict(), 'NEW.pt')\""
            ) from error
        detail = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: damaged or cut short ({detail}); fetch it again") from error


def _state_dicts(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The dictionaries of named tensors with at least one that could be a kernel; optimiser state is none of them."""
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        return
    if any(isinstance(value, Tensor) and value.ndim >= 3 for value in node.values()):
        yield where, node
    for key, value in node.items():
        if "optim" not in key.lower():
            yield from _state_dicts(value, (*where, key))


def _preference(where: tuple[str, ...], state: dict[str, Any]) -> tuple[int, int]:
    rank = len(_CONTAINERS) if where and where[-1] not in _CONTAINERS else _CONTAINERS.index(where[-1]) if where else -1
    return rank, -len(state)


def _make_header(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> bytes:
    """The start of a safetensors file: its length, then the JSON that says where each tensor's bytes are."""
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(_SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key under which layer2 comes before layer10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


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


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{"


def _what_it_is(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer (run git lfs pull)"
    if start.lstrip()[:1] == b"<":
        return "a web page (the download led to a page; fetch the raw file)"
    return "an unknown kind of file"
