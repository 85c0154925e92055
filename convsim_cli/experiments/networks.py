"""The paper's networks (Table 4), ResNet-18 for 32×32 images, and checkpoints loaded into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from convsim_cli.checkpoint import Checkpoint
from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.experiments.libraries import find_network
from convsim_cli.kernels import FLOATING

NAMES = ("cnn1", "cnn2", "cnn:WIDTH", "resnet18", "torchvision:NAME", "timm:NAME", "package.module:callable")
CLASSES = 10  # of the built-in networks, unless given
_USUAL = ("", "module.", "model.")  # prefixes of plain files and of the usual wrappers
_COUNTER = "num_batches_tracked"  # of batch normalisation: files may do without
_BUILT_IN_SIDE, _OTHER_SIDE = 32, 224  # pixels along each axis of the images that networks are usually given


def build_network(name: str, classes: int | None = None, seed: int = 0) -> nn.Module:
    """Return a freshly initialised network, the same for the same seed.

    name: for 3-channel 32×32 images `cnn1` (118,858 parameters with 10 classes), `cnn2` (458,890), `cnn:WIDTH` with any
    width ≥ 1 (Table 4), or `resnet18` with a 3×3 stem of stride 1 and no pooling after it; or one of another library
    (`libraries.find_network`). classes: its own number for None, 10 for the built-in ones. Raises InputError for
    another name.
    """
    make = find_network(name) or _find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(classes).float()  # networks in half or double precision are measured and trained in float32


def is_built_in(name: str) -> bool:
    """Return whether a network is one of convsim's own, for 32×32 images."""
    return name.startswith("cnn:") or ":" not in name


def usual_side(name: str) -> int:
    """Return how many pixels along each axis the images have that a network is usually given."""
    return _BUILT_IN_SIDE if is_built_in(name) else _OTHER_SIDE


def match_names(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Return model name → file name for every tensor of a network.

    A common prefix in the file, such as `module.`, is found by itself; a parameter that the file holds under another of
    its names is found there. arch: what to call the network. What the file holds beyond the network, and prefixes that
    would have fitted as well, are added to the checkpoint's `note`. Raises InputError that lists what is missing, what
    has another shape (got and expected), and the first tensor that is no floating one where a floating one goes.
    """
    state, tensors = model.state_dict(), checkpoint.tensors
    prefix, *others = _common_prefixes(state, tensors)
    names = _places(model, state, prefix, tensors)
    missing = [name for name in state if name not in names and not name.endswith(_COUNTER)]
    wrong = [
        f"{ours} is {list(tensors[theirs].shape)}, expected {list(state[ours].shape)}"
        for ours, theirs in names.items()
        if tensors[theirs].shape != tuple(state[ours].shape)
    ]
    unexpected = _unexpected(tensors, prefix, {*names.values(), *(prefix + name for name in state)}, others)
    if missing or wrong:
        said = [f"{len(missing)} of {len(state)} tensors missing ({_some(missing)})"] if missing else []
        said += [f"{len(wrong)} of another shape ({_some(wrong)})"] if wrong else []
        said += [f"{len(unexpected)} that it does not have ({_some(unexpected)})"] if unexpected else []
        raise InputError(f"{checkpoint.path}: does not fit --arch: {'; '.join(said)}")
    _refuse_codes(state, names, checkpoint)
    if others:
        fit = ", ".join(other or "no prefix" for other in others)
        took = f"took the tensors under {prefix}" if prefix else "took the tensors without a prefix"
        _note(checkpoint, f"{checkpoint.path}: {took}; those under {fit} would fit as well")
    if unexpected:
        _note(
            checkpoint,
            f"{checkpoint.path}: --arch{f' {arch}' if arch else ''} has no place for {len(unexpected)} of its tensors "
            f"({_some(unexpected)}); they are left as they are",
        )
    return names


def load_weights(model: nn.Module, checkpoint: Checkpoint, arch: str = "") -> dict[str, str]:
    """Copy a checkpoint's tensors into a network and return `match_names`, whose errors it raises."""
    names = match_names(model, checkpoint, arch)
    model.load_state_dict({ours: checkpoint.load(theirs) for ours, theirs in names.items()}, strict=False)
    return names


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _find(name: str) -> Callable[[int | None], nn.Module]:
    kind, _, width = name.partition(":")
    if kind == "cnn" and width.isdecimal() and int(width) > 0:
        return lambda classes: _cnn(int(width), classes or CLASSES)
    known: dict[str, Callable[[int | None], nn.Module]] = {
        "cnn1": lambda classes: _cnn(64, classes or CLASSES),
        "cnn2": lambda classes: _cnn(128, classes or CLASSES),
        "resnet18": lambda classes: _resnet18(classes or CLASSES),
    }
    if name not in known:
        raise InputError(f"unknown network {name!r}: {did_you_mean(name, NAMES)}")
    return known[name]


def _cnn(width: int, classes: int) -> nn.Sequential:
    """Table 4: `Conv2d(in, out, 3, 2)` reads kernel 3, padding 2, stride 1; 32×32 comes down to 3×3."""
    # Pooling stands before LeakyReLU, not after it as in the table: the maximum of a rising function is the function of
    # the maximum, to the bit, and a quarter of the values is left to go through it.
    layers: list[nn.Module] = []
    for channels in (3, width, width, width):
        convolution = nn.Conv2d(channels, width, 3, padding=2)
        layers += [convolution, nn.BatchNorm2d(width), nn.MaxPool2d(2, 2), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, classes))


def _resnet18(classes: int) -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _common_prefixes(state: Mapping[str, object], tensors: Mapping[str, object]) -> list[str]:
    """The prefix under which most of a network's names are found in a file, and those that would do as well.

    Of several, the plain ones and those of wrappers come first, and averaged copies (EMA) last.
    """
    found: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(place + 1 for place, character in enumerate(name) if character == ".")]
        found.update(name[:start] for start in starts if name[start:] in state and not name.endswith(_COUNTER))
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    return sorted(best, key=lambda prefix: (prefix not in _USUAL, "ema" in prefix.lower())) or [""]


def _places(
    model: nn.Module, state: Mapping[str, object], prefix: str, tensors: Mapping[str, object]
) -> dict[str, str]:
    """Where each of a network's tensors is in a file; a parameter of several names may be under any of them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = {id(tensor): prefix + name for name, tensor in named if prefix + name in tensors}
    elsewhere = {name: places[id(tensor)] for name, tensor in named if id(tensor) in places}
    found = {name: prefix + name if prefix + name in tensors else elsewhere.get(name) for name in state}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _unexpected(tensors: Iterable[str], prefix: str, expected: Container[str], others: Iterable[str]) -> list[str]:
    """What a file holds under a prefix beyond a network's tensors, and apart from the copies under other prefixes."""
    copies = tuple(other for other in others if other)
    return [
        name
        for name in tensors
        if name.startswith(prefix)
        and name not in expected
        and not name.endswith(_COUNTER)
        and not (copies and name.startswith(copies))
    ]


def _refuse_codes(state: Mapping[str, Tensor], names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise InputError where a file holds the codes of a quantised weight: copied, they would be taken for weights."""
    types = {
        theirs: checkpoint.tensors[theirs].dtype for ours, theirs in names.items() if state[ours].is_floating_point()
    }
    codes = [name for name, kind in types.items() if kind not in FLOATING]
    if codes:
        more = f", and {len(codes) - 1} others like it" if codes[1:] else ""
        raise InputError(f"{checkpoint.path}: {codes[0]} is {types[codes[0]]}: dequantise it first{more}")


def _note(checkpoint: Checkpoint, line: str) -> None:
    checkpoint.note = f"{checkpoint.note}\n{line}" if checkpoint.note else line


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
