"""Which names in a checkpoint belong to training, not to the network: optimizer state and averaged copies."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from convsim_cli.kernels import TensorInfo

_OPTIMIZER = re.compile(
    r"(?i:optimi[sz]er|(?<![a-z])optims?(?![a-z])|(?<![a-z])opt_(states?|state_dict|dict)(?![a-z]))|optim(?=[A-Z])|"
    r"(?i:(?<![a-z])(adam|adamw|adagrad|adadelta|adafactor|rmsprop|master_(params|weights)|fp32_from_fp16)(?![a-z]))"
)
_MOMENTS = re.compile(  # tensors that optimizers keep per parameter, under names that nothing else has
    r"(?:^|[._/])(exp_avg|max_exp_avg|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta|mu_product|row_var|col_var|"
    r"previous_grad|slow_buffer|first_moment|second_moment|preconditioner)(?![a-z])"
)
_LAST = frozenset(
    {"step", "step_size", "grad", "main_grad", "velocity"}
)  # the same, but only as the last part of a name

_AVERAGES = frozenset({"ema", "swa", "ewma", "polyak"})
_COPIES = frozenset({"averaged", "shadow", "teacher", "momentum"})  # alone, or with a word for a network
_RELATED = frozenset({"avg", "average", "mean", "target", "slow", "velocity"})  # only with a word for a network
_NETWORK = frozenset(
    {"model", "net", "network", "module", "params", "parameters", "weights", "state", "dict", "encoder"}
)
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")

Parts = Sequence[str]


def is_optimizer_state(name: str) -> bool:
    """Return whether a tensor or a container of this name, `a.b.c`, belongs to an optimizer."""
    return bool(_OPTIMIZER.search(name) or _MOMENTS.search(name) or _parts(name)[-1] in _LAST)


def is_averaged(name: str) -> bool:
    """Return whether a part of a name is one that averaged copies of a network have, such as `model_ema`."""
    return any(map(_says_average, _parts(name)))


def set_aside(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the tensors of a file that belong to training: name → reason.

    Those are an optimizer's, and copies with a name such as `model_ema` of tensors that have the same shape and, beyond
    such a prefix or without such a suffix, the same name. Of tensors with fewer than three axes nothing is said.
    """
    large = {name: info.shape for name, info in tensors.items() if len(info.shape) >= 3}
    optimizer = {name for name in large if is_optimizer_state(name)}
    reasons = dict.fromkeys(optimizer, "of an optimizer's state, not of the network")
    averaged = {name: shape for name, shape in large.items() if name not in optimizer and is_averaged(name)}
    own = {name: shape for name, shape in large.items() if name not in optimizer and name not in averaged}
    reasons |= dict.fromkeys(_copies(averaged, own), "a copy of another tensor, such as a moving average")
    return {name: reasons[name] for name in large if name in reasons}


Shapes = Mapping[str, tuple[int, ...]]


def _copies(averaged: Shapes, own: Shapes) -> Iterator[str]:
    """Yield the tensors that are copies of others.

    The copies under one prefix are those of one other prefix, and at least half as many as there are tensors under it:
    a single name in common is chance.
    """
    groups: dict[str, dict[str, set[str]]] = defaultdict(dict)  # prefix → tensor → prefixes of its originals
    ends = _by_end(own)
    for name, shape in averaged.items():
        parts = _parts(name)
        place = next(number for number, part in enumerate(parts) if _says_average(part))
        if place == len(parts) - 1:
            found = any(own.get(other) == shape for other in _without_suffix(name, parts[-1]))
            groups[name][name] = {""} if found else set()
        else:
            prefixes = {prefix for prefix, other in _beyond(parts[place + 1 :], ends) if own[other] == shape}
            groups[".".join(parts[: place + 1])][name] = prefixes
    for copies in groups.values():
        counts = Counter(prefix for prefixes in copies.values() for prefix in prefixes)
        prefix, count = counts.most_common(1)[0] if counts else ("", 0)
        if 2 * count >= len(copies):
            yield from (name for name, prefixes in copies.items() if prefix in prefixes)


def _beyond(rest: Parts, ends: Mapping[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield (prefix, name) of the tensors whose names end as a copy's, apart from `shadow.model` before that."""
    while rest:
        yield from ends.get(_joined(rest), {}).items()
        if rest[0] not in _NETWORK and rest[0] not in _WRAPPERS and not _says_average(rest[0]):
            break
        rest = rest[1:]


def _by_end(names: Shapes) -> dict[str, dict[str, str]]:
    """Return the ends of names, without dots as some averages store them → what stands before → the name."""
    ends: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        parts = _parts(name)
        for place in range(len(parts)):
            ends[_joined(parts[place:])].setdefault(_joined(parts[:place]), name)
    return ends


def _without_suffix(name: str, last: str) -> list[str]:
    """Return what a tensor may be called whose copy has this last part: `c.weight` for `c.weight_ema`."""
    before = name[: -len(last)]
    words = [word for word in last.split("_") if word.lower() not in _AVERAGES | _COPIES | _RELATED]
    return [before.rstrip("./"), before + "_".join(words)]


def _says_average(part: str) -> bool:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)}
    others = words - _COPIES - _RELATED
    named = others <= _NETWORK
    return bool(words & _AVERAGES or (words & _COPIES and named) or (words & _RELATED and others and named))


def _joined(parts: Parts) -> str:
    return "".join(part for part in parts if part not in _WRAPPERS)


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)
