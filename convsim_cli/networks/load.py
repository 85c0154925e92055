"""Open a checkpoint, a checkpoint with its network, or a new network; load its inputs; tell whether it was trained.

A checkpoint's tensors are matched with a network's by their names, whatever prefix or wrapper these have in the file. A
parameter that a network holds under several names is changed under each of them.

The inputs that a network takes are found by a dry run, since a network may define its layers in any order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from os import PathLike
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.base import Checkpoint, LaidOutCheckpoint, storage_extent
from convsim_cli.checkpoints.formats import StateDict, open_checkpoint
from convsim_cli.errors import ConvsimError, InputError, brief, did_you_mean, some_of
from convsim_cli.kernels import (
    FLOATING,
    WRAPPERS,
    Kernel,
    Patterns,
    Selection,
    axes_of,
    file_kernels,
    is_averaged,
    is_convolution,
    is_optimizer_state,
    living_filters,
    module_kernels,
)
from convsim_cli.layers import side_effect_free
from convsim_cli.networks.architectures import build_network, usual_side, warn_of_random_weights
from convsim_cli.settings import InputOptions

if TYPE_CHECKING:
    from convsim_cli.inputs.images import Dataset

_USUAL = ("", "model.")  # prefixes
_WRAPPER = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")
USUAL = (3, 1)  # channels of images
SPREAD = 3.0  # how many times the spread of independent weights a trained layer's norms have to show
FEWEST = 8  # living filters that a spread is taken of
MOST_VALUES = 1 << 20  # of a batch-norm statistic: a larger tensor of that name is something else
NEAR_ZERO = 0.35  # share of weights below a tenth of their filter's root mean square: raw Algorithm 1 leaves half
_COUNTER = "num_batches_tracked"  # of batch normalization: optional in files


@dataclass
class ModelCheckpoint:
    """A checkpoint, the kernels selected in it, and with `arch` the network that holds its weights.

    names: the network's name of each tensor → the checkpoint's; aliases: a kernel's name → the checkpoint's other names
    of the same parameter.
    """

    checkpoint: Checkpoint
    selection: Selection
    model: nn.Module | None = None
    arch: str | None = None
    names: dict[str, str] | None = None
    aliases: dict[str, list[str]] = field(default_factory=dict)

    @property
    def kernels_changed(self) -> bool:
        """Whether the file says that its kernels were changed after training, by `convsim init`."""
        return "convsim.layers" in self.checkpoint.metadata


def open_model_checkpoint(
    path: str | PathLike[str] | None,
    arch: str | None = None,
    patterns: Patterns | None = None,
    seed: int = 0,
    classes: int | None = None,
    key: str | None = None,
    *,
    pretrained: bool = False,
    parametrized: bool = False,
    for_writing: bool = False,
) -> ModelCheckpoint:
    """Open a checkpoint, build a new network by name, or load a checkpoint into a network.

    pretrained: see `find_network`. parametrized: whether to select a network's layers that compute their weight from
    other parameters. for_writing: see `open_checkpoint`. Raises CheckpointError for a file that cannot be read;
    InputError for an unknown network, a checkpoint that does not fit it, patterns that match nothing, and arguments
    that would have no effect.
    """
    patterns = patterns or Patterns()
    if path is None and arch is None:
        raise InputError("pass a `path`, or `arch` for a new network")
    if key is not None and path is None:
        raise InputError("`key` applies only to a `path`; `arch` alone creates a new network")
    if classes is not None and arch is None:
        raise InputError("`num_classes` requires `arch`")
    if pretrained and (arch is None or path is not None):
        raise InputError("`pretrained` requires `arch`, and no `path`, which has weights of its own")
    if arch is None:
        assert path is not None
        checkpoint: Checkpoint = open_checkpoint(path, key, for_writing=for_writing)
        if patterns.layout in ("hwio", "ohwi"):
            checkpoint = LaidOutCheckpoint(checkpoint, patterns.layout)
        selection = file_kernels(checkpoint.tensors, patterns, checkpoint.unfit, checkpoint.metadata)
        checkpoint.notes += [f"{checkpoint.name}: {line}" for line in selection.guess_warnings]
        return ModelCheckpoint(checkpoint, selection)
    if patterns.groups or patterns.transposed:
        raise InputError("`groups` and `transposed` apply only without `arch`, which determines them exactly")
    if patterns.layout:
        raise InputError("`layout` applies only without `arch`, whose tensors are all in torch's layout")
    model = build_network(arch, classes, seed, pretrained)
    if path is None:
        if not pretrained:
            warn_of_random_weights(arch)
        checkpoint, names = StateDict(Path(arch), model.state_dict()), None
    else:
        checkpoint = open_checkpoint(path, key, for_writing=for_writing)
        names = load_weights(model, checkpoint, arch)
    found = module_kernels(model, patterns, names, parametrized=parametrized)
    aliases = find_aliases(model, found.kernels, names)
    selection = replace(found, kernels=[])
    for kernel in found.kernels:  # tied weights share memory, and are written under each name
        selection.add(kernel, None if kernel.name in aliases else checkpoint.unfit.get(kernel.name))
    return ModelCheckpoint(checkpoint, selection, model, arch, names, aliases)


def load_weights(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Copy a checkpoint's tensors into a network and return `match_names`.

    Raises its errors, and InputError if copies of one parameter differ.
    """
    names = match_names(model, checkpoint, arch)
    check_copies(model, checkpoint, names)
    model.load_state_dict({ours: checkpoint.load(theirs) for ours, theirs in names.items()}, strict=False)
    return names


def match_names(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Return the network's name → the checkpoint's for every tensor of a network.

    A common prefix in the file is found, and names of wrappers such as `module.` are ignored wherever they stand. A
    parameter that the file holds under another of its names is found there. arch: what to call the network. Tensors
    that the network does not have, and prefixes that would have fitted as well, are added to the checkpoint's `notes`.
    Raises InputError that lists what is missing, what has another shape (found and expected), and the first tensor of
    integers where floating-point numbers are expected.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    full_names = [list(state), list(checkpoint.tensors)]
    plain = [{_WRAPPER.sub("", name): name for name in names} for names in full_names]
    if list(map(len, plain)) != list(map(len, full_names)):  # two names would become one
        plain = [{name: name for name in names} for names in full_names]
    ours, theirs = plain  # without the names of wrappers → the full name
    prefix, *others = _common_prefixes(ours, theirs)
    found = {full: theirs[prefix + name] for name, full in ours.items() if prefix + name in theirs}
    for group in names_of_one_tensor(state):  # the file may hold the tensor under any of them
        known = [found[name] for name in group if name in found]
        found |= {name: known[0] for name in group if known and name not in found}
    names = {name: found[name] for name in state if name in found}
    expected = {*names.values(), *(theirs.get(prefix + name) for name in ours)}
    copies = tuple(filter(None, others))
    unexpected = [
        full
        for name, full in theirs.items()
        if name.startswith(prefix) and full not in expected
        if not name.endswith(_COUNTER) and not name.startswith(copies)
    ]
    _check_fit(state, names, unexpected, checkpoint)
    if others:
        fit = ", ".join(other or "no prefix" for other in others)
        took = f"loaded the tensors under {prefix}" if prefix else "loaded the tensors without a prefix"
        checkpoint.notes.append(f"{checkpoint.name}: {took}; those under {fit} would fit as well")
    if unexpected:
        checkpoint.notes.append(
            f"{checkpoint.name}: `arch`{f' {arch}' if arch else ''} has no place for {len(unexpected)} of its tensors "
            f"({some_of(unexpected)}); they are left unchanged"
        )
    return names


def _common_prefixes(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the prefix under which a file holds most of a network's names, then those that fit equally well.

    Of several, no prefix and `model.` come first, and averaged copies last. Optimizer state does not count.
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


def _check_fit(
    state: Mapping[str, Tensor], names: Mapping[str, str], unexpected: list[str], checkpoint: Checkpoint
) -> None:
    """Raise InputError that lists what is missing and what has another shape, and for codes of a quantized weight."""
    infos = {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
    missing = [name for name in state if name not in names and not name.endswith(_COUNTER)]
    wrong = [
        f"{name} is {list(info.shape)}, expected {list(state[name].shape)}"
        for name, info in infos.items()
        if info.shape != tuple(state[name].shape)
    ]
    if missing or wrong:
        problems = [f"{len(missing)} of {len(state)} tensors missing ({some_of(missing)})"] if missing else []
        problems += [f"{len(wrong)} of another shape ({some_of(wrong)})"] if wrong else []
        problems += [f"{len(unexpected)} unexpected ({some_of(unexpected)})"] if unexpected else []
        raise InputError(f"{checkpoint.name}: does not fit `arch`: {'; '.join(problems)}")
    for theirs in names.values():
        if checkpoint.unfit.get(theirs, "").startswith("sparse"):
            raise InputError(f"{checkpoint.name}: {theirs} is {checkpoint.unfit[theirs]}")
    floating = {names[name]: info.dtype for name, info in infos.items() if state[name].is_floating_point()}
    codes = [name for name, dtype in floating.items() if dtype not in FLOATING]
    if codes:
        more = f", and {len(codes) - 1} others like it" if codes[1:] else ""
        raise InputError(f"{checkpoint.name}: {codes[0]} is {floating[codes[0]]}: dequantize it first{more}")


def check_copies(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Raise InputError if a checkpoint holds copies of one parameter that differ.

    names: the network's name of each tensor → the checkpoint's.
    """
    for group in names_of_one_tensor(model.state_dict(keep_vars=True)):
        first, *copies = dict.fromkeys(names[name] for name in group if name in names) or [""]
        for copy in copies:
            one, other = checkpoint.load(first), checkpoint.load(copy)
            same_type = (one.dtype, one.shape) == (other.dtype, other.shape)
            if not same_type or not torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))):
                raise InputError(
                    f"{checkpoint.name}: {first} and {copy} are one parameter of the network, but differ; save the "
                    "network again, with its weights tied"
                )


def find_aliases(
    model: nn.Module, kernels: Iterable[Kernel], names: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Return each kernel's name → the checkpoint's other names of the same parameter, where there are any.

    names: as in `check_copies`; the network's own for None. Raises InputError for a kernel that the checkpoint also
    holds as part of another tensor.
    """
    state = model.state_dict(keep_vars=True)
    names = names or {name: name for name in state}
    aliases: dict[str, list[str]] = {}
    groups = names_of_one_tensor(state)
    extents = {name: extent for name, tensor in state.items() if (extent := storage_extent(tensor))}
    for kernel in kernels:
        group = next((group for group in groups if kernel.name in [names.get(name) for name in group]), None)
        if group is None:  # a parametrized layer has its weight under no name
            continue
        storage, first, end = extents.get(group[0], (0, 0, 0))
        others = ((name, *extent) for name, extent in extents.items() if name not in group)
        other = next((n for n, place, begin, stop in others if place == storage and begin < end and first < stop), None)
        if other is not None and other in names:
            raise InputError(f"{kernel.name}: shares memory with {names[other]}, a tensor of another shape; exclude it")
        found = [name for name in dict.fromkeys(names[name] for name in group if name in names) if name != kernel.name]
        if found:
            aliases[kernel.name] = found
    return aliases


def names_of_one_tensor(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names in a state dict, those of one tensor together: equal in memory, offset, shape and stride."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        place = storage_extent(tensor)
        groups.setdefault((place, tensor.shape, tensor.stride()) if place else name, []).append(name)
    return list(groups.values())


def check_inputs(options: InputOptions) -> None:
    """Raise InputError for options without effect on the inputs."""
    from convsim_cli.measurement.synthetic import FEATURES, LAYER_PROBES

    if options.input_size == 1 and options.input in ("natural", FEATURES):
        raise InputError(f"`input_size` 1: `input` {options.input} has no mean, so a pixel is 0; use 2 or more")
    if options.input_channels not in (None, 3) and options.input not in LAYER_PROBES:
        raise InputError(
            f"`input_channels` applies only to synthetic inputs: the images of `input` {options.input} have 3"
        )
    if options.input in LAYER_PROBES and (options.mean, options.std) != (None, None):
        raise InputError(
            f"`mean` and `std` normalize images: `input` {options.input} has none; choose a dataset or folder"
        )


def require_layer_inputs(options: InputOptions) -> None:
    """Raise InputError for options that require a network: images, or another number of input channels."""
    from convsim_cli.inputs.datasets import NAMES
    from convsim_cli.measurement.synthetic import LAYER_PROBES

    if options.input_channels is not None:
        raise InputError("`input_channels` requires `arch`: each layer is probed with as many channels as it takes")
    name = str(options.input)
    if name not in LAYER_PROBES:
        is_known = _is_labeled(name) or Path(name).is_dir()
        hint = did_you_mean(name, (*LAYER_PROBES, *NAMES))
        what = "needs `arch`: a checkpoint alone is probed layer by layer" if is_known else hint
        raise InputError(f"`input` {name}: {what}")


def load_inputs(
    options: InputOptions, seed: int, model: nn.Module, arch: str, training: bool = False
) -> tuple[Tensor, Dataset | None]:
    """Return the inputs `[samples, C, …]` of a network, and the dataset that they are from where they have labels.

    seed: of synthetic inputs. training: take the first training images of a dataset, in place of its test images.
    Raises InputError.
    """
    from convsim_cli.inputs.datasets import NAMES, load_dataset, load_images
    from convsim_cli.inputs.images import resize
    from convsim_cli.measurement.synthetic import FEATURES, PROBES, SIDE, make_inputs

    def length(axes: int) -> int:
        return options.input_size or (usual_side(arch) if axes == 2 else SIDE[axes])

    name = str(options.input)
    if name in PROBES:
        channels, axes = find_input(model, length, options.input_channels)
        return make_inputs(name, options.samples, channels, (length(axes),) * axes, seed), None
    if name == FEATURES:
        raise InputError(
            f"`input` {FEATURES} applies only without `arch`, which gives each layer its actual inputs; use white, "
            "natural, a dataset or a folder"
        )
    if not _is_labeled(name):
        if not Path(name).is_dir():
            raise InputError(f"`input` {name!r}: no such folder; {did_you_mean(name, (*PROBES, *NAMES))}")
        return load_images(Path(name), options.samples, length(2), options.mean, options.std), None
    folder = Path(options.data_dir)
    data = load_dataset(name, folder, length(2), options.mean, options.std, test_only=not training)
    split = data.train if training else data.test
    return resize(data.normalize(split.images[: options.samples]), options.input_size), data


def _is_labeled(name: str) -> bool:
    from convsim_cli.inputs.datasets import NAMES

    return name in NAMES or name.startswith("folder:")


@contextmanager
def explain_failure(shape: Sequence[int], arch: str, advice: str) -> Iterator[None]:
    """Raise InputError if the code of a network raises in the block: it does not run on inputs of this shape."""
    try:
        yield
    except ConvsimError:
        raise
    except (Exception, SystemExit) as error:  # whatever a network's own code raises
        raise InputError(f"`arch` {arch}: does not run on inputs {list(shape)} ({brief(error)}); {advice}") from error


def find_input(model: nn.Module, side: Callable[[int], int], channels: int | None = None) -> tuple[int, int]:
    """Return the number of channels that a network takes, and of the axes that follow them (2 for images).

    An input of zeros is tried with 3 channels, with 1, and with those of each convolution; the first convolution that
    runs on it decides. The network stays as it was. side: number of axes → length of each. channels: their number, if
    it is known. A network that takes none of these gets what its first convolution is defined with.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_convolution(layer)]
    axes = [axes for axes, _ in Counter(axes_of(layer) for layer in layers).most_common()]
    usual = [(number, count) for count in axes for number in (USUAL if channels is None else (channels,))]
    own = [(layer.in_channels, axes_of(layer)) for layer in layers if channels is None]
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    try:
        with side_effect_free(model), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(_stop))
            for number, count in dict.fromkeys(usual + own):
                if _accepts(model, number, (side(count),) * count):
                    return number, count
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
    return own[0] if own else usual[0]


class _Accepted(BaseException):  # no Exception: a network may catch those
    """A convolution has run."""


def _accepts(model: nn.Module, channels: int, sides: tuple[int, ...]) -> bool:
    """Return whether a convolution runs on an input of zeros, before anything fails."""
    parameter = next(model.parameters())
    try:
        model(torch.zeros(1, channels, *sides, device=parameter.device))
    except _Accepted:
        return True
    except Exception:  # whatever a network's own code raises for an input that it does not take
        return False
    return False


def _stop(*_: object) -> NoReturn:
    raise _Accepted


def looks_trained(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint's weights look trained.

    Batch-norm statistics decide where there are any: training leaves a counter above zero or a running mean other than
    zero. Without them the filters' norms do: their spread is `SPREAD` times that of independent weights or more, in the
    median over the layers. Files written by `convsim init` then do not count as trained.
    """
    statistics = [
        name
        for name, info in checkpoint.tensors.items()
        if name.endswith(("num_batches_tracked", "running_mean")) and prod(info.shape) <= MOST_VALUES
        if isinstance(getattr(torch, info.dtype, None), torch.dtype)  # a file may hold others
    ]
    if statistics:
        return any((checkpoint.load(name).to(torch.complex128) != 0).any().item() for name in statistics)
    if "convsim.layers" in checkpoint.metadata:
        return False
    kernels = file_kernels(checkpoint.tensors, Patterns(layout="torch"), checkpoint.unfit).kernels
    spreads = [
        spread for kernel in kernels if (spread := norm_spread(kernel, checkpoint.load(kernel.name))) is not None
    ]
    return bool(spreads) and median(spreads) >= SPREAD


def norm_spread(kernel: Kernel, weight: Tensor) -> float | None:
    """Return the spread of a layer's filter norms, as a multiple of what independent weights give.

    That is the coefficient of variation of the living filters' norms times √(2·C·N): near 1 for Gaussian weights, 0.63
    for uniform ones. None for fewer than `FEWEST` filters, for NaN or infinity, and where `NEAR_ZERO` or more of the
    weights are next to zero: as raw Algorithm 1 takes weights there, the norms that are left spread too.
    """
    filters = kernel.to_filters(weight)
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), dtype=torch.float64)
    if not norms.isfinite().all():
        return None
    living = living_filters(filters)
    if living.sum() < FEWEST:
        return None
    weights = filters[0, 0].numel()
    next_to_zero = (0.1 * norms / weights**0.5).to(filters.dtype)  # of this type, so that no copy is made in another
    shares = (filters.abs() < next_to_zero[..., None, None]).sum(dim=(-2, -1)) / weights
    if shares[living].mean() >= NEAR_ZERO:
        return None
    norms = norms[living]
    return (norms.std(correction=0) / norms.mean() * (2 * weights) ** 0.5).item()
