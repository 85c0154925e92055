"""A checkpoint's tensors loaded into a network, under whatever prefix the file holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

from torch import Tensor, nn

from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.errors import InputError
from convsim_cli.kernels import FLOATING

_USUAL = ("", "module.", "model.")  # prefixes of plain files and of the usual wrappers
_COUNTER = "num_batches_tracked"  # of batch normalization: files may do without


def match_names(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Return model name → file name for every tensor of a network.

    A common prefix in the file, such as `module.`, is found by itself; a parameter that the file holds under another of
    its names is found there. arch: what to call the network. What the file holds beyond the network, and prefixes that
    would have fitted as well, are added to the checkpoint's `note`. Raises InputError that lists what is missing, what
    has another shape (got and expected), and the first tensor that is no floating one where a floating one goes.
    """
    state, tensors = model.state_dict(), checkpoint.tensors
    prefix, *others = _common_prefixes(state, tensors)
    names = _places(model, state, prefix, tensors)
    missing = [name for name in state if name not in names and not name.endswith(_COUNTER)]
    wrong = [
        f"{ours} is {list(tensors[theirs].shape)}, expected {list(state[ours].shape)}"
        for ours, theirs in names.items()
        if tensors[theirs].shape != tuple(state[ours].shape)
    ]
    unexpected = _unexpected(tensors, prefix, {*names.values(), *(prefix + name for name in state)}, others)
    if missing or wrong:
        said = [f"{len(missing)} of {len(state)} tensors missing ({_some(missing)})"] if missing else []
        said += [f"{len(wrong)} of another shape ({_some(wrong)})"] if wrong else []
        said += [f"{len(unexpected)} that it does not have ({_some(unexpected)})"] if unexpected else []
        raise InputError(f"{checkpoint.path}: does not fit --arch: {'; '.join(said)}")
    _refuse_codes(state, names, checkpoint)
    if others:
        fit = ", ".join(other or "no prefix" for other in others)
        took = f"took the tensors under {prefix}" if prefix else "took the tensors without a prefix"
        checkpoint.notes.append(f"{checkpoint.path}: {took}; those under {fit} would fit as well")
    if unexpected:
        checkpoint.notes.append(
            f"{checkpoint.path}: --arch{f' {arch}' if arch else ''} has no place for {len(unexpected)} of its tensors "
            f"({_some(unexpected)}); they are left as they are",
        )
    return names


def load_weights(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Copy a checkpoint's tensors into a network and return `match_names`, whose errors it raises."""
    names = match_names(model, checkpoint, arch)
    model.load_state_dict({ours: checkpoint.load(theirs) for ours, theirs in names.items()}, strict=False)
    return names


def _common_prefixes(state: Mapping[str, object], tensors: Mapping[str, object]) -> list[str]:
    """The prefix under which most of a network's names are found in a file, and those that would do as well.

    Of several, the plain ones and those of wrappers come first, and averaged copies (EMA) last.
    """
    found: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(place + 1 for place, character in enumerate(name) if character == ".")]
        found.update(name[:start] for start in starts if name[start:] in state and not name.endswith(_COUNTER))
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    return sorted(best, key=lambda prefix: (prefix not in _USUAL, "ema" in prefix.lower())) or [""]


def _places(
    model: nn.Module, state: Mapping[str, object], prefix: str, tensors: Mapping[str, object]
) -> dict[str, str]:
    """Where each of a network's tensors is in a file; a parameter of several names may be under any of them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = {id(tensor): prefix + name for name, tensor in named if prefix + name in tensors}
    elsewhere = {name: places[id(tensor)] for name, tensor in named if id(tensor) in places}
    found = {name: prefix + name if prefix + name in tensors else elsewhere.get(name) for name in state}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _unexpected(tensors: Iterable[str], prefix: str, expected: Container[str], others: Iterable[str]) -> list[str]:
    """What a file holds under a prefix beyond a network's tensors, and apart from the copies under other prefixes."""
    copies = tuple(other for other in others if other)
    return [
        name
        for name in tensors
        if name.startswith(prefix)
        and name not in expected
        and not name.endswith(_COUNTER)
        and not (copies and name.startswith(copies))
    ]


def _refuse_codes(state: Mapping[str, Tensor], names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise InputError where a file holds the codes of a quantized weight: copied, they would be taken for weights."""
    types = {
        theirs: checkpoint.tensors[theirs].dtype for ours, theirs in names.items() if state[ours].is_floating_point()
    }
    codes = [name for name, kind in types.items() if kind not in FLOATING]
    if codes:
        more = f", and {len(codes) - 1} others like it" if codes[1:] else ""
        raise InputError(f"{checkpoint.path}: {codes[0]} is {types[codes[0]]}: dequantize it first{more}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
