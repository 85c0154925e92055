"""The kernels of a state dict, assumed from names and shapes.

A floating 4-D tensor is taken for a Conv2d kernel, and a 3-D one for a Conv1d kernel where there are no 4-D kernels.
Those with one input channel are depthwise where at least two of them have several filters and several taps, and dense
otherwise; other groups cannot be seen. Patterns correct these guesses, and `doubts` lists those that may well be wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from convsim_cli.errors import InputError
from convsim_cli.kernels.doubts import doubts
from convsim_cli.kernels.kernel import FLOATING, Kernel
from convsim_cli.kernels.names import says_fixed, says_no_kernel, says_transposed, weight_word
from convsim_cli.kernels.selection import Patterns, Selection, matches

_PARTS = ("_g", "_v", "_orig", "_mask", ".original", ".original0", ".original1")  # of parametrized weights
_NO_PAIRS = "one channel, and named like a transposed convolution: with one output or depthwise it has no pairs"
_MOST_TAPS = 1024  # of a 3-D tensor that is taken without being asked for: the experts of a mixture have more


@dataclass(frozen=True)
class TensorInfo:
    """What a file tells of a tensor: its dtype by name ("float32") and its shape."""

    dtype: str
    shape: tuple[int, ...]


Infos = Mapping[str, TensorInfo]


def file_kernels(
    tensors: Infos,
    patterns: Patterns | None = None,
    unfit: Mapping[str, str] | None = None,
    set_aside: Mapping[str, str] | None = None,
) -> Selection:
    """Return the kernels of a state dict, from names and shapes.

    tensors: name → dtype and shape. unfit: name → why the tensor cannot be worked on by itself, such as memory that it
    shares with one before it. set_aside: name → why the tensor is none of the network's, such as an average of
    another; a pattern of `include` that matches nothing else takes it all the same, and so tensors whose names and
    shapes are not those of kernels. Raises InputError for a pattern that matches nothing or a number of groups that
    does not fit. Source: the table of kernel families in this module's head.
    """
    unfit = unfit or {}
    candidates = {name: info for name, info in tensors.items() if 3 <= len(info.shape) <= 5}
    patterns = (patterns or Patterns()).resolved(candidates)
    unusable = {
        name: reason for name, info in candidates.items() if (reason := unfit.get(name) or _unusable(name, info))
    }
    unlike = _unlike(candidates) | {name: reason for name, reason in (set_aside or {}).items() if name in candidates}
    forced = patterns.forced(candidates, unlike)
    left_out = {name: reason for name, reason in unlike.items() if name not in forced} | unusable
    left_out |= _other_axes(candidates, left_out, bool(patterns.include))
    depthwise = _depthwise(candidates, left_out, patterns)
    selection = Selection()
    for name, info in candidates.items():
        kernel = _assume(name, info.shape, patterns, name in depthwise)
        reason = unfit.get(name) or patterns.refusal(name) or left_out.get(name) or _without_pairs(kernel)
        selection.add(kernel, reason)
    selection.doubts = doubts(selection, [name for name in candidates if name in depthwise])
    return selection


def _assume(name: str, shape: tuple[int, ...], patterns: Patterns, depthwise: bool) -> Kernel:
    transposed = matches([name], patterns.transposed)
    given = [groups for glob, groups in patterns.groups if fnmatchcase(name, glob)]
    groups = given[-1] if given else shape[0] if depthwise and not transposed else 1
    if groups < 1 or shape[0] % groups:
        raise InputError(f"`groups`: {groups} groups do not divide the {shape[0]} filters of {name} {list(shape)}")
    return Kernel(name, shape, groups, transposed, assumed=not given)


def _without_pairs(kernel: Kernel) -> str | None:
    """Return why a kernel of one channel has no pairs if it is transposed, as its name says."""
    guessed = kernel.assumed and not kernel.transposed and says_transposed(kernel.name)
    return _NO_PAIRS if guessed and kernel.shape[1] == 1 < kernel.shape[0] else None


def _depthwise(candidates: Infos, left_out: Container[str], patterns: Patterns) -> set[str]:
    """Return the tensors that are taken for depthwise kernels, decided for each number of axes.

    Whether a pattern leaves one out tells nothing of the others, so that makes no difference.
    """
    single = {name: info.shape for name, info in candidates.items() if info.shape[1] == 1 and name not in left_out}
    evidence = Counter(
        len(shape)
        for name, shape in single.items()
        if shape[0] > 1 and prod(shape) > shape[0] and not says_transposed(name)
        if not matches([name], patterns.transposed)
    )
    return {name for name, shape in single.items() if evidence[len(shape)] > 1}


def _unusable(name: str, info: TensorInfo) -> str | None:
    """Return why a tensor cannot be worked on, whatever the patterns say."""
    if info.dtype not in FLOATING:
        return f"its type {info.dtype} cannot be optimized"
    if 0 in info.shape:
        return "empty"
    if name.endswith(_PARTS):
        return "a part of a parametrized weight (weight_norm, spectral_norm, pruning), not the kernel itself"
    return None


def _unlike(candidates: Infos) -> dict[str, str]:
    """Return the tensors that are taken for kernels only if they are asked for: name → what speaks against it."""
    reasons = {}
    usual = {weight_word(name) for name, info in candidates.items() if info.shape[1] > 1} - {None}
    for name, info in candidates.items():
        filters, channels, *taps = info.shape
        if says_no_kernel(name):
            reasons[name] = "named like a statistic, a gain or an embedding, not a kernel"
        elif channels == 1 < filters and prod(taps) == 1:
            reasons[name] = "one value per filter: a gain or a statistic, not a kernel"
        elif channels == 1 < filters and says_fixed(name):
            reasons[name] = "one channel, and named like a filter that no training changes"
        elif channels == 1 < filters and usual and weight_word(name) not in usual:
            reasons[name] = "one channel, and not named as other kernels are: a filter that no training changes"
    return reasons


def _other_axes(candidates: Infos, left_out: Container[str], included: bool) -> dict[str, str]:
    """Return the tensors that are not 4-D and left out for that: nothing asks for them, nor stands for them."""
    if included:
        return {}
    usable = {name: info.shape for name, info in candidates.items() if name not in left_out}
    images = any(len(shape) == 4 and shape[0] > 1 for shape in usable.values())
    named = any(len(shape) == 3 and weight_word(name) for name, shape in usable.items())
    taken = {
        name
        for name, shape in usable.items()
        if len(shape) == 3 and not images and shape[2] <= _MOST_TAPS and (weight_word(name) or not named)
    }
    return {
        name: f"{len(shape)}-D: taken for a kernel only by `include` '*'"
        for name, shape in usable.items()
        if len(shape) != 4 and name not in taken
    }
