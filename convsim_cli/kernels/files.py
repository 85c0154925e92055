"""The kernels of a state dict, assumed from names and shapes.

A floating 4-D tensor is taken for a Conv2d kernel. Of those with one input channel a single one is dense, several are
depthwise; other groups cannot be seen. Patterns correct these guesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from convsim_cli.errors import InputError
from convsim_cli.kernels.kernel import FLOATING, Kernel
from convsim_cli.kernels.selection import Patterns, Selection, matches

_PARTS = ("_g", "_v", "_orig", "_mask", ".original", ".original0", ".original1")  # of parametrized weights


@dataclass(frozen=True)
class TensorInfo:
    """What a file tells of a tensor: its dtype by name ("float32") and its shape."""

    dtype: str
    shape: tuple[int, ...]


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


def _assume(name: str, shape: tuple[int, ...], patterns: Patterns, depthwise: bool) -> Kernel:
    transposed = matches([name], patterns.transposed)
    given = [groups for glob, groups in patterns.groups if fnmatchcase(name, glob)]
    groups = given[-1] if given else shape[0] if depthwise and not transposed else 1
    if groups < 1 or shape[0] % groups:
        raise InputError(f"`groups`: {groups} groups do not divide the {shape[0]} filters of {name} {list(shape)}")
    return Kernel(name, shape, groups, transposed, assumed=not given)


def _not_a_kernel(name: str, info: TensorInfo, included: bool) -> str | None:
    if info.dtype not in FLOATING:
        return f"its type {info.dtype} cannot be optimized"
    if 0 in info.shape:
        return "empty"
    if name.endswith(_PARTS):
        return "a part of a parametrized weight (weight_norm, spectral_norm, pruning), not the kernel itself"
    if len(info.shape) != 4 and not included:
        return f"{len(info.shape)}-D: taken for a kernel only by `include`"
    return None
