"""The paper's networks (Table 4), ResNet-18 for 32×32 images, and checkpoints loaded into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

from convsim_cli.checkpoint import Checkpoint
from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.experiments.libraries import find_network

NAMES = ("cnn1", "cnn2", "cnn:WIDTH", "resnet18", "torchvision:NAME", "timm:NAME", "package.module:callable")
CLASSES = 10  # of the built-in networks, unless given
BUILT_IN_SIDE, OTHER_SIDE = 32, 224  # pixels along each axis of the images that networks are usually given


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
        return make(classes)


def is_built_in(name: str) -> bool:
    """Return whether a network is one of convsim's own, for 32×32 images."""
    return name.startswith("cnn:") or ":" not in name


def match_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Return model name → file name for every tensor of a network.

    A common prefix in the file, such as `module.`, is found by itself. Raises InputError that lists what is missing
    and what has another shape (got and expected).
    """
    state = model.state_dict()
    prefix = _common_prefix(state, checkpoint.tensors)
    missing = [
        name for name in state if prefix + name not in checkpoint.tensors and not name.endswith("num_batches_tracked")
    ]
    shared = [name for name in state if prefix + name in checkpoint.tensors]
    shapes = {name: checkpoint.tensors[prefix + name].shape for name in shared}
    wrong = [
        f"{n} is {list(shapes[n])}, expected {list(state[n].shape)}"
        for n in shared
        if shapes[n] != tuple(state[n].shape)
    ]
    if missing or wrong:
        unexpected = [name for name in checkpoint.tensors if name not in {prefix + name for name in state}]
        said = [f"{len(missing)} of {len(state)} tensors missing ({_some(missing)})"] if missing else []
        said += [f"{len(wrong)} of another shape ({_some(wrong)})"] if wrong else []
        said += [f"{len(unexpected)} that it does not have ({_some(unexpected)})"] if unexpected else []
        raise InputError(f"{checkpoint.path}: does not fit --arch: {'; '.join(said)}")
    return {name: prefix + name for name in shared}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Copy a checkpoint's tensors into a network and return `match_names`, whose errors it raises."""
    names = match_names(model, checkpoint)
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


def _common_prefix(state: Mapping[str, object], names: Mapping[str, object]) -> str:
    """The prefix under which most of a network's names are found in a file."""
    found = Counter(
        name.removesuffix(ours) for ours in state for name in names if name == ours or name.endswith("." + ours)
    )
    return found.most_common(1)[0][0] if found else ""


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
