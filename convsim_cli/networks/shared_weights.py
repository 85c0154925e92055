"""Parameters that a network holds under several names: a change has to reach each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel


def names_of_one_tensor(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names in a state dict, those of one tensor together: equal in memory, offset, shape and stride."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        groups.setdefault(place if tensor.numel() else name, []).append(name)
    return list(groups.values())


def check_copies(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Raise InputError where a checkpoint holds copies of one parameter that differ.

    names: the network's name of each tensor → the checkpoint's.
    """
    for group in names_of_one_tensor(model.state_dict(keep_vars=True)):
        first, *copies = dict.fromkeys(names[name] for name in group if name in names) or [""]
        for copy in copies:
            if not _same_bits(checkpoint.load(first), checkpoint.load(copy)):
                raise InputError(
                    f"{checkpoint.path}: {first} and {copy} are one parameter of the network, but differ; save the "
                    "network again, with its weights tied"
                )


def find_aliases(
    model: nn.Module, kernels: Iterable[Kernel], names: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Return each kernel's name → the checkpoint's other names of the same parameter, where there are any.

    names: as in `check_copies`; the network's own for None. Raises InputError for a kernel that the checkpoint also
    holds as part of another tensor.
    """
    state = model.state_dict(keep_vars=True)
    names = names or {name: name for name in state}
    aliases: dict[str, list[str]] = {}
    groups = names_of_one_tensor(state)
    for kernel in kernels:
        group = next((group for group in groups if kernel.name in [names.get(name) for name in group]), None)
        if group is None:  # a parametrized layer computes its weight: no tensor of the checkpoint holds it
            continue
        other = next((name for name in state if name not in group and _overlap(state[name], state[group[0]])), None)
        if other is not None and other in names:
            raise InputError(f"{kernel.name}: shares memory with {names[other]}, a tensor of another shape; exclude it")
        found = [name for name in dict.fromkeys(names[name] for name in group if name in names) if name != kernel.name]
        if found:
            aliases[kernel.name] = found
    return aliases


def _overlap(one: Tensor, other: Tensor) -> bool:
    if not (one.numel() and other.numel()) or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    (start, end), (other_start, other_end) = (_extent(tensor) for tensor in (one, other))
    return start < other_end and other_start < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first element of a tensor in its memory, and the one after its last."""
    start = int(tensor.storage_offset())
    return start, start + 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
