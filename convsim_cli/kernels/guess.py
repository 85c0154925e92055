"""What a file tells of its tensors: which are kernels, how their filters pair, and which belong to training.

A file holds only names and shapes. A floating-point 4-D tensor is taken for a Conv2d kernel, and a 3-D one for a Conv1d
kernel if there are no 4-D kernels. Kernels with one input channel are depthwise if at least two of them have several
filters and several taps, and dense otherwise; other groups are invisible. A tensor with evidence against it is skipped
unless a pattern asks for it (`_evidence_against`). The user's patterns correct the guesses, and `guess_warnings` names
the layers whose guess is uncertain.

A name is split at dots and slashes into parts, and a part into words: `conv.RelativePosition_bias2` has the parts conv
and RelativePosition_bias2, and the latter the words relative, position and bias.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import prod

from convsim_cli.errors import InputError
from convsim_cli.kernels.kernel import FLOATING, Kernel, Patterns, Selection, matches

MOST_TAPS = 1024  # of a 3-D tensor that is taken for a kernel; the stacked experts of a mixture have more
NAMED = 3  # layers in a warning
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # parts that wrappers add

_WEIGHT = re.compile(r"weights?|kernels?|w")  # the last word of a kernel's name, where it has any of these
_NO_KERNEL = re.compile(  # a word in the last part of a name: a statistic, a gain, an embedding or a table
    r"running|moving|mean|var|variance|std|gamma|beta|scales?|bias|biases|ls|tokens?|emb|embeds?|embeddings?|pos|"
    r"positions?|positional|relative|rel|mask|anchors?|grid|freqs?|temperature|codebook|prototypes?|index|indices|table"
)
_FIXED = re.compile(  # a word anywhere in the name of a filter that no training changes
    r"blur|blurpool|antialias|gauss|gaussian|sobel|laplace|laplacian|scharr|prewitt|gabor|sift|toeplitz|haar|i?dwt|"
    r"wavelet|i?dct|i?stft|hann|hamming|srm|ssim|smoothing|binomial|lowpass|highpass|filt|fir"
)
_TRANSPOSED = re.compile(  # anywhere in a part
    r"(?<![a-z])(de|up|t|trans|transposed?)_?conv|deconv|conv\w*_?transposed?|conv_?t(?![a-z])"
)
_UPWARD = re.compile(r"ups?([_\d]\w*)?|up_?sampl\w*|\w+_up")  # the name of the layer itself
_FACTORS = ("_g", "_v", "_orig", "_mask", ".original", ".original0", ".original1")  # ends of parametrized weights

_OPTIMIZER = re.compile(
    r"(?i:optimi[sz]er|(?<![a-z])optims?(?![a-z])|(?<![a-z])opt_(states?|state_dict|dict)(?![a-z]))|optim(?=[A-Z])|"
    r"(?i:(?<![a-z])(adam|adamw|adagrad|adadelta|adafactor|rmsprop|master_(params|weights)|fp32_from_fp16)(?![a-z]))"
)
_MOMENTS = re.compile(  # tensors that optimizers keep per parameter, under names that nothing else has
    r"(?:^|[._/])(exp_avg|max_exp_avg|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta|mu_product|row_var|col_var|"
    r"previous_grad|slow_buffer|first_moment|second_moment|preconditioner)(?![a-z])"
)
_LAST = frozenset({"step", "step_size", "grad", "main_grad", "velocity"})  # the same, but only as the last part

_AVERAGES = frozenset({"ema", "swa", "ewma", "polyak"})  # words of averaged copies
_COPIES = frozenset({"averaged", "shadow", "teacher", "momentum"})  # alone, or with words for a network
_RELATED = frozenset({"avg", "average", "mean", "target", "slow", "velocity"})  # only with a word for a network
_NETWORK = frozenset(
    {"model", "net", "network", "module", "params", "parameters", "weights", "state", "dict", "encoder"}
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file tells of a tensor: its dtype by name ("float32") and its shape."""

    dtype: str
    shape: tuple[int, ...]


Infos = Mapping[str, TensorInfo]
Shapes = Mapping[str, tuple[int, ...]]


def file_kernels(tensors: Infos, patterns: Patterns | None = None, unfit: Mapping[str, str] | None = None) -> Selection:
    """Return the kernels of a state dict, from names and shapes.

    tensors: name → dtype and shape. unfit: name → why the tensor cannot be worked on by itself, such as memory that it
    shares with one before it. A tensor whose name or shape is not that of a kernel is taken where a pattern of
    `include` matches no others. Raises InputError for a pattern that matches nothing and for a number of groups that
    does not divide the filters.
    """
    unfit = unfit or {}
    candidates = {name: info for name, info in tensors.items() if 3 <= len(info.shape) <= 5}
    patterns = (patterns or Patterns()).resolved(candidates)
    left_out = _evidence_against(candidates)
    for name in patterns.forced(candidates, left_out):
        del left_out[name]
    for name, info in candidates.items():
        if reason := unfit.get(name) or _unusable(name, info):
            left_out[name] = reason
    if not patterns.include:
        left_out |= _of_other_axes({name: info.shape for name, info in candidates.items() if name not in left_out})
    depthwise = _depthwise({name: info.shape for name, info in candidates.items() if name not in left_out}, patterns)
    selection = Selection()
    for name, info in candidates.items():
        filters, channels = info.shape[:2]
        transposed = matches([name], patterns.transposed)
        given = [groups for glob, groups in patterns.groups if fnmatchcase(name, glob)]
        groups = given[-1] if given else filters if name in depthwise and not transposed else 1
        if groups < 1 or filters % groups:
            raise InputError(
                f"`groups`: {groups} groups do not divide the {filters} filters of {name} {list(info.shape)}"
            )
        reason = unfit.get(name) or patterns.refusal(name) or left_out.get(name)
        if not reason and not given and not transposed and channels == 1 < filters and says_transposed(name):
            reason = (
                "one channel, and named like a transposed convolution: with one output or depthwise it has no pairs"
            )
        selection.add(Kernel(name, info.shape, groups, transposed, assumed=not given), reason)
    selection.guess_warnings = guess_warnings(selection, depthwise)
    return selection


def _unusable(name: str, info: TensorInfo) -> str | None:
    """Return why a tensor cannot be worked on, whatever the patterns say."""
    if info.dtype not in FLOATING:
        return f"its type {info.dtype} cannot be optimized"
    if 0 in info.shape:
        return "empty"
    if name.endswith(_FACTORS):
        return "a part of a parametrized weight (weight_norm, spectral_norm, pruning), not the kernel itself"
    return None


def _of_other_axes(usable: Shapes) -> dict[str, str]:
    """Return the tensors that are not 4-D, name → reason, without the 3-D ones that are taken for Conv1d kernels."""
    images = any(len(shape) == 4 and shape[0] > 1 for shape in usable.values())
    named = any(len(shape) == 3 and _weight_word(name) for name, shape in usable.items())
    return {
        name: f"{len(shape)}-D: taken for a kernel only by `include` '*'"
        for name, shape in usable.items()
        if len(shape) != 4
        if len(shape) == 5 or images or shape[2] > MOST_TAPS or (named and not _weight_word(name))
    }


def _depthwise(usable: Shapes, patterns: Patterns) -> list[str]:
    """Return the tensors that are taken for depthwise kernels, decided for each number of axes.

    A pattern that leaves one out says nothing about the others, so it does not count here.
    """
    single = {name: shape for name, shape in usable.items() if shape[1] == 1}
    evidence = Counter(
        len(shape)
        for name, shape in single.items()
        if shape[0] > 1 and prod(shape) > shape[0]
        if not says_transposed(name) and not matches([name], patterns.transposed)
    )
    return [name for name, shape in single.items() if evidence[len(shape)] > 1]


def _evidence_against(candidates: Infos) -> dict[str, str]:
    """Return the tensors that are taken for kernels only on request: name → the first evidence against them."""
    reasons = non_model_tensors(candidates)
    usual = {_weight_word(name) for name, info in candidates.items() if info.shape[1] > 1} - {None}
    for name, info in candidates.items():
        parts, is_single_channel = _parts(name), info.shape[1] == 1 < info.shape[0]
        if name in reasons:
            continue
        if not _weight_word(name) and any(map(_NO_KERNEL.fullmatch, _words(parts[-1]))):
            reasons[name] = "named like a statistic, a gain or an embedding, not a kernel"
        elif is_single_channel and prod(info.shape[2:]) == 1:
            reasons[name] = "one value per filter: a gain or a statistic, not a kernel"
        elif is_single_channel and any(_FIXED.fullmatch(word) for part in parts for word in _words(part)):
            reasons[name] = "one channel, and named like a filter that no training changes"
        elif is_single_channel and usual and _weight_word(name) not in usual:
            reasons[name] = "one channel, and not named as other kernels are: a filter that no training changes"
    return reasons


def says_transposed(name: str) -> bool:
    """Return whether a name is one that transposed convolutions often have: `deconv1.weight`, `up.0.weight`."""
    layers = [part.lower() for part in _parts(name) if not _WEIGHT.fullmatch(part.lower())]
    own = next((part for part in reversed(layers) if not part.isdecimal()), "")
    return any(_TRANSPOSED.search(part) for part in layers) or _UPWARD.fullmatch(own) is not None


def is_optimizer_state(name: str) -> bool:
    """Return whether a tensor or a container of this name, `a.b.c`, belongs to an optimizer."""
    return bool(_OPTIMIZER.search(name) or _MOMENTS.search(name) or _parts(name)[-1] in _LAST)


def is_averaged(name: str) -> bool:
    """Return whether a part of a name is one that averaged copies of a network have, such as `model_ema`."""
    return any(map(_says_average, _parts(name)))


def _says_average(part: str) -> bool:
    words = set(_words(part))
    others = words - _COPIES - _RELATED
    named = others <= _NETWORK
    return bool(words & _AVERAGES or (words & _COPIES and named) or (words & _RELATED and others and named))


def _weight_word(name: str) -> str | None:
    """Return the word that ends a name as those of layers' weights do, None for any other name."""
    words = _words(_parts(name)[-1])
    return words[-1] if words and _WEIGHT.fullmatch(words[-1]) else None


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


@cache
def _words(part: str) -> tuple[str, ...]:
    """Return the words of a part, in small letters."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part))


def guess_warnings(selection: Selection, depthwise: Sequence[str]) -> list[str]:
    """Return a line for each kind of uncertain guess, with the layers that it is about.

    depthwise: the tensors that are taken for depthwise kernels, in the order of the file.
    """
    guessed = [kernel for kernel in selection.kernels if kernel.assumed and not kernel.transposed]
    transposed = [kernel for kernel in guessed if says_transposed(kernel.name) and not kernel.pointwise]
    others = [kernel for kernel in guessed if kernel not in transposed]
    given = {kernel.filters for kernel in selection.kernels} | {skipped.shape[0] for skipped in selection.skipped}
    lines = []
    if transposed:
        lines.append(f"perhaps transposed, by their names: {_listed(transposed)}; if so, use `transposed` or `arch`")
    if grouped := _perhaps_grouped(others, given):
        lines.append(
            f"perhaps grouped, as no layer gives so many channels: {_listed(grouped)}; "
            "`groups` or `arch` sets the number of groups"
        )
    first = [kernel for kernel in selection.skipped if kernel.name in depthwise[:1]]
    if first and guessed and {kernel.shape[1] for kernel in guessed} <= given:
        lines.append(
            f"{first[0].name} {list(first[0].shape)} is taken for depthwise, but no other layer takes the images: "
            f"perhaps it is the first layer; if so, use `groups` '{first[0].name}=1' or `arch`"
        )
    return lines


def _perhaps_grouped(kernels: Sequence[Kernel], given: Set[int]) -> list[Kernel]:
    """Return the kernels with fewer channels than any layer outputs (`given`), if a layer outputs a multiple of them.

    Layers that take the images are exempt: those with three channels, else one, else as many as the first layer.
    """
    channels = [kernel.shape[1] for kernel in kernels]
    images = next((usual for usual in (3, 1) if usual in channels), channels[0] if channels else 0)
    return [
        kernel
        for kernel, few in zip(kernels, channels, strict=True)
        if few not in given and few != images
        if any(many > few and many % few == 0 and kernel.shape[0] % (many // few) == 0 for many in given)
    ]


def _listed(kernels: Sequence[Kernel]) -> str:
    more = f" and {len(kernels) - NAMED} more" if len(kernels) > NAMED else ""
    return ", ".join(f"{kernel.name} {list(kernel.shape)}" for kernel in kernels[:NAMED]) + more


def non_model_tensors(tensors: Infos) -> dict[str, str]:
    """Return the tensors of a file that belong to training: name → reason.

    Those are an optimizer's state, and copies such as `model_ema.*` of tensors that have the same shape and, without
    that prefix or suffix, the same name. Tensors with fewer than three axes are ignored.
    """
    large = {name: info.shape for name, info in tensors.items() if len(info.shape) >= 3}
    reasons = {name: "of an optimizer's state, not of the network" for name in large if is_optimizer_state(name)}
    averaged = {name: shape for name, shape in large.items() if name not in reasons and is_averaged(name)}
    own = {name: shape for name, shape in large.items() if name not in reasons and name not in averaged}
    reasons |= dict.fromkeys(_copies(averaged, own), "a copy of another tensor, such as a moving average")
    return {name: reasons[name] for name in large if name in reasons}


def _copies(averaged: Shapes, own: Shapes) -> Iterator[str]:
    """Yield the tensors that are copies of others.

    The copies under one prefix are those of one other prefix, and at least half as many as there are tensors under it:
    a single name in common is chance.
    """
    ends: dict[str, dict[str, str]] = defaultdict(dict)  # the end of a name, joined → what stands before → the name
    for name in own:
        parts = _parts(name)
        for place in range(len(parts)):
            ends[_joined(parts[place:])].setdefault(_joined(parts[:place]), name)
    groups: dict[str, dict[str, set[str]]] = defaultdict(dict)  # prefix → tensor → prefixes of its originals
    for name, shape in averaged.items():
        parts = _parts(name)
        place = next(number for number, part in enumerate(parts, 1) if _says_average(part))
        rest, originals = parts[place:], groups[".".join(parts[:place])].setdefault(name, set())
        if not rest:  # c.weight.ema or c.weight_ema, copies of c.weight
            before = name.removesuffix(parts[-1])
            words = [word for word in parts[-1].split("_") if word.lower() not in _AVERAGES | _COPIES | _RELATED]
            if shape in (own.get(before.rstrip("./")), own.get(before + "_".join(words))):
                originals.add("")
        while rest:
            originals |= {prefix for prefix, other in ends.get(_joined(rest), {}).items() if own[other] == shape}
            if rest[0] not in _NETWORK and rest[0] not in WRAPPERS and not _says_average(rest[0]):
                break
            rest = rest[1:]  # shadow.model.c.weight may also be a copy of c.weight
    for copies in groups.values():
        counts = Counter(prefix for originals in copies.values() for prefix in originals)
        prefix, count = counts.most_common(1)[0] if counts else ("", 0)
        if 2 * count >= len(copies):
            yield from (name for name, originals in copies.items() if prefix in originals)


def _joined(parts: Sequence[str]) -> str:
    """Join parts without dots, as some averages store names, and without those that wrappers add."""
    return "".join(part for part in parts if part not in WRAPPERS)
