"""Networks by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from convsim_cli.checkpoints.formats import new_suffixes
from convsim_cli.errors import ConvsimWarning, InputError, did_you_mean
from convsim_cli.networks.built_in import cnn, resnet18
from convsim_cli.networks.third_party import find_network, names_pretrained_weights, suggest_network

ARCHS = ("cnn1", "cnn2", "cnn:WIDTH", "resnet18", "torchvision:NAME", "timm:NAME", "package.module:callable")
CLASSES = 10  # of the built-in networks, unless given
_BUILT_IN_SIDE, _OTHER_SIDE = 32, 224  # pixels along each axis of the images that networks are usually given


def build_network(name: str, classes: int | None = None, seed: int = 0, pretrained: bool = False) -> nn.Module:
    """Return a network by name: freshly initialized, the same for the same seed, or pretrained.

    name: for 3-channel 32×32 images `cnn1` (118,858 parameters with 10 classes), `cnn2` (458,890), `cnn:WIDTH` with any
    width ≥ 1 (Table 4), or `resnet18` with a 3×3 stem of stride 1 and no pooling after it; or one of another library
    (`find_network`). classes: its own number for None, 10 for the built-in ones. pretrained: see `find_network`. Raises
    InputError for another name, DownloadError.
    """
    make = find_network(name, pretrained) or _find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(classes).float()  # networks in half or double precision are measured and trained in float32


def warn_of_random_weights(name: str) -> None:
    """Warn where a name says which pretrained weights are meant, but they were not asked for."""
    if names_pretrained_weights(name):
        warnings.warn(
            f"{name} names pretrained weights, but without `pretrained` its weights are random",
            ConvsimWarning,
            stacklevel=3,
        )


def is_built_in(name: str) -> bool:
    """Return whether a network is one of convsim's own, for 32×32 images."""
    return name.startswith("cnn:") or ":" not in name


def usual_side(name: str) -> int:
    """Return how many pixels along each axis the images have that a network is usually given."""
    return _BUILT_IN_SIDE if is_built_in(name) else _OTHER_SIDE


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _find(name: str) -> Callable[[int | None], nn.Module]:
    kind, _, width = name.partition(":")
    if kind == "cnn" and width.isdecimal() and int(width) > 0:
        return lambda classes: cnn(int(width), classes or CLASSES)
    known: dict[str, Callable[[int | None], nn.Module]] = {
        "cnn1": lambda classes: cnn(64, classes or CLASSES),
        "cnn2": lambda classes: cnn(128, classes or CLASSES),
        "resnet18": lambda classes: resnet18(classes or CLASSES),
    }
    if name in known:
        return known[name]
    if Path(name).suffix in new_suffixes() or Path(name).is_file():
        raise InputError(f"`arch` {name}: is a file, not a network; give it as a checkpoint: convsim measure {name}")
    of_library = suggest_network(name)
    raise InputError(
        f"unknown network {name!r}: {f'did you mean {of_library!r}?' if of_library else did_you_mean(name, ARCHS)}"
    )
