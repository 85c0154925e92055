"""Checkpoints of `torch.save`, in today's zip or the older stream, only ever loaded with `weights_only=True`.

A pickle holds nested containers; this module finds the state dicts in them.
"""

from __future__ import annotations

import os
import pickle
import warnings
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from convsim_cli.checkpoints.atomic import replace_file
from convsim_cli.checkpoints.base import Changes, Checkpoint, storage_extent, tensor_infos
from convsim_cli.checkpoints.diagnose import MERGE_ZERO, Source, check_pickle, check_place, why_not_loaded
from convsim_cli.checkpoints.pickle_globals import HarmlessPickler, RefusedError, harmless_globals, pickle_module
from convsim_cli.device import deferred_interrupt
from convsim_cli.errors import (
    CheckpointError,
    ConvsimWarning,
    brief,
    did_you_mean,
    is_number,
    is_out_of_memory,
    some_of,
)
from convsim_cli.kernels.guess import is_optimizer_state


class PickledCheckpoint(Checkpoint):
    """A pickle of `torch.save`: one of its dictionaries of tensors is the checkpoint, the rest is saved as it was.

    key: where that dictionary is, names joined by dots; the most likely one unless given. Raises CheckpointError for a
    file that is damaged, holds more than plain data, or has nothing under the key.
    """

    def __init__(self, source: Source, key: str | None = None) -> None:
        path, self._opened = source.path, os.fstat(source.descriptor)
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path}: named .safetensors but contains a pickle; rename it to .pt if you trust its source"
            )
        with source.reading() as file:
            self._zipped, self._root = load_pickle(path, file)
        found = find_state_dicts(self._root)
        if not found:
            raise CheckpointError(f"{path}: contains no dictionary of named tensors; save model.state_dict()")
        if key is not None:
            known = [".".join(place) for place, _ in found if place]
            found = [item for item in found if ".".join(item[0]) == key]
            if not found:
                hint = did_you_mean(key, known) if known else "all are at its top level"
                raise CheckpointError(f"{path}: has no tensors under {key!r}: {hint}")
        self._place, state = found[0]
        self._state = named_tensors(state)
        empty = next((name for name, tensor in self._state.items() if tensor.is_meta), None)
        if empty is not None:
            raise CheckpointError(f"{path}: {empty} has a shape but no values (device meta); save it with its weights")
        strided = {n: t for n, t in self._state.items() if t.layout is torch.strided and not t.is_nested}
        weights = [t for name, t in strided.items() if name.endswith(".weight") and t.is_floating_point()]
        if weights and all(weight.shape == (0,) for weight in weights):
            raise CheckpointError(f"{path}: its weights are empty: DeepSpeed ZeRO-3 keeps them in shards; {MERGE_ZERO}")
        others = {n: t for n, t in self._state.items() if n not in strided and not t.is_nested and t.ndim >= 3}
        super().__init__(path, tensor_infos(strided | others))
        if len(found) > 1:
            taken, *left = (".".join(place) or "the top level" for place, _ in found)
            more = f" and {len(left) - 9} more" if len(left) > 9 else ""
            self.notes.append(
                f"{path}: loaded the tensors under {taken}; there are others under {', '.join(left[:9])}{more} "
                "(choose with `key`)"
            )
        self.unfit = _shared_memory(strided) | dict.fromkeys(others, "sparse; save it dense (`tensor.to_dense()`)")

    def load(self, name: str) -> Tensor:
        return self._state[name]

    def keeps_record(self, target: Path) -> bool:
        return False

    def write(
        self, target: Path, changes: Changes, record: Mapping[str, str] | None = None, *, backup: bool = False
    ) -> Path | None:
        self.check_suffix(target)
        self._rehearse()

        def write(file: BinaryIO) -> None:
            changed = []
            for name, tensor in changes:
                self._state[name].copy_(tensor)  # into its own memory, which other tensors may share
                changed.append(name)
            if following := self._following(changed):
                message = f"{target}: tensors that share memory with a kernel changed with it: {some_of(following)}"
                warnings.warn(message, ConvsimWarning, stacklevel=2)
            write_pickle(file, self._root, self._zipped, pickle_module())
            if not backup and self.is_in_place(target):
                check_place(target, self._opened)

        in_place = self.is_in_place(target)
        kept = replace_file(target, write, target.with_name(f"{target.name}.bak") if backup else None)
        if in_place:
            self._opened = target.stat()
        return kept

    def _following(self, changed: list[str]) -> list[str]:
        """Return the places of tensors that changed with others, except those that are skipped for sharing memory."""
        extents: dict[int, list[tuple[int, int]]] = {}
        for extent in filter(None, (storage_extent(self._state[name]) for name in changed)):
            insort(extents.setdefault(extent[0], []), extent[1:])
        known = {(*self._place, name) for name in (*changed, *self.unfit)}
        following, searched = [], set()
        waiting: list[tuple[tuple[str, ...], Any]] = [((), self._root)]
        for where, node in waiting:
            if isinstance(node, Tensor) and not node.is_nested and where not in known:
                storage, first, last = storage_extent(Tensor.detach(node)) or (0, 0, 0)
                if _place(extents.get(storage, ()), first, last) is None:
                    following.append(".".join(where))
            elif id(node) not in searched:
                searched.add(id(node))
                waiting += [((*where, key), value) for key, value in _children(node)]
        return following

    def _rehearse(self) -> None:
        """Raise CheckpointError for what loads but cannot be saved again, before any work is done."""
        try:
            with open(os.devnull, "wb") as nowhere:
                _Rehearsal(nowhere, 2).dump(self._root)
        except RefusedError as error:
            problem = f"{self.path}: holds {error}, which is not plain data; nothing was written"
            raise CheckpointError(problem) from error
        except (MemoryError, OSError):
            raise
        except Exception as error:  # whatever deep nesting, or an attribute that hides a method, makes a pickler raise
            problem = f"{self.path}: holds what cannot be saved again ({brief(error)}); save model.state_dict() alone"
            raise CheckpointError(problem) from error


class _Rehearsal(HarmlessPickler):
    """Pickles all but the values of tensors."""

    def persistent_id(self, obj: Any) -> str | None:
        return "" if torch.is_storage(obj) else None


def load_pickle(path: Path, file: BinaryIO) -> tuple[bool, Any]:
    """Return whether a pickle is zipped, and what it holds: in memory, since a mapped file may be cut short.

    Raises CheckpointError for one that is damaged or holds more than plain data.
    """
    file.seek(0)
    zipped = file.read(4) == b"PK\x03\x04"  # all that torch looks at, whatever damage comes later
    try:
        check_pickle(file)
        file.seek(0)
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless_globals()):
            warnings.simplefilter("ignore")  # torch's advice on loading; what a user needs to know is said elsewhere
            return zipped, torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # whatever a torn pickle makes an unpickler raise
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: {why_not_loaded(path, file, error)}") from error


def write_state_dict(file: BinaryIO, state: Mapping[str, Tensor], _record: Mapping[str, str]) -> None:
    """Write a state dict as `torch.save` does, without the record, which a pickle has no place for."""
    write_pickle(file, dict(state))


def write_pickle(file: BinaryIO, content: Any, zipped: bool = True, module: ModuleType = pickle) -> None:
    """Write as `torch.save` does, but raise the OSError of a full disk, which it hides behind a RuntimeError.

    Ctrl-C takes effect once all is written: raised in `file.write`, which C++ calls, it could end the process.
    """
    stream = _Stream(file)
    try:
        with deferred_interrupt():
            torch.save(content, cast("BinaryIO", stream), module, _use_new_zipfile_serialization=zipped)
    except RuntimeError as error:
        raise stream.failure or error from error


class _Stream:
    """A file to write to that remembers why writing failed."""

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


def _shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name → reason for kernels that share memory with an earlier one, or within themselves.

    Changing such a kernel would change the other one as well.
    """
    reasons: dict[str, str] = {}
    owners: dict[int, list[tuple[int, int, str]]] = {}  # storage → disjoint extents in order, each with its tensor
    for name, tensor in tensors.items():
        extent = storage_extent(tensor)
        if tensor.ndim < 3 or extent is None:
            continue
        storage, first, last = extent
        placed = owners.setdefault(storage, [])
        place = _place(placed, first, last)
        if place is None:
            reasons[name] = f"shared with {placed[bisect_left(placed, (last,)) - 1][2]}"
            continue
        placed.insert(place, (first, last, name))
        if _may_overlap(tensor):
            reasons[name] = "its elements share memory (an expanded tensor)"
    return reasons


def _place(extents: Sequence[tuple[Any, ...]], first: int, last: int) -> int | None:
    """Return where an extent belongs among disjoint ones in order, None if it overlaps one."""
    place = bisect_left(extents, (last,))
    return None if place and extents[place - 1][1] > first else place


def _may_overlap(tensor: Tensor) -> bool:
    """Return whether elements of a tensor may share memory: whether an axis steps within what smaller steps reach."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += (size - 1) * stride
    return False


_USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_DEEPEST = 8  # containers within containers that are searched

Found = tuple[tuple[str, ...], dict[str, Any]]  # the keys that lead to a state dict, and the state dict


def find_state_dicts(root: Any) -> list[Found]:
    """Return the dictionaries that hold tensors under names, the most likely first; optimizer state is left out.

    They are found in dictionaries, lists and tuples, whose keys and indices make up the place; each container is
    searched once, however many ways lead to it, or from it back to itself. State dicts with kernels come first, then
    the top level and the usual names, then the largest.
    """
    found: list[Found] = []
    searched: set[int] = set()
    ranks: dict[int, tuple[bool, int]] = {}  # of each state dict: whether it is without kernels, and minus its length
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for where, node in waiting:
        if len(where) > _DEEPEST:
            continue
        if id(node) not in searched:
            searched.add(id(node))
            tensors = named_tensors(node) if isinstance(node, dict) else {}
            if any(not is_optimizer_state(name) for name in tensors):
                ranks[id(node)] = all(tensor.ndim != 4 for tensor in tensors.values()), -len(tensors)
            inner = [(key, value) for key, value in _children(node) if isinstance(value, (dict, list, tuple))]
            waiting += [((*where, key), value) for key, value in inner if not is_optimizer_state(key)]
        if id(node) in ranks:
            found.append((where, node))

    def preference(item: Found) -> tuple[bool, int, int]:
        where, node = item
        rank = -1 if not where else _USUAL.index(where[-1]) if where[-1] in _USUAL else len(_USUAL)
        without_kernels, fewer = ranks[id(node)]
        return without_kernels, rank, fewer

    return sorted(found, key=preference)


def _children(node: Any) -> list[tuple[str, Any]]:
    """Return what a container holds, with its key if that is text or a number, or its index."""
    if isinstance(node, dict):
        return [(str(key), value) for key, value in dict.items(node) if isinstance(key, str) or is_number(key)]
    return [(str(index), value) for index, value in enumerate(node)] if isinstance(node, (list, tuple)) else []


def named_tensors(node: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors that a dictionary holds under names, without attributes, which could hide methods.

    They share the memory of those in the dictionary.
    """
    tensors = {name: value for name, value in dict.items(node) if isinstance(name, str) and isinstance(value, Tensor)}
    return {name: Tensor.detach(tensor) for name, tensor in tensors.items()}
