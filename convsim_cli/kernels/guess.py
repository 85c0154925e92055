"""What the name of a tensor in a file says of it. Names are split at dots and slashes, and then into words.

The kernels of a state dict, assumed from names and shapes.

A floating 4-D tensor is taken for a Conv2d kernel, and a 3-D one for a Conv1d kernel where there are no 4-D kernels.
Those with one input channel are depthwise where at least two of them have several filters and several taps, and dense
otherwise; other groups cannot be seen. Patterns correct these guesses, and `doubts` lists those that may well be wrong.

Guesses about kernels of a file that may well be wrong, and the layers that they are about.

Which names in a checkpoint belong to training, not to the network: optimizer state and averaged copies.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import prod

from convsim_cli.errors import InputError
from convsim_cli.kernels.kernel import FLOATING, Kernel, Patterns, Selection, matches

_WEIGHT = re.compile(r"weights?|kernels?|w")  # the last word of a kernel's name, where it has any of these
_NO_KERNEL = re.compile(  # a word in the last part of a name: a statistic, a gain, an embedding or a table
    r"running|moving|mean|var|variance|std|gamma|beta|scales?|bias|biases|ls|tokens?|emb|embeds?|embeddings?|pos|"
    r"positions?|positional|relative|rel|mask|anchors?|grid|freqs?|temperature|codebook|prototypes?|index|indices|table"
)
_FIXED = re.compile(  # a word anywhere in the name of a filter that no training changes
    r"blur|blurpool|antialias|gauss|gaussian|sobel|laplace|laplacian|scharr|prewitt|gabor|sift|toeplitz|haar|i?dwt|"
    r"wavelet|i?dct|i?stft|hann|hamming|srm|ssim|smoothing|binomial|lowpass|highpass|filt|fir"
)
_TRANSPOSED = re.compile(  # anywhere in a name
    r"(?<![a-z])(de|up|t|trans|transposed?)_?conv|deconv|conv\w*_?transposed?|conv_?t(?![a-z])"
)
_UPWARD = re.compile(r"ups?([_\d]\w*)?|up_?sampl\w*|\w+_up")  # the name of the layer itself


def weight_word(name: str) -> str | None:
    """Return the word that ends a name as those of layers' weights do, None for any other name."""
    word = _last_word(name)
    return word if _WEIGHT.fullmatch(word) else None


def says_no_kernel(name: str) -> bool:
    """Return whether a name is that of a statistic, a gain, an embedding or a table: `running_mean`, `pos_embed`."""
    return not weight_word(name) and any(map(_NO_KERNEL.fullmatch, _words(_parts(name)[-1])))


def says_fixed(name: str) -> bool:
    """Return whether a name is that of a filter which no training changes, such as `blur.kernel`."""
    return any(_FIXED.fullmatch(word) for part in _parts(name) for word in _words(part))


def says_transposed(name: str) -> bool:
    """Return whether a name is one that transposed convolutions often have: `deconv1.weight`, `up.0.weight`."""
    layers = [part.lower() for part in _parts(name) if not _WEIGHT.fullmatch(part.lower())]
    own = next((part for part in reversed(layers) if not part.isdecimal()), "")
    return any(_TRANSPOSED.search(part) for part in layers) or _UPWARD.fullmatch(own) is not None


def _last_word(name: str) -> str:
    return (_words(_parts(name)[-1]) or ("",))[-1]


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


@cache
def _words(part: str) -> tuple[str, ...]:
    """Return the words of a part, in small letters: `RelativePosition_bias2` has relative, position and bias."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part))


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


_NAMED = 3  # layers in a line


def doubts(selection: Selection, depthwise: Sequence[str]) -> list[str]:
    """Return a line for each kind of doubtful guess.

    depthwise: the tensors that are taken for depthwise kernels, in the order of the file.
    """
    return list(_doubts(selection, depthwise))


def _doubts(selection: Selection, depthwise: Sequence[str]) -> Iterator[str]:
    guessed = [kernel for kernel in selection.kernels if kernel.assumed and not kernel.transposed]
    transposed = [kernel for kernel in guessed if says_transposed(kernel.name) and not kernel.pointwise]
    if transposed:
        yield f"perhaps transposed, by their names: {_listed(transposed)}; if so, use `transposed` or `arch`"
    others = [kernel for kernel in guessed if kernel not in transposed]
    grouped = _perhaps_grouped(others, selection)
    if grouped:
        yield (
            f"perhaps grouped, as no layer gives so many channels: {_listed(grouped)}; "
            "`groups` or `arch` sets the number of groups"
        )
    first = [kernel for kernel in selection.skipped if kernel.name in depthwise[:1]]
    if first and guessed and {kernel.shape[1] for kernel in guessed} <= _given(selection):
        yield (
            f"{first[0].name} {list(first[0].shape)} is taken for depthwise, but no other layer takes the images: "
            f"perhaps it is the first layer; if so, use `groups` '{first[0].name}=1' or `arch`"
        )


def _perhaps_grouped(kernels: Sequence[Kernel], selection: Selection) -> list[Kernel]:
    """Return the kernels with fewer channels than any layer gives, of which a layer gives a multiple.

    Layers that take the images are no such: of three channels, else of one, else of as many as the first.
    """
    channels, given = [kernel.shape[1] for kernel in kernels], _given(selection)
    images = next((usual for usual in (3, 1) if usual in channels), channels[0] if channels else 0)
    return [
        kernel
        for kernel, few in zip(kernels, channels, strict=True)
        if few not in given and few != images
        if any(many > few and many % few == 0 and kernel.shape[0] % (many // few) == 0 for many in given)
    ]


def _given(selection: Selection) -> set[int]:
    """Return the numbers of channels that layers give."""
    return {kernel.filters for kernel in selection.kernels} | {skipped.shape[0] for skipped in selection.skipped}


def _listed(kernels: Iterable[Kernel]) -> str:
    every = [f"{kernel.name} {list(kernel.shape)}" for kernel in kernels]
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more


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
    return bool(_OPTIMIZER.search(name) or _MOMENTS.search(name) or _name_parts(name)[-1] in _LAST)


def is_averaged(name: str) -> bool:
    """Return whether a part of a name is one that averaged copies of a network have, such as `model_ema`."""
    return any(map(_says_average, _name_parts(name)))


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
        parts = _name_parts(name)
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
        parts = _name_parts(name)
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


def _name_parts(name: str) -> list[str]:
    return re.split(r"[./]", name)
