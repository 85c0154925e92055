"""Checkpoints pickled by `torch.save`, in today's zip or the older stream, unpickled with `weights_only=True` alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import torch
from torch import Tensor

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.checkpoint import Changes, Checkpoint, tensor_infos
from convsim_cli.errors import CheckpointError, did_you_mean

_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_DEEPEST = 8  # dictionaries within dictionaries that are searched


class PickledCheckpoint(Checkpoint):
    """A pickle of `torch.save`, of which one dictionary of tensors is worked on and all else is carried along.

    key: where that dictionary is, names joined by dots; found by itself unless given. Raises CheckpointError where the
    file is damaged, holds more than plain data, or has nothing under the key.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self._zipped = _is_zip(path)
        self._root = _unpickle(path, self._zipped)
        found = sorted(_state_dicts(self._root), key=lambda item: _preference(*item))
        if not found:
            raise CheckpointError(f"{path}: holds no dictionary of named tensors; save model.state_dict()")
        if key is not None:
            found = [item for item in found if ".".join(item[0]) == key] or _no_such(path, key, found)
        self._state = found[0][1]
        empty = next((name for name, value in self._state.items() if isinstance(value, Tensor) and value.is_meta), None)
        if empty is not None:
            raise CheckpointError(f"{path}: {empty} has a shape but no values (device meta); save it with its weights")
        strided = {name: t for name, t in self._state.items() if isinstance(t, Tensor) and t.layout is torch.strided}
        super().__init__(path, tensor_infos(strided))
        if len(found) > 1:
            taken, *others = (".".join(place) or "the top level" for place, _ in found)
            more = f" and {len(others) - 9} more" if len(others) > 9 else ""
            self.notes.append(
                f"{path}: took the tensors under {taken}; there are others under {', '.join(others[:9])}{more} "
                "(choose with `key`)"
            )
        self.unfit = _shared_memory(strided)

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name].detach()
        return tensor

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        self.check_suffix(target)
        kept = target.with_name(f"{target.name}.bak") if backup else None
        return replace_file(target, lambda file: self._write(file, changes), kept)

    def _write(self, file: BinaryIO, changes: Changes) -> None:
        for name, tensor in changes:
            self._state[name].detach().copy_(tensor)  # into its own memory: whoever shares it, and the structure, stay
        write_pickle(file, self._root, self._zipped)


def write_pickle(file: BinaryIO, content: Any, zipped: bool = True) -> None:
    """Write as `torch.save` does, but raise the OSError of a full disk, which it hides behind a RuntimeError."""
    stream = _Stream(file)
    try:
        torch.save(content, cast("BinaryIO", stream), _use_new_zipfile_serialization=zipped)
    except RuntimeError as error:
        raise stream.failure or error from error


class _Stream:
    """A file to write to that remembers what went wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _is_zip(path: Path) -> bool:
    """Tell the formats apart as torch does, by the first bytes: what is damaged further on is for it to refuse."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unpickle(path: Path, zipped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said below, in one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a torn pickle makes an unpickler raise
        raise CheckpointError(f"{path}: {_why_not(str(error))}") from error


def _why_not(error: str) -> str:
    if "TorchScript" in error:
        return "a TorchScript program, not a state dict; save torch.jit.load(FILE).state_dict()"
    refused = re.search(r"GLOBAL (\S+)", error) or re.search(r"(Unsupported \w+)", error)
    if refused:
        return (
            f"holds Python objects beside tensors ({refused[1]}), which could run code, and is not loaded; "
            "if you trust it: python -c \"import torch; m = torch.load('OLD', weights_only=False); "
            "torch.save(m['state_dict'] if isinstance(m, dict) else m.state_dict(), 'NEW.pt')\""
        )
    return f"damaged or cut short ({' '.join(error.split())[:120]}); fetch it again"


def _state_dicts(root: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The dictionaries with tensors under names, the optimizer's state left aside.

    Each is looked into once, however many ways lead to it, or from it back to itself.
    """
    holds_tensors: dict[int, bool] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for where, node in waiting:
        if not isinstance(node, dict) or len(where) > _DEEPEST or not all(isinstance(key, str) for key in node):
            continue
        if id(node) not in holds_tensors:
            holds_tensors[id(node)] = any(isinstance(value, Tensor) for value in node.values())
            inner = [(key, value) for key, value in node.items() if isinstance(value, dict)]
            waiting += [((*where, key), value) for key, value in inner if "optim" not in key.lower()]
        if holds_tensors[id(node)]:
            yield where, node


def _no_such(path: Path, key: str, found: Iterable[tuple[tuple[str, ...], object]]) -> NoReturn:
    known = [".".join(place) for place, _ in found if place]
    raise CheckpointError(
        f"{path}: has no tensors under {key!r}: {did_you_mean(key, known) if known else 'all are at its top level'}"
    )


def _preference(where: tuple[str, ...], state: dict[str, Any]) -> tuple[bool, int, int]:
    """Where there are several: one with kernels, then the top level and the usual names, then the largest."""
    kernels = any(isinstance(value, Tensor) and value.ndim == 4 for value in state.values())
    known = where[-1] in _CONTAINERS if where else True
    rank = (_CONTAINERS.index(where[-1]) if where else -1) if known else len(_CONTAINERS)
    return not kernels, rank, -len(state)


def _shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which kernels share memory with one before them, or within themselves: changing one would change the other."""
    reasons: dict[str, str] = {}
    owners: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 3 or not tensor.numel():
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        first = int(tensor.storage_offset())
        last = first + extent
        placed = owners.setdefault(tensor.untyped_storage().data_ptr(), [])
        other = next((owner for start, end, owner in placed if start < last and first < end), None)
        if other:
            reasons[name] = f"shared with {other}"
        elif extent < tensor.numel():
            reasons[name] = "its elements share memory (an expanded tensor)"
        else:
            placed.append((first, last, name))
    return reasons
