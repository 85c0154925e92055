"""A layer's kernels: how they are stored, how their filters pair, which are alive; and which layers are worked on.

A selection holds the kernels of a model or a file, what is left out and why; the user's patterns decide it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from glob import escape
from math import prod
from typing import Any

import torch
from torch import Tensor

from convsim_cli.errors import InputError, kind_of
from convsim_cli.precision import Taps
from convsim_cli.similarity import to_filters, to_weight

FLOATING = ("float16", "bfloat16", "float32", "float64")  # the types that kernels are optimized in, or through
VANISHED = 1e-6  # a filter whose norm is below this share of the largest norm in its layer is dead
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # parts that wrappers add


@dataclass(frozen=True)
class Kernel:
    """A layer's kernels: the tensor's name and shape as stored, and how its filters pair.

    shape: `[S, C, *taps]`, or `[C_in, C_out / groups, *taps]` when `transposed`. `assumed`: guessed from the shape
    alone. `computed`: the layer computes the weight from other parameters.
    """

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    assumed: bool = False
    computed: bool = False

    @property
    def filters(self) -> int:
        """Number of output channels S."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def channels(self) -> int:
        """Number of input channels that the layer takes, over all groups."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def taps(self) -> Taps:
        return self.shape[2:]

    @property
    def pairs(self) -> int:
        """Number of pairs i < j, within groups."""
        each = self.filters // self.groups
        return self.groups * each * (each - 1) // 2

    @property
    def pointwise(self) -> bool:
        """Whether a filter has a single tap per channel (1×1): L_CS is then pure norm."""
        return prod(self.taps) == 1

    def to_convolution(self, weight: Tensor) -> Tensor:
        """Return the stored weight as `[S, C, *taps]`: the first two axes of a transposed one swapped per group."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def to_filters(self, weight: Tensor) -> Tensor:
        """Return the stored weight as `[groups, S / groups, N, C]`, float32 or float64 (`similarity.to_filters`)."""
        return to_filters(self.to_convolution(weight), self.groups)[0]

    def to_stored(self, filters: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `to_filters`: a contiguous weight of the stored shape, in `dtype`."""
        return self.view_as_stored(filters).to(dtype).contiguous()

    def view_as_stored(self, filters: Tensor) -> Tensor:
        """Undo `to_filters` without a copy: filters in the stored shape, with strides of their own."""
        return self.to_convolution(to_weight(filters, self.taps))  # swapping the axes undoes itself


def refuse_meta(name: str, weight: Tensor) -> None:
    """Raise InputError for a weight without values: on the meta device, or offloaded there."""
    if weight.is_meta:
        raise InputError(f"{name} is on the meta device and has no values; move the model to a device first")


def living_filters(filters: Tensor) -> Tensor:
    """Return which filters of a layer are alive: True where the L2 norm is at least 1e-6 of the largest in the layer.

    filters: `[groups, S / groups, N, C]`, finite (`Kernel.to_filters`); the result is `[groups, S / groups]`. Zero
    filters are dead. Weight decay leaves filters at 1e-25 of their layer, whose squares vanish in float32: norms are
    taken in float64.
    """
    found = filters.cpu() if filters.device.type == "mps" else filters  # mps has no float64
    norms = torch.linalg.vector_norm(found, dim=(-2, -1), dtype=torch.float64)
    return ((norms != 0) & ~(norms < VANISHED * norms.max())).to(filters.device)  # NaN is alive, and so it shows


@dataclass(frozen=True)
class Skipped:
    """A skipped tensor, and the reason.

    unsupported: convsim cannot act on it as it is. inert: there is nothing to do, for it has no pairs, or only norms
    matter, which are held. Otherwise it counts elsewhere, or you left it out.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    unsupported: bool = False
    inert: bool = False

    def record(self) -> dict[str, Any]:
        """Return name, shape and reason, as in a JSON document."""
        return {"name": self.name, "shape": list(self.shape), "reason": self.reason}


@dataclass(frozen=True)
class Patterns:
    """The user's corrections, as globs over full tensor names (`layer1.*`).

    include: only these, and of these also 3-D and 5-D tensors; exclude: not these; groups: (glob, number of groups);
    transposed: these are kernels of transposed convolutions; layout: how a file stores its kernels, guessed for None. A
    pattern that equals a tensor's name matches only that tensor, whatever characters it contains. Raises InputError for
    anything but a list of strings.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    groups: Sequence[tuple[str, int]] = ()
    transposed: Sequence[str] = ()
    layout: str | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "transposed"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise InputError(f"`{name}` is the string {value!r}; expected a list of patterns, such as [{value!r}]")
            if not isinstance(value, Collection):
                raise InputError(f"`{name}` is {kind_of(value)}; expected a list of patterns, such as ['layer1.*']")
            for pattern in value:
                if not isinstance(pattern, str):
                    raise InputError(f"`{name}` contains {pattern!r}; expected patterns, such as ['layer1.*']")

    def resolved(self, names: Collection[str]) -> Patterns:
        """Return the same patterns with what is literal in these names escaped: `layers[0].weight`, `layers[0].*`.

        Raises InputError for a pattern that matches no name: it would have no effect.
        """

        def resolve(patterns: Iterable[str]) -> list[str]:
            return [_resolved(pattern, names) for pattern in patterns]

        groups = [(_resolved(pattern, names), count) for pattern, count in self.groups]
        return Patterns(resolve(self.include), resolve(self.exclude), groups, resolve(self.transposed), self.layout)

    def forced(self, names: Collection[str], left_out: Container[str]) -> set[str]:
        """Return the skipped names that `include` requests explicitly: by a pattern that matches nothing else.

        `*` selects kernels, not everything.
        """
        found = [[name for name in names if fnmatchcase(name, pattern)] for pattern in self.include]
        return {name for some in found if all(name in left_out for name in some) for name in some}

    def refusal(self, name: str) -> str | None:
        """Return why the patterns exclude the tensor, or None."""
        if self.include and not matches([name], self.include):
            return "not matched by `include`"
        return "matched by `exclude`" if matches([name], self.exclude) else None


@dataclass
class Selection:
    """The kernels to work on, in their order, and what is left out.

    doubts: layers of a file whose guess is uncertain: name → what it may be instead. guess_warnings: a line for each
    kind of doubt, with the names of the layers.
    """

    kernels: list[Kernel] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    doubts: dict[str, str] = field(default_factory=dict)
    guess_warnings: list[str] = field(default_factory=list)

    def require_kernels(self, subject: str) -> None:
        """Raise InputError, with the skipped tensors, if nothing is selected. subject: "the model has", or "FILE:"."""
        if not self.kernels:
            raise InputError(f"{subject} {self.no_kernels()}")

    def no_kernels(self) -> str:
        """Return the message for an empty selection, with the skipped tensors."""
        own = ("not matched by", "matched by")  # the user's patterns: known, so they come last
        skipped = sorted(self.skipped, key=lambda entry: entry.reason.startswith(own))
        left_out = ", ".join(f"{entry.name} ({entry.reason})" for entry in skipped[:3])
        return "no convolution kernels that form pairs" + (f"; skipped: {left_out}" if left_out else "")

    def add(self, kernel: Kernel, reason: str | None = None, unsupported: bool = False, inert: bool = False) -> None:
        """Select the kernel, or list it as skipped where there is a reason or it has no pairs."""
        no_pairs = ""
        if not kernel.pairs:
            depthwise = "depthwise: one filter per group, no pairs" + " (assumed from its shape)" * kernel.assumed
            no_pairs = depthwise if kernel.groups > 1 else "a single filter, no pairs"
        if reason or no_pairs:
            inert = inert or (bool(no_pairs) and (unsupported or not reason))
            unsupported = unsupported and not no_pairs
            self.skipped.append(Skipped(kernel.name, kernel.shape, reason or no_pairs, unsupported, inert))
        else:
            self.kernels.append(kernel)


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    patterns = list(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _resolved(pattern: str, names: Collection[str]) -> str:
    """Return a pattern, escaped where it is a name, or its brackets where they stand in names."""
    if pattern in names:
        return escape(pattern)
    for meant in (pattern.replace("[", "[[]"), pattern):
        if matches(names, [meant]):
            return meant
    some = [name for name, _ in zip(names, range(3), strict=False)]
    like = f"names look like {', '.join(some)}" if some else "there are no kernels to match"
    if matches(names, [f"*{pattern}"]):  # behind a prefix, such as `module.`
        like = f"did you mean {f'*{pattern}'!r}?"
    raise InputError(f"the pattern {pattern!r} matches no tensor; {like}")


@contextmanager
def undone_on_failure(weights: Sequence[Tensor]) -> Iterator[None]:
    """Restore the weights, bit for bit, if the block raises."""
    former = [weight.detach().clone() for weight in weights]
    try:
        yield
    except BaseException:
        for weight, was in zip(weights, former, strict=True):
            weight.copy_(was)
        raise


def in_layer_order(names: Iterable[str]) -> list[str]:
    """Return the names of a file in their order, or where that is the alphabet's, in what may be the layers' order."""
    listed = list(names)
    if is_alphabetical(listed):
        return sorted(listed, key=lambda name: [_part_order(part) for part in name.split(".")])
    return listed


def is_alphabetical(names: Sequence[str]) -> bool:
    """Return whether names are sorted, numbers by digit or by value; the order of the layers is then unknown."""
    return any(list(names) == sorted(names, key=order) for order in (None, natural_order))


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer2 before layer10."""
    parts = ((part.isdecimal(), part, part.lstrip("0")) for part in re.split(r"(\d+)", name))
    return [(len(digits), digits) if is_number else (-1, part) for is_number, part, digits in parts]


@cache
def _part_order(part: str) -> tuple[float, int, str]:
    """Sort modules by their numbers, of one number convolutions first: conv1, bn1, layer1, conv2, bn2."""
    if re.match("(conv_)?(stem|first)|patch_embed|downsample|pool", part):
        return -math.inf, 0, part
    if re.match("(conv_)?(head|last|final)|fc|classifier|shortcut", part):
        return math.inf, 3, part
    number = re.search(r"\d+", part)
    kind = 0 if "conv" in part else 1 if re.match("bn|.*norm", part) else 2
    return float(number[0]) if number else math.inf, kind, part  # int refuses thousands of digits
