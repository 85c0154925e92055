"""Where the state dicts are in the nested containers of a pickle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from convsim_cli.checkpoints.training_state import is_optimizer_state

_USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_DEEPEST = 8  # containers within containers that are searched

Found = tuple[tuple[str, ...], dict[str, Any]]  # the keys that lead to a state dict, and the state dict


def find_state_dicts(root: Any) -> list[Found]:
    """Return the dictionaries that hold tensors under names, the one to prefer first.

    They are found in dictionaries, lists and tuples, whose keys and indices make up the place. Optimizer state is left
    out. Preferred are state dicts with kernels, then the top level and the usual names, then the largest.
    """
    return sorted(_walk(root), key=lambda found: _preference(*found))


def named_tensors(node: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors that a dictionary holds under names."""
    return {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _walk(root: Any) -> Iterator[Found]:
    """Look into each container once, however many ways lead to it, or from it back to itself."""
    is_state_dict: dict[int, bool] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for where, node in waiting:
        if len(where) > _DEEPEST:
            continue
        if id(node) not in is_state_dict:
            names = named_tensors(node) if isinstance(node, dict) else {}
            is_state_dict[id(node)] = any(not is_optimizer_state(name) for name in names)
            waiting += [((*where, key), value) for key, value in _children(node)]
        if is_state_dict[id(node)]:
            yield where, node


def _children(node: Any) -> list[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    inner = [(str(key), value) for key, value in items if isinstance(value, (dict, list, tuple))]
    return [(key, value) for key, value in inner if not is_optimizer_state(key)]


def _preference(where: tuple[str, ...], state: dict[str, Any]) -> tuple[bool, int, int]:
    tensors = named_tensors(state)
    rank = -1 if not where else _USUAL.index(where[-1]) if where[-1] in _USUAL else len(_USUAL)
    return all(tensor.ndim != 4 for tensor in tensors.values()), rank, -len(tensors)
