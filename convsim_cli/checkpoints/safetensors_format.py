"""Checkpoints in the safetensors format: read through a memory map, written back with all other bytes copied."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.base import Changes, Checkpoint
from convsim_cli.checkpoints.diagnose import can_be_mapped
from convsim_cli.errors import CheckpointError
from convsim_cli.kernels import TensorInfo

_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_COPY_BUFFER = 1 << 22


class SafetensorsCheckpoint(Checkpoint):
    """A safetensors file. Raises CheckpointError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._descriptor, self._get = _open(path)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        try:
            self._header: dict[str, Any] = json.loads(
                os.pread(self._descriptor, length, 8), object_pairs_hook=_no_name_twice
            )
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its header is damaged ({error}); fetch it again") from error
        self._data_start = 8 + length
        self.metadata: Mapping[str, str] = self._header.pop("__metadata__", None) or {}
        entries = sorted(self._header.items(), key=lambda entry: natural_order(entry[0]))  # the format keeps no order
        super().__init__(
            path,
            {name: TensorInfo(_TYPES.get(e["dtype"], e["dtype"]), tuple(e["shape"])) for name, e in entries},
        )

    def load(self, name: str) -> Tensor:
        return self._get(name)

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        self.check_suffix(target)

        def write(file: BinaryIO) -> None:
            put = self.copy_to(file, record or {})
            for name, tensor in changes:
                put(name, tensor)
                del tensor  # one layer less in memory while the next one is minimized

        return replace_file(target, write, target.with_name(f"{target.name}.bak") if backup else None)

    def copy_to(self, file: BinaryIO, record: Mapping[str, str]) -> Callable[[str, Tensor], None]:
        """Copy the file with a new record, and return a function that overwrites one tensor in the copy.

        Only the header changes, so the tensors keep their offsets in the data.
        """
        metadata = {key: value for key, value in self.metadata.items() if not key.startswith("convsim.")} | dict(record)
        header = _make_header(metadata, self._header)
        file.write(header)
        with os.fdopen(os.dup(self._descriptor), "rb") as former:  # not by its name: another process may have saved
            former.seek(self._data_start)
            copyfileobj(former, file, _COPY_BUFFER)

        def put(name: str, tensor: Tensor) -> None:
            file.seek(len(header) + self._header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

        return put


def _open(path: Path) -> tuple[int, Callable[[str], Tensor]]:
    """Return a descriptor of a file and what reads its tensors: of one file, even if another process replaces it."""
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            get = _reader(path)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, get
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Return what reads a tensor by its name: through a memory map, or from a copy in memory where files have none."""
    try:
        if not can_be_mapped(path):
            return load(path.read_bytes()).__getitem__
        get: Callable[[str], Tensor] = safe_open(path, framework="pt").get_tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch it again") from error
    return get


def write_safetensors(file: BinaryIO, state: Mapping[str, Tensor], record: Mapping[str, str]) -> None:
    """Write a state dict in this format, tensors that share memory once under each name.

    The same state and record always give the same bytes.
    """
    memory: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = (tensor.clone() if address in memory else tensor).contiguous()
        memory.add(address)
    content = memoryview(save(tensors))
    start = 8 + int.from_bytes(content[:8], "little")
    file.write(_make_header({"format": "pt", **record}, json.loads(bytes(content[8:start]))))
    file.write(content[start:])


def _make_header(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> bytes:
    """Return the start of a safetensors file: the length of the header, and the header in JSON."""
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate names: JSON does not define which value counts, and readers differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} appears twice")
    return found


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer2 before layer10."""
    parts = ((part.isdecimal(), part, part.lstrip("0")) for part in re.split(r"(\d+)", name))
    return [(len(digits), digits) if is_number else (-1, part) for is_number, part, digits in parts]
