"""Which tensors are convolution kernels, and which of their filters form pairs.

Filters form pairs only where they see the same input: all i < j of a dense layer, i < j within each group of a grouped
one. A module tells exactly (`module_kernels`); a file has names and shapes only, so its kernels are assumed
(`file_kernels`): a floating 4-D tensor is a Conv2d kernel; of those with one input channel a single one is dense,
several are depthwise; more groups cannot be seen. Patterns correct the guesses. Whatever is left out comes back with
its reason.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.similarity import Taps, to_filters, to_weight

FLOATING = ("float16", "bfloat16", "float32", "float64")  # the types that kernels are optimized in, or through
VANISHED = 1e-6  # a filter whose norm is below this share of the largest norm in its layer is dead
PARAMETRIZED = "the layer has no weight of its own (parametrized)"  # why a layer is skipped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PARTS = ("_g", "_v", "_orig", "_mask", ".original", ".original0", ".original1")  # of parametrized weights


@dataclass(frozen=True)
class TensorInfo:
    """What a file tells of a tensor: its dtype by name ("float32") and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """A layer's kernels: the tensor's name and shape as stored, and how its filters pair.

    shape: `[S, C, *taps]`, or `[C_in, C_out / groups, *taps]` when `transposed`. `assumed`: guessed from the shape
    alone.
    """

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    assumed: bool = False

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
        weight = to_weight(filters, self.taps)
        if self.transposed:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.to(dtype).contiguous()


@dataclass(frozen=True)
class Skipped:
    """A tensor that was left out, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Patterns:
    """The user's corrections, as globs over full tensor names (`layer1.*`).

    include: only these, and of these also 3-D and 5-D tensors; exclude: not these; groups: (glob, number of groups);
    transposed: these are kernels of transposed convolutions.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    groups: Sequence[tuple[str, int]] = ()
    transposed: Sequence[str] = ()

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError for a pattern that no name matches: it would silently do nothing."""
        names = list(names)
        for pattern in [*self.include, *self.exclude, *self.transposed, *(glob for glob, _ in self.groups)]:
            if not _matches(names, [pattern]):
                raise InputError(f"the pattern {pattern!r} matches no tensor; names look like {', '.join(names[:3])}")

    def refusal(self, name: str) -> str | None:
        """Return why the patterns leave the tensor out, or None."""
        if self.include and not _matches([name], self.include):
            return "not matched by --include"
        return "matched by --exclude" if _matches([name], self.exclude) else None


@dataclass
class Selection:
    """The kernels to work on, in their order, and what was left out."""

    kernels: list[Kernel] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, kernel: Kernel, reason: str | None = None) -> None:
        """Take the kernel in, or list it as skipped when there is a reason, or it has no pairs."""
        reason = reason or _without_pairs(kernel)
        if reason:
            self.skipped.append(Skipped(kernel.name, kernel.shape, reason))
        else:
            self.kernels.append(kernel)


def file_kernels(
    tensors: Mapping[str, TensorInfo], patterns: Patterns | None = None, unfit: Mapping[str, str] | None = None
) -> Selection:
    """Return the kernels of a state dict, from names and shapes.

    tensors: name → dtype and shape. unfit: name → why the tensor cannot be worked on by itself, such as memory that it
    shares with one before it. Raises InputError for a pattern that matches nothing or a number of groups that does not
    fit. Source: the table of kernel families in this module's head.
    """
    patterns, unfit = patterns or Patterns(), unfit or {}
    candidates = {name: info for name, info in tensors.items() if 3 <= len(info.shape) <= 5}
    patterns.check(candidates)
    included = bool(patterns.include)
    unusable = {name: unfit.get(name) or _not_a_kernel(name, info, included) for name, info in candidates.items()}
    single_channel = Counter(  # by number of axes, and before the patterns: leaving one out tells nothing of the others
        len(info.shape) for name, info in candidates.items() if info.shape[1] == 1 and not unusable[name]
    )
    selection = Selection()
    for name, info in candidates.items():
        depthwise = info.shape[1] == 1 and not unusable[name] and single_channel[len(info.shape)] > 1
        reason = unfit.get(name) or patterns.refusal(name) or unusable[name]
        selection.add(_assume(name, info.shape, patterns, depthwise), reason)
    return selection


def module_kernels(
    model: nn.Module, patterns: Patterns | None = None, names: Mapping[str, str] | None = None
) -> Selection:
    """Return the kernels of every convolution in a module, exactly; a shared weight counts once.

    Names are those of `model.state_dict()`, or what `names` maps them to. Other layers with a `weight` of the shape of
    kernels are listed as skipped. Raises InputError for a pattern that matches nothing.
    """
    patterns, names = patterns or Patterns(), names or {}
    selection = Selection()
    owners: dict[int, str] = {}
    layers = [(f"{path}.weight".lstrip("."), layer) for path, layer in model.named_modules() if _has_kernels(layer)]
    patterns.check([names.get(path, path) for path, _ in layers])
    for path, layer in layers:
        name, weight = names.get(path, path), _own_weight(layer)
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            reason = PARAMETRIZED if weight is None else "the layer is lazy and not yet initialized"
            selection.skipped.append(Skipped(name, (), reason))
        elif id(weight) in owners:
            first = owners[id(weight)]  # a file may hold the two under one name
            selection.skipped.append(
                Skipped(path if name == first else name, tuple(weight.shape), f"shared with {first}")
            )
        elif not is_convolution(layer):
            reason = f"a {type(layer).__name__}, which is no convolution that convsim knows"
            selection.skipped.append(Skipped(name, tuple(weight.shape), patterns.refusal(name) or reason))
        else:
            owners[id(weight)] = name
            groups = layer.groups
            assert isinstance(groups, int)
            kernel = Kernel(name, tuple(weight.shape), groups, isinstance(layer, _TRANSPOSED))
            selection.add(kernel, patterns.refusal(name) or _wrong_type(weight))
    return selection


def warn_of_parametrized(selection: Selection) -> None:
    """Warn, once, of the layers that a library call leaves out because their weight is made anew at every call."""
    names = [skipped.name for skipped in selection.skipped if skipped.reason == PARAMETRIZED]
    if names:
        warnings.warn(
            f"parametrized layers are left out: {', '.join(names)}; "
            "torch.nn.utils.parametrize.remove_parametrizations gives them a weight of their own",
            stacklevel=3,
        )


def living_filters(filters: Tensor) -> Tensor:
    """Return which filters of a layer are alive: True where the L2 norm is at least 1e-6 of the largest in the layer.

    filters: `[groups, S / groups, N, C]`, finite (`Kernel.to_filters`); the result is `[groups, S / groups]`. Zero
    filters are dead. Weight decay leaves filters at 1e-25 of their layer, whose squares vanish in float32: norms are
    taken in float64.
    """
    found = filters.cpu() if filters.device.type == "mps" else filters  # mps has no float64
    norms = torch.linalg.vector_norm(found, dim=(-2, -1), dtype=torch.float64)
    return ((norms > 0) & (norms >= VANISHED * norms.max())).to(filters.device)


def is_convolution(layer: nn.Module) -> bool:
    """Return whether a module is a (transposed) convolution of one to three axes."""
    return isinstance(layer, _CONVOLUTIONS + _TRANSPOSED)


def _has_kernels(layer: nn.Module) -> bool:
    """Say whether a layer is a convolution, or its weight has the shape of one's (torchvision's DeformConv2d)."""
    weight = _own_weight(layer)
    if is_convolution(layer) or weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return is_convolution(layer)
    return weight.is_floating_point() and 3 <= weight.ndim <= 5


def _own_weight(layer: nn.Module) -> nn.Parameter | None:
    return dict(layer.named_parameters(recurse=False)).get("weight")


def weight_of(model: nn.Module, kernel: Kernel) -> nn.Parameter:
    """Return the parameter that a kernel of `module_kernels` names."""
    return model.get_parameter(kernel.name)


def _assume(name: str, shape: tuple[int, ...], patterns: Patterns, depthwise: bool) -> Kernel:
    transposed = _matches([name], patterns.transposed)
    given = [groups for glob, groups in patterns.groups if fnmatchcase(name, glob)]
    groups = given[-1] if given else shape[0] if depthwise and not transposed else 1
    if groups < 1 or shape[0] % groups:
        raise InputError(f"--groups: {groups} groups do not divide the {shape[0]} filters of {name} {list(shape)}")
    return Kernel(name, shape, groups, transposed, assumed=not given)


def _not_a_kernel(name: str, info: TensorInfo, included: bool) -> str | None:
    if info.dtype not in FLOATING:
        return f"its type {info.dtype} cannot be optimized"
    if 0 in info.shape:
        return "empty"
    if name.endswith(_PARTS):
        return "a part of a parametrized weight (weight_norm, spectral_norm, pruning), not the kernel itself"
    if len(info.shape) != 4 and not included:
        return f"{len(info.shape)}-D: taken for a kernel only by --include"
    return None


def _wrong_type(weight: Tensor) -> str | None:
    name = str(weight.dtype).removeprefix("torch.")
    return None if name in FLOATING else f"its type {name} cannot be optimized"


def _without_pairs(kernel: Kernel) -> str | None:
    if kernel.pairs:
        return None
    if kernel.groups > 1:
        return "depthwise: one filter per group, no pairs" + (" (assumed from its shape)" if kernel.assumed else "")
    return "a single filter, no pairs"


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    patterns = list(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
