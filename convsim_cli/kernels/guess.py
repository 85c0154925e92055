"""Infer from a file's tensors which are kernels, how their filters pair, and which belong to training.

A file holds only names and shapes, but those are evidence of several kinds:

- names: of weights, of statistics and embeddings, of factors of another weight, of other frameworks' kernels;
- the bias of a layer has one value per output channel, and so has the batch norm that follows it: they decide between
  ordinary and transposed kernels, and show other layouts;
- the neighbours in the file, which give and take channels, tell the number of groups (`neighbours`).

From these one decision follows per tensor: a kernel with its groups and its transposition, perhaps with a doubt, or a
tensor that is skipped, with the reason. A file in another framework's layout is refused (`_refuse_other_layouts`). A
floating-point 4-D tensor is a Conv2d kernel unless something speaks against it, a 3-D one a Conv1d kernel if there are
no 4-D kernels. The user's patterns correct all of it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

from convsim_cli.errors import InputError
from convsim_cli.kernels.kernel import FLOATING, WRAPPERS, Kernel, Patterns, Selection, in_layer_order, matches
from convsim_cli.kernels.neighbours import (
    PERHAPS_FIRST,
    PERHAPS_GROUPED,
    PERHAPS_MULTIPLIED,
    WEIGHT,
    groups_by_neighbours,
    layer_parts,
    name_parts,
    part_words,
    says_downward,
    weight_word,
)

MOST_HEAD_TAPS = 16  # of a 3-D projection in attention
MOST_TAPS = 1024  # of a tensor that is taken for a kernel: the stacked experts of a mixture have more, and time grows
NAMED = 3  # layers in a warning
LEAST_WIDTH = 8  # channels between two sparse convolutions; a Conv1d kernel has fewer taps
WIDEST = 11  # taps along an axis of the kernels of another layout

_NO_KERNEL = re.compile(  # a word in the last part of a name: a statistic, a gain, an embedding or a table
    r"running|moving|mean|var|variance|std|gamma|beta|scales?|bias|biases|ls|tokens?|emb|embeds?|embeddings?|pos|"
    r"positions?|positional|relative|rel|mask|anchors?|grid|freqs?|temperature|codebook|prototypes?|index|indices|table"
)
_SPREAD = re.compile("rho|sigma2?|logvar|logsigma2?|eps|epsilon")  # a word in the last part of a name, of each weight
_SCORE = re.compile("scores?|fisher|importances?|hessian|sensitivity")  # the same, or a part of a name
_FIXED = re.compile(  # a word anywhere in the name of a filter that no training changes
    r"blur|blurpool|antialias|gauss|gaussian|sobel|laplace|laplacian|scharr|prewitt|gabor|sift|toeplitz|haar|i?dwt|"
    r"wavelet|i?dct|i?stft|hann|hamming|srm|ssim|smoothing|binomial|lowpass|highpass|filt|fir"
)
_UPDATE = re.compile(  # a part that names a factor of an adapter's update
    r"(lora|lokr|loha|locon|lycoris|hada|oft|coft|boft|ia3|dora|glora|vera|dylora|adalora)(_.*|\d*|[AB])|"
    r"diff(_b)?|.*_lora(_.*|[AB])?|.*(lora|dora)_(magnitude_vector|scale)"
)
_NO_CONV1D = re.compile(  # a part of a 3-D weight's name: stacked matrices, one per expert or head
    r"(?i)(.*_)?(experts?|moe|switch_mlp|mlp_experts)(_.*)?|bilinear"
)
_PROJECTION = re.compile(
    r"(?i)(.*_)?(attn|attention|self_?attn|mha|[qkvo]|qkv|q_?kv?|query|key|value|proj|projection)(_.*)?"
)
_TRANSPOSED = re.compile(  # anywhere in a part
    r"(?<![a-z])(de|up|t|trans|transposed?)_?conv|deconv|conv\w*_?transposed?|conv_?t(?:r|rans)?(?![a-z])"
)
_UPWARD = re.compile(r"ups?([_\d]\w*)?|up_?(sampl|scal)\w*|\w+_up(scal\w*)?")  # the name of the layer itself
_PARAMETRIZED = re.compile(r"(.+)_(g|v|u|orig|mask|bar|sn)|original\d*")  # the last part of a weight's factors
_FRAMEWORKS = {"flax": "hwio", "jax": "hwio", "tf": "hwio", "tensorflow": "hwio", "keras": "hwio", "mlx": "ohwi"}
_SPARSE = (8, 27, 64, 125, 343)  # taps of 2³ to 7³, the first axis of a sparse convolution's kernel

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
    """A tensor in a file: its dtype by name ("float32") and its shape."""

    dtype: str
    shape: tuple[int, ...]


Infos = Mapping[str, TensorInfo]
Shapes = Mapping[str, tuple[int, ...]]


def file_kernels(
    tensors: Infos,
    patterns: Patterns | None = None,
    unfit: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Selection:
    """Return the kernels of a state dict, from names and shapes.

    tensors: name → dtype and shape, in the file's order. unfit: name → why the tensor cannot be worked on by itself,
    such as memory that it shares with one before it. metadata: what the file holds beside tensors. A tensor whose name
    or shape is not that of a kernel is taken where a pattern of `include` matches no others. Raises InputError for a
    pattern that matches nothing, for a number of groups that does not divide the filters, and for a file whose kernels
    look stored in another layout, unless `patterns.layout` says which one.
    """
    unfit, patterns = unfit or {}, patterns or Patterns()
    tensors = {name: tensors[name] for name in in_layer_order(tensors)}
    candidates = {name: info for name, info in tensors.items() if len(info.shape) >= 3 or _is_bank(name, tensors)}
    patterns = patterns.resolved(candidates)
    left_out = _evidence_against(candidates, tensors)
    for name, info in candidates.items():  # square matrices, for each of a number of relations
        if len(info.shape) == 3 and _outputs(name, tensors) == info.shape[1] == info.shape[2] != info.shape[0]:
            left_out.setdefault(name, "3-D, perhaps stacked matrices, as its bias says: taken only by `include`")
    for name in patterns.forced(candidates, left_out):
        del left_out[name]
    for name, info in candidates.items():
        if reason := unfit.get(name) or _unusable(name, info, tensors):
            left_out[name] = reason
    if patterns.layout is None:
        usable = {name: info.shape for name, info in candidates.items() if name not in left_out}
        left_out |= _of_other_layouts(usable, tensors, metadata or {})
    if not patterns.include:
        left_out |= _of_other_axes({name: info.shape for name, info in candidates.items() if name not in left_out})
    usable = {name: info.shape for name, info in candidates.items() if name not in left_out}
    kernels, doubts = _guess(usable, tensors, patterns)
    selection = Selection()
    for name, info in candidates.items():
        kernel = kernels.get(name, Kernel(name, info.shape, assumed=True))
        reason = unfit.get(name) or patterns.refusal(name) or left_out.get(name)
        single = kernel.assumed and not kernel.transposed and info.shape[1] == 1 < info.shape[0]
        if not reason and single and says_transposed(name, info.shape[2:]):
            reason = (
                "one channel, and named like a transposed convolution: with one output or depthwise it has no pairs"
            )
        selection.add(kernel, reason)
    selection.guess_warnings = guess_warnings(selection, kernels, doubts)
    return selection


def _unusable(name: str, info: TensorInfo, tensors: Infos) -> str | None:
    """Return why a tensor cannot be worked on, whatever the patterns say."""
    if info.dtype not in FLOATING:
        return f"its dtype {info.dtype} cannot be optimized"
    if 0 in info.shape:
        return "empty"
    if len(info.shape) == 2:
        return "2-D: perhaps a bank of flattened kernels (CondConv), from which the layer computes its own"
    if len(info.shape) > 5:
        return f"{len(info.shape)}-D: perhaps of a locally connected layer, whose kernels differ from place to place"
    *before, last = name_parts(name)
    factor = _PARAMETRIZED.fullmatch(last)
    pair = factor and factor[1] and any(f"{name.removesuffix(last)}{factor[1]}_{end}" in tensors for end in "gu")
    if "parametrizations" in before or (factor and (not factor[1] or pair or WEIGHT.fullmatch(factor[1].lower()))):
        return "a part of a parametrized weight (weight_norm, spectral_norm, pruning), not the kernel itself"
    return None


def _is_bank(name: str, tensors: Infos) -> bool:
    """Return whether a 2-D tensor may be a bank of kernels: named like a convolution, or with a bank of biases."""
    info, bias = tensors[name], tensors.get(_bias_of(name))
    if len(info.shape) != 2 or info.dtype not in FLOATING or not weight_word(name):
        return False
    own = (["", *layer_parts(name)])[-1].lower()
    banked = bias is not None and len(bias.shape) == 2 and bias.shape[0] == info.shape[0]
    return "conv" in own or (banked and info.shape[1] % max(bias.shape[1] if bias else 1, 1) == 0)


def _of_other_axes(usable: Shapes) -> dict[str, str]:
    """Return the tensors that are no usual kernels, name → reason: of other axes, or with too many taps.

    The 3-D ones that are taken for Conv1d kernels are not among them.
    """
    images = any(len(shape) == 4 and shape[0] > 1 for shape in usable.values())
    found = {}
    for name, shape in usable.items():
        own = name_parts(name)[-1].lower()
        matrix = not WEIGHT.fullmatch(own) or any(map(_PROJECTION.fullmatch, layer_parts(name)[-2:]))
        heads = shape[2] > MOST_HEAD_TAPS and matrix
        if len(shape) == 3 and (not weight_word(name) or heads or any(map(_NO_CONV1D.fullmatch, name_parts(name)))):
            found[name] = "3-D, perhaps stacked matrices of experts or heads: taken for a kernel only by `include`"
        elif len(shape) == 4 and prod(shape[2:]) > MOST_TAPS:
            found[name] = f"{prod(shape[2:])} taps: taken for a kernel only by `include` '*'"
        elif len(shape) == 5 or (len(shape) == 3 and (images or shape[2] > MOST_TAPS)):
            found[name] = f"{len(shape)}-D: taken for a kernel only by `include` '*'"
    return found


def _guess(usable: Shapes, tensors: Infos, patterns: Patterns) -> tuple[dict[str, Kernel], dict[str, str]]:
    """Return each usable tensor as a kernel, and the doubts about some: name → which."""
    kernels, doubts = {}, {}
    chain = [
        name
        for name, info in tensors.items()
        if name in usable or (len(info.shape) == 2 and info.dtype in FLOATING and weight_word(name))
    ]
    for place, name in enumerate(chain):
        if name not in usable:
            continue
        shape = usable[name]
        around = [tensors[other].shape for other in chain[max(place - 1, 0) : place] + chain[place + 1 : place + 2]]
        asked = matches([name], patterns.transposed)
        is_transposed, groups, doubt = _transposition(name, tensors, around if 0 < place < len(chain) - 1 else [])
        if asked:
            is_transposed, groups = True, groups if is_transposed else 1
        elif doubt:
            doubts[name] = doubt
        given = [number for glob, number in patterns.groups if fnmatchcase(name, glob)]
        if given:
            groups = given[-1]
            doubts.pop(name, None)
        if groups < 1 or shape[0] % groups:
            raise InputError(f"`groups`: {groups} groups do not divide the {shape[0]} filters of {name} {list(shape)}")
        kernels[name] = Kernel(name, shape, groups, is_transposed, assumed=not given)
    doubts |= dict.fromkeys(_in_transposed_chains(chain, kernels, doubts), PERHAPS_TRANSPOSED)
    for name, (groups, doubt) in groups_by_neighbours(chain, kernels, {k: i.shape for k, i in tensors.items()}).items():
        if kernels[name].assumed and name not in doubts and not kernels[name].transposed:
            kernels[name] = Kernel(name, kernels[name].shape, groups, assumed=True)
            if doubt:
                doubts[name] = doubt
    return kernels, doubts


NAMED_TRANSPOSED = "perhaps transposed, by their names"
PERHAPS_TRANSPOSED = "perhaps transposed, by the channels of the layers around them"
PERHAPS_EVEN = "perhaps transposed, by their even kernels"


def _transposition(name: str, tensors: Infos, around: Sequence[Sequence[int]]) -> tuple[bool, int, str]:
    """Return whether a kernel is transposed, its number of groups if it is, and a doubt. around: the layers beside."""
    first, second = tensors[name].shape[:2]
    outputs = _outputs(name, tensors)
    if outputs is not None and first != second:
        groups = outputs // second
        if outputs == first:
            return False, 1, ""
        if outputs == groups * second and first % groups == 0:
            return True, groups, ""
    taps = tensors[name].shape[2:]
    before, after = (around[0][0], around[1][1]) if len(around) == 2 else (0, 0)
    is_pointwise = prod(taps) == 1
    if says_transposed(name, taps):
        refuted = first != second == before and after == first
        return False, 1, "" if refuted or is_pointwise else NAMED_TRANSPOSED
    if first == second and set(taps) in ({2}, {4}) and not says_downward(name):
        return False, 1, PERHAPS_EVEN
    chained = before == first and after == second and second not in (before, 1) and after != first
    alike = [tuple(shape[2:]) for shape in around if tuple(shape[:2]) == (first, second)]
    parallel = len(alike) == 2 or (len(alike) == 1 and alike[0] != tuple(taps))
    return False, 1, PERHAPS_TRANSPOSED if chained and not (is_pointwise or parallel) else ""


def _in_transposed_chains(chain: Sequence[str], kernels: Mapping[str, Kernel], doubts: Mapping[str, str]) -> set[str]:
    """Return the kernels that fit the layers before and after them only if all of these are transposed.

    The first and the last one of a file count if the layer beside them is transposed, or doubted.
    """

    def fits_only_so(place: int, step: int) -> bool:
        other = kernels.get(chain[place + step])
        if other is None or other.pointwise:  # a linear layer, or a step within a block of ordinary ones
            return False
        (first, second), (beyond, beside) = kernels[chain[place]].shape[:2], other.shape[:2]
        if step > 0:
            return second == beyond and first != (beyond if other.transposed else beside)
        if other.transposed:  # a U-Net's next layer takes more channels than that gives
            return first == other.filters > second
        return first == beside and second != beyond

    guessed = [
        (place, kernels[name])
        for place, name in enumerate(chain)
        if name in kernels and kernels[name].assumed and not kernels[name].transposed and name not in doubts
    ]
    found: set[str] = set()
    for sides in (2, 1):
        for place, kernel in guessed:
            steps = [step for step in (-1, 1) if 0 <= place + step < len(chain)]
            if len(steps) != sides or kernel.pointwise or kernel.shape[0] == kernel.shape[1]:
                continue
            beside = chain[place + steps[0]]
            is_known = beside in found or beside in doubts or (beside in kernels and kernels[beside].transposed)
            if (is_known or sides == 2) and all(fits_only_so(place, step) for step in steps):
                found.add(kernel.name)
    return found


def _outputs(name: str, tensors: Infos) -> int | None:
    """Return a layer's number of output channels, from its bias, or the batch norm behind it in a Sequential."""
    *path, number, _ = ["", *name_parts(name)]
    following = ".".join([*path[1:], str(int(number) + 1)]) if number.isdecimal() and len(number) < 20 else ""
    short = re.sub(r"(?<![a-zA-Z])w$", "b", name)
    for other in (_bias_of(name), short, f"{following}.running_mean" if following else ""):
        if other in tensors and len(tensors[other].shape) == 1 and tensors[other].shape[0]:
            return tensors[other].shape[0]
    return None


def _bias_of(name: str) -> str:
    """Return the name of the bias of the same layer: `conv.weight` → `conv.bias`, `kernel:0` → `bias:0`."""
    return re.sub(r"(weights?|kernels?|(?<![a-zA-Z])w)(:\d+)?$", r"bias\2", name)


def _scores_weights(name: str, tensors: Infos) -> bool:
    """Return whether a tensor holds a score per weight, judging by its name. A layer of such a name has a bias."""
    *path, last = name_parts(name)
    own = any(map(_SCORE.fullmatch, part_words(last))) and not (weight_word(name) and _outputs(name, tensors))
    rest = ".".join(part for part in (*path, last) if not _SCORE.fullmatch(part))
    return own or (rest != name and rest in tensors and tensors[rest].shape == tensors[name].shape)


def _is_stacked(shape: Sequence[int], bias: Sequence[int]) -> bool:
    """Return whether the bias shows that a weight holds several networks, stacked along its first axis."""
    outputs = bias[-1] if len(bias) > 1 and bias[0] == shape[0] and set(bias[1:-1]) <= {1} else 0
    return outputs > 1 and outputs in (shape[1], shape[-1])


def _evidence_against(candidates: Infos, tensors: Infos) -> dict[str, str]:
    """Return the tensors that are taken for kernels only on request: name → the first evidence against them."""
    reasons = non_model_tensors(candidates)
    usual = {weight_word(name) for name, info in candidates.items() if info.shape[1] > 1} - {None}
    sparse = _sparse_kernels({name: info.shape for name, info in candidates.items()})
    for name, info in candidates.items():
        parts, is_single_channel = name_parts(name), info.shape[1] == 1 < info.shape[0]
        if name in reasons:
            continue
        if any(map(_UPDATE.fullmatch, parts)):
            reasons[name] = "a factor of an adapter's update (LoRA, LoKr and others), not a kernel"
        elif name in sparse:
            reasons[name] = "3-D, like a kernel [taps, in, out] of a sparse convolution, with its axes flattened"
        elif parts[-1].removesuffix(":0") == "depthwise_kernel":  # Keras; its axes do not tell
            reasons[name] = "depthwise: one filter per group, no pairs"
        elif any(map(_SPREAD.fullmatch, part_words(parts[-1]))) or _scores_weights(name, tensors):
            reasons[name] = "named like a spread or a score of weights, not a kernel"
        elif (stack := tensors.get(_bias_of(name))) and _is_stacked(info.shape, stack.shape):
            reasons[name] = f"perhaps of {info.shape[0]} networks that are stacked, as its bias says"
        elif not weight_word(name) and any(map(_NO_KERNEL.fullmatch, part_words(parts[-1]))):
            reasons[name] = "named like a statistic, a mask, a gain or an embedding, not a kernel"
        elif is_single_channel and prod(info.shape[2:]) == 1:
            reasons[name] = "one value per filter: a gain or a statistic, or a depthwise 1×1 layer"
        elif is_single_channel and any(_FIXED.fullmatch(word) for part in parts for word in part_words(part)):
            reasons[name] = "one channel, and named like a filter that no training changes"
        elif is_single_channel and usual and weight_word(name) not in usual:
            reasons[name] = "one channel, and not named as other kernels are: a filter that no training changes"
    return reasons


def _sparse_kernels(shapes: Shapes) -> set[str]:
    """Return the 3-D tensors that are like kernels `[taps, in, out]` of 3-D sparse convolutions.

    By the word kernel, or by a neighbor: one gives as its last axis what the next takes as its second.
    """
    like = {name: shape for name, shape in shapes.items() if len(shape) == 3 and shape[0] in _SPARSE}
    found = {name for name in like if name_parts(name)[-1] == "kernel"}
    for (name, (taps, _, gives)), (other, (_, takes, _)) in pairwise(like.items()):
        if gives == takes != taps and takes >= LEAST_WIDTH:
            found |= {name, other}
    return found


def _of_other_layouts(usable: Shapes, tensors: Infos, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the tensors that are stored like another framework's kernels: name → reason.

    Raises InputError if the metadata, or most of the kernels, are those of another framework.
    """
    marks = [(key, _FRAMEWORKS[text.lower()]) for key, text in metadata.items() if text.lower() in _FRAMEWORKS]
    of_chain = _layout_of_chain(usable, tensors)
    looks = {name: _layout_of(name, shape, tensors) or of_chain for name, shape in usable.items()}
    others = {name: layout for name, layout in looks.items() if layout not in ("torch", None)}
    if usable and (marks or len(others) > sum(layout == "torch" for layout in looks.values())):
        name = next(iter(others or usable))
        layout = marks[0][1] if marks else others[name]
        why = f" (metadata {marks[0][0]}: {metadata[marks[0][0]]})" if marks else ""
        order = {"hwio": "[taps, in, out]", "ohwi": "[out, taps, in]"}[layout]
        raise InputError(
            f"{name} {list(tensors[name].shape)}: the file's kernels look stored as {order}{why}; use `layout` "
            f"{layout}, or `layout` torch if they are [out, in, taps]"
        )
    return {
        name: f"stored like another framework's kernel; if it is one, name the file's `layout`, {layout} for instance"
        for name, layout in others.items()
    }


def _layout_of_chain(usable: Shapes, tensors: Infos) -> str | None:
    """Return the layout of a file with only Conv1d kernels if consecutive layers fit together in no other, or None."""
    shapes = list(usable.values())
    are_layers = all(
        len(shape) == 3
        and WEIGHT.fullmatch(name_parts(name)[-1].lower())
        and not any(map(_PROJECTION.fullmatch, layer_parts(name)))
        and not any(map(_NO_CONV1D.fullmatch, name_parts(name)))
        for name, shape in usable.items()
    )
    if len(shapes) < 2 or not are_layers:
        return None
    biases = {name: tensors[_bias_of(name)].shape for name in usable if _bias_of(name) in tensors}
    if (
        all(first % 2 and first <= WIDEST < last for first, _, last in shapes)
        and all(given == taken for (*_, given), (_, taken, _) in pairwise(shapes))
        and any(taken != given for _, taken, given in shapes)
        and all(bias == usable[name][2:] for name, bias in biases.items())
    ):
        return "hwio"
    are_taps = all(taps in (3, 5, 7) for _, taps, _ in shapes) and all(taken > WIDEST for *_, taken in shapes[1:])
    is_chain = all(given == taken != taps for (given, *_), (_, taps, taken) in pairwise(shapes))
    return "ohwi" if are_taps and is_chain else None


def _layout_of(name: str, shape: Sequence[int], tensors: Infos) -> str | None:
    """Return the layout that a kernel's bias, name and shape speak for, None if they do not tell."""
    first, last, axes = shape[0], shape[-1], len(shape) - 2
    bias = tensors.get(_bias_of(name))
    if bias is not None and bias.shape == (last,) and first != last != shape[1]:
        return "hwio"
    taps = shape[2:]
    like_torch = len(set(taps)) == 1 and taps[0] <= min(WIDEST, *shape[:2])
    if re.search(r"(^|[./_])kernel$|:\d+$", name) and not like_torch:
        return "hwio"
    if axes < 2:
        return None
    front, middle = shape[:axes], shape[1:-1]
    if len(set(front)) == 1 and 1 < first <= WIDEST and last >= 8 and not (first >= 8 and like_torch):
        return "hwio" if shape[-2] != last or last > WIDEST else None
    if len(set(middle)) == 1 and 1 < middle[0] <= WIDEST and last != middle[0] and (last >= 8 or last in (3, 4)):
        return "ohwi"
    return "torch" if prod(taps) > 1 and max(taps) <= 31 else None


def says_transposed(name: str, taps: Sequence[int]) -> bool:
    """Return whether a name is common for transposed convolutions: `deconv1.weight`, `up.0.weight`.

    Inside a module that goes up a layer is so if its kernels are even; odd ones, behind an interpolation, are usual.
    """
    layers = [part.lower() for part in name_parts(name) if not WEIGHT.fullmatch(part.lower())]
    named = [part for part in layers if not part.isdecimal()]
    going_up = named if set(taps) <= {2, 4, 8, 16, 32} else named[-1:]
    return any(map(_TRANSPOSED.search, layers)) or any(map(_UPWARD.fullmatch, going_up))


def is_optimizer_state(name: str) -> bool:
    """Return whether a tensor or a container of this name, `a.b.c`, belongs to an optimizer."""
    return bool(_OPTIMIZER.search(name) or _MOMENTS.search(name) or name_parts(name)[-1] in _LAST)


def is_averaged(name: str) -> bool:
    """Return whether a part of a name is one that averaged copies of a network have, such as `model_ema`."""
    return any(map(_says_average, name_parts(name)))


def _says_average(part: str) -> bool:
    words = set(part_words(part))
    others = words - _COPIES - _RELATED
    named = others <= _NETWORK
    return bool(words & _AVERAGES or (words & _COPIES and named) or (words & _RELATED and others and named))


def guess_warnings(selection: Selection, kernels: Mapping[str, Kernel], doubts: Mapping[str, str]) -> list[str]:
    """Return a line for each kind of uncertain guess, with the layers that it is about.

    kernels: every usable tensor as it is taken, by name; doubts: name → which.
    """
    of_groups = dict.fromkeys(
        (PERHAPS_MULTIPLIED, PERHAPS_GROUPED, PERHAPS_FIRST), "`groups` or `arch` sets the number of groups"
    )
    transposed = (NAMED_TRANSPOSED, PERHAPS_TRANSPOSED, PERHAPS_EVEN)
    advice = dict.fromkeys(transposed, "if so, use `transposed` or `arch`") | of_groups
    left_out = {entry.name for entry in selection.skipped if not entry.reason.startswith("depthwise")}
    selection.doubts = {name: doubt for name, doubt in doubts.items() if name not in left_out}
    return [
        f"{doubt}: {_listed(doubted)}; {what}"
        for doubt, what in advice.items()
        if (doubted := [kernels[name] for name, found in selection.doubts.items() if found == doubt])
    ]


def _listed(kernels: Sequence[Kernel]) -> str:
    """Name the kernels: the first by themselves, of others those together whose names differ in numbers alone."""
    rest = Counter(re.sub(r"\d+", "*", kernel.name) for kernel in kernels[NAMED:])
    more = [f"{glob} ({count} more)" for glob, count in rest.items()]
    return ", ".join([*(f"{kernel.name} {list(kernel.shape)}" for kernel in kernels[:NAMED]), *more])


def non_model_tensors(tensors: Infos) -> dict[str, str]:
    """Return the tensors of a file that belong to training: name → reason.

    Those are an optimizer's state, and copies such as `model_ema.*` of tensors that have the same shape and, without
    that prefix or suffix, the same name. Tensors with fewer than three axes are ignored.
    """
    large = {name: info.shape for name, info in tensors.items() if len(info.shape) >= 3}
    reasons = {name: "optimizer state, not part of the network" for name in large if is_optimizer_state(name)}
    averaged = {name: shape for name, shape in large.items() if name not in reasons and is_averaged(name)}
    own = {name: shape for name, shape in large.items() if name not in reasons and name not in averaged}
    reasons |= dict.fromkeys(_copies(averaged, own), "a copy of another tensor, such as a moving average")
    return {name: reasons[name] for name in large if name in reasons}


def _copies(averaged: Shapes, own: Shapes) -> Iterator[str]:
    """Yield the tensors that are copies of others.

    The copies under one prefix are those of one other prefix, and at least half as many as there are tensors under it:
    a single name in common is chance.
    """
    if not averaged:
        return
    ends: dict[str, dict[str, str]] = defaultdict(dict)  # the end of a name, joined → what stands before → the name
    for name in own:
        parts = name_parts(name)
        for place in range(len(parts)):
            ends[_joined(parts[place:])].setdefault(_joined(parts[:place]), name)
    groups: dict[str, dict[str, set[str]]] = defaultdict(dict)  # prefix → tensor → prefixes of its originals
    for name, shape in averaged.items():
        parts = name_parts(name)
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
