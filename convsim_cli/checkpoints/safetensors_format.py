"""Checkpoints in the safetensors format: read one tensor at a time, written back with all other bytes copied."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.base import Changes, Checkpoint
from convsim_cli.checkpoints.diagnose import Source
from convsim_cli.errors import CheckpointError, no_name_twice
from convsim_cli.kernels import TensorInfo, natural_order

T = TypeVar("T")

_TYPES = {  # the format's name of a type → torch's, where it has one, and its bits
    "BOOL": ("bool", 8),
    "BF16": ("bfloat16", 16),
    "C64": ("complex64", 64),
    "F4": ("F4", 4),
    "F6_E2M3": ("F6_E2M3", 6),
    "F6_E3M2": ("F6_E3M2", 6),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    **{f"F{bits}": (f"float{bits}", bits) for bits in (16, 32, 64)},
    **{f"I{bits}": (f"int{bits}", bits) for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (f"uint{bits}", bits) for bits in (8, 16, 32, 64)},
}
_MOST_AXES = 64  # of a tensor in torch
_LONGEST_HEADER = 100_000_000  # bytes, by the format's definition
_LARGEST_READ = 1 << 30  # bytes at once: the system reads less than 2 GiB
_COPY_BUFFER = 1 << 22


class SafetensorsCheckpoint(Checkpoint):
    """A safetensors file. Raises CheckpointError if it is damaged."""

    def __init__(self, file: Path | Source) -> None:
        source = file if isinstance(file, Source) else Source(file)
        self._read(source)
        entries = in_natural_order(self._header).items()
        super().__init__(
            source.path,
            {name: TensorInfo(_TYPES[e["dtype"]][0], tuple(e["shape"])) for name, e in entries},
        )

    def _read(self, source: Source) -> None:
        """Read the header of an open file, and use that file from now on."""
        self.source, path = source, source.path
        with source.reading():
            length = int.from_bytes(os.pread(source.descriptor, 8, 0), "little")
            try:
                if not 0 < length <= min(source.size - 8, _LONGEST_HEADER):
                    raise ValueError(f"a header of {length} bytes in a file of {source.size}")
                self._header: dict[str, Any] = json.loads(
                    os.pread(source.descriptor, length, 8), object_pairs_hook=no_name_twice
                )
                _check_header(self._header, source.size - 8 - length)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch it again") from error
        self._data_start = 8 + length
        self.metadata: Mapping[str, str] = self._header.pop("__metadata__", None) or {}

    def reopen(self) -> None:
        """Open the file again after it was replaced, and read its header."""
        self._read(Source(self.path))

    def load(self, name: str) -> Tensor:
        info, (first, end) = self.tensors[name], self._header[name]["data_offsets"]
        with self.source.reading():
            data = torch.empty(end - first, dtype=torch.uint8)
            content, done = data.numpy().data, 0
            while done < len(content):
                part = content[done : done + _LARGEST_READ]
                read = os.preadv(self.source.descriptor, [part], self._data_start + first + done)
                if not read:
                    raise CheckpointError(f"{self.path}: cut short within {name}; fetch it again")
                done += read
        dtype = getattr(torch, info.dtype, None)
        if dtype is None:
            raise CheckpointError(f"{self.path}: {name} has dtype {info.dtype}, which torch does not support")
        return data.view(dtype).reshape(info.shape)

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        self.check_suffix(target)

        def write(file: BinaryIO) -> None:
            put = self.copy_to(file, record or {})
            for name, tensor in changes:
                put(name, tensor)
                del tensor  # one layer less in memory while the next one is minimized
            if not backup and self.is_in_place(target):
                self.source.check_place()

        in_place = self.is_in_place(target)
        kept = replace_file(target, write, target.with_name(f"{target.name}.bak") if backup else None)
        if in_place:
            self.reopen()
        return kept

    def copy_to(self, file: BinaryIO, record: Mapping[str, str]) -> Callable[[str, Tensor], None]:
        """Copy the file with a new record, and return a function that overwrites one tensor in the copy.

        Only the header changes, so the tensors keep their offsets in the data.
        """
        metadata = {key: value for key, value in self.metadata.items() if not key.startswith("convsim.")} | dict(record)
        header = _make_header(metadata, self._header)
        file.write(header)
        copy_data(self.source, self._data_start, file)

        def put(name: str, tensor: Tensor) -> None:
            file.seek(len(header) + self._header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

        return put


def copy_data(source: Source, start: int, file: BinaryIO) -> None:
    """Append a file from `start` to its end to another one, holes as holes: it may be larger than the disk."""
    position, shift = start, file.tell() - start
    while position < source.size:
        with source.reading():
            try:
                position = os.lseek(source.descriptor, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # a hole up to the end
            hole = os.lseek(source.descriptor, position, os.SEEK_HOLE)
        file.seek(position + shift)
        while position < hole:
            with source.reading():  # not the writing: its errors are those of another file
                part = os.pread(source.descriptor, min(_COPY_BUFFER, hole - position), position)
            file.write(part)
            position += len(part)
    file.truncate(source.size + shift)
    file.seek(0, os.SEEK_END)


def _check_header(header: Any, size: int) -> None:
    """Raise ValueError for a header whose tensors do not fill `size` bytes of data, one after the other."""
    metadata = header.get("__metadata__") or {} if isinstance(header, dict) else None  # null is none
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("a header that is not an object, or metadata that is not text")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape, place = (fields.get(field, ()) for field in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _TYPES:
            raise ValueError(f"{name[:80]!r} has the unknown dtype {str(dtype)[:80]!r}")
        if not _is_sizes(shape) or not _is_sizes(place) or len(place) != 2:
            raise ValueError(f"{name[:80]!r} has no shape or no offsets")
        first, end = place
        if prod(shape) * _TYPES[dtype][1] != 8 * (end - first) or prod(filter(None, shape)) >= 1 << 63:
            raise ValueError(f"{name[:80]!r} has a shape that does not match its offsets")
        places.append((first, end))
    places.sort()
    if [first for first, _ in places] + [size] != [0] + [end for _, end in places]:
        raise ValueError(f"its tensors do not fill the {size} bytes of data in it")
    json.dumps(header, ensure_ascii=False).encode()  # JSON can escape half a character, which cannot be written again


def _is_sizes(numbers: Any) -> bool:
    is_short = isinstance(numbers, list) and len(numbers) <= _MOST_AXES
    return is_short and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


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


def in_natural_order(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return a dictionary in the natural order of its names, layer2 before layer10: the format keeps no order."""
    return {name: tensors[name] for name in sorted(tensors, key=natural_order)}
