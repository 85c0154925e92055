"""A checkpoint's tensors loaded into a network, whatever prefix or wrapper their names have in the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping

from torch import Tensor, nn

from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.checkpoints.training_state import is_averaged, is_optimizer_state
from convsim_cli.errors import InputError
from convsim_cli.kernels import FLOATING
from convsim_cli.networks.shared_weights import check_copies, names_of_one_tensor

_USUAL = ("", "model.")  # prefixes
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_COUNTER = "num_batches_tracked"  # of batch normalization: optional in files


def match_names(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Return the network's name → the checkpoint's for every tensor of a network.

    A common prefix in the file is found, and names of wrappers such as `module.` are ignored wherever they stand. A
    parameter that the file holds under another of its names is found there. arch: what to call the network. Tensors
    that the network does not have, and prefixes that would have fitted as well, are added to the checkpoint's `notes`.
    Raises InputError that lists what is missing, what has another shape (found and expected), and the first tensor of
    integers where floating-point numbers are expected.
    """
    state = model.state_dict(keep_vars=True)
    ours, theirs = _without_wrappers(state, checkpoint.tensors)
    prefix, *others = _common_prefixes(ours, theirs)
    names = _places(state, ours, prefix, theirs)
    unexpected = _unexpected(theirs, prefix, {*names.values(), *(theirs.get(prefix + name) for name in ours)}, others)
    _check_fit(state, names, unexpected, checkpoint)
    _refuse_codes(state, names, checkpoint)
    if others:
        fit = ", ".join(other or "no prefix" for other in others)
        took = f"took the tensors under {prefix}" if prefix else "took the tensors without a prefix"
        checkpoint.notes.append(f"{checkpoint.path}: {took}; those under {fit} would fit as well")
    if unexpected:
        checkpoint.notes.append(
            f"{checkpoint.path}: `arch`{f' {arch}' if arch else ''} has no place for {len(unexpected)} of its tensors "
            f"({_some(unexpected)}); they are left as they are"
        )
    return names


def load_weights(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Copy a checkpoint's tensors into a network and return `match_names`.

    Raises its errors, and InputError where copies of one parameter differ.
    """
    names = match_names(model, checkpoint, arch)
    check_copies(model, checkpoint, names)
    model.load_state_dict({ours: checkpoint.load(theirs) for ours, theirs in names.items()}, strict=False)
    return names


def _without_wrappers(ours: Iterable[str], theirs: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names of a network and of a file without those of wrappers, each → the full name.

    Full names stay where two of them would become one.
    """
    names = [list(ours), list(theirs)]
    plain = [{_WRAPPERS.sub("", name): name for name in some} for some in names]
    if [len(some) for some in plain] != [len(some) for some in names]:
        plain = [{name: name for name in some} for some in names]
    return plain[0], plain[1]


def _common_prefixes(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the prefix under which a file holds most of a network's names, then those that fit equally well.

    Of several, no prefix and `model.` come first, and averaged copies last. What belongs to an optimizer is none.
    """
    found: Counter[str] = Counter()
    for name in theirs:
        starts = [0, *(place + 1 for place, character in enumerate(name) if character == ".")]
        if not name.endswith(_COUNTER):
            found.update(name[:start] for start in starts if name[start:] in ours)
    found = Counter({prefix: count for prefix, count in found.items() if not is_optimizer_state(prefix.rstrip("."))})
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    return sorted(best, key=lambda prefix: (prefix not in _USUAL, is_averaged(prefix))) or [""]


def _places(
    state: Mapping[str, Tensor], ours: Mapping[str, str], prefix: str, theirs: Mapping[str, str]
) -> dict[str, str]:
    """Return the network's name → the file's; a tensor of several names may be under any of them."""
    found = {full: theirs[prefix + name] for name, full in ours.items() if prefix + name in theirs}
    for group in names_of_one_tensor(state):
        known = [found[name] for name in group if name in found]
        found |= {name: known[0] for name in group if known and name not in found}
    return {name: found[name] for name in state if name in found}


def _check_fit(
    state: Mapping[str, Tensor], names: Mapping[str, str], unexpected: list[str], checkpoint: Checkpoint
) -> None:
    """Raise InputError that lists what is missing and what has another shape."""
    missing = [name for name in state if name not in names and not name.endswith(_COUNTER)]
    wrong = [
        f"{ours} is {list(checkpoint.tensors[theirs].shape)}, expected {list(state[ours].shape)}"
        for ours, theirs in names.items()
        if checkpoint.tensors[theirs].shape != tuple(state[ours].shape)
    ]
    if missing or wrong:
        said = [f"{len(missing)} of {len(state)} tensors missing ({_some(missing)})"] if missing else []
        said += [f"{len(wrong)} of another shape ({_some(wrong)})"] if wrong else []
        said += [f"{len(unexpected)} that it does not have ({_some(unexpected)})"] if unexpected else []
        raise InputError(f"{checkpoint.path}: does not fit `arch`: {'; '.join(said)}")


def _unexpected(
    theirs: Mapping[str, str], prefix: str, expected: Container[str | None], others: Iterable[str]
) -> list[str]:
    """Return the tensors of a file that a network does not have, under its prefix and apart from other copies of it."""
    copies = tuple(other for other in others if other)
    return [
        full
        for name, full in theirs.items()
        if name.startswith(prefix)
        and full not in expected
        and not name.endswith(_COUNTER)
        and not (copies and name.startswith(copies))
    ]


def _refuse_codes(state: Mapping[str, Tensor], names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise InputError where a file holds the codes of a quantized weight, which are no weights."""
    types = {
        theirs: checkpoint.tensors[theirs].dtype for ours, theirs in names.items() if state[ours].is_floating_point()
    }
    codes = [name for name, kind in types.items() if kind not in FLOATING]
    if codes:
        more = f", and {len(codes) - 1} others like it" if codes[1:] else ""
        raise InputError(f"{checkpoint.path}: {codes[0]} is {types[codes[0]]}: dequantize it first{more}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
