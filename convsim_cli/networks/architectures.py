"""Networks by name: the paper's (Table 4), ResNet-18 for 32×32 images, torchvision's, timm's, and your own."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsim_cli.checkpoints.formats import is_on_hub, new_suffixes
from convsim_cli.device import generator_states, restore_generators, seed_generators
from convsim_cli.errors import (
    ConvsimError,
    ConvsimWarning,
    DownloadError,
    InputError,
    brief,
    did_you_mean,
    quoted,
    to_install,
)

Build = Callable[[int | None], nn.Module]  # builds a network with so many classes; None: its own number

CLASSES = 10  # of the built-in networks, unless given
LIBRARIES = ("torchvision", "timm")
BUILT_IN_SIDE, OTHER_SIDE = 32, 224  # pixels along each axis of the images that networks are usually given


def build_network(name: str, classes: int | None = None, seed: int = 0, pretrained: bool = False) -> nn.Module:
    """Return a network by name: freshly initialized, the same for the same seed, or pretrained.

    name: for 3-channel 32×32 images `cnn1` (118,858 parameters with 10 classes), `cnn2` (458,890), `cnn:WIDTH` with any
    width ≥ 1 (Table 4), or `resnet18` with a 3×3 stem of stride 1 and no pooling after it; or one of another library
    (`find_network`). classes: its own number for None, 10 for the built-in ones. pretrained: see `find_network`. Raises
    InputError for another name, DownloadError.
    """
    build = find_network(name, pretrained)
    states = generator_states()
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        try:
            return build(classes).float()  # networks in half or double precision are measured and trained in float32
        finally:
            restore_generators(states)


def find_network(name: str, pretrained: bool = False) -> Build:
    """Return a function that builds the network of that name.

    name: a built-in network (`build_network`), `torchvision:NAME`, `timm:NAME` (also `timm:hf-hub:OWNER/NAME`) or
    `package.module:callable`, imported from the current folder too; the number of classes goes to its `num_classes`,
    where it takes that. pretrained: with the weights that the library publishes, which it downloads once; for another
    number of classes the layers that depend on it are fresh. Raises InputError, with the closest known name, if there
    is no such network, it has no such weights, or the library is missing. What builds it raises InputError if the
    user's own code fails, and DownloadError if weights cannot be fetched.
    """
    library, _, rest = name.partition(":")
    if pretrained and library not in LIBRARIES:
        raise InputError(f"`pretrained` requires `arch` torchvision:NAME or timm:NAME, got {name}")
    if name in BUILT_IN:
        return lambda classes: BUILT_IN[name](classes or CLASSES)
    if library == "cnn" and rest.isdecimal() and 0 < len(rest.lstrip("0")) < 10:  # int() refuses thousands of digits
        return lambda classes: cnn(int(rest.lstrip("0")), classes or CLASSES)
    if library == "torchvision" and rest:
        return _find_in_torchvision(rest, pretrained)
    if library == "timm" and rest:
        return _find_in_timm(rest, pretrained)
    if library not in ("", "cnn") and rest:
        return _find_callable(library, rest)

    if library == "cnn" and rest.isdecimal():
        raise InputError(f"unknown network {name!r}: expected a width from 1 to 999,999,999")
    if Path(name).suffix in new_suffixes() or Path(name).is_file():
        raise InputError(
            f"`arch` {name}: is a file, not a network; pass it as a checkpoint: convsim measure {quoted(name)}"
        )
    from torchvision import models

    in_torchvision = name in models.list_models()
    hint = f"did you mean 'torchvision:{name}'?" if in_torchvision else did_you_mean(name, ARCHS)
    raise InputError(f"unknown network {name!r}: {hint}")


def names_code(name: str) -> bool:
    """Return whether a network's name selects code to run: a callable, or a model on a hub.

    Only a person may choose that. convsim's own networks, and those that torchvision and timm ship, are safe to build
    by a name that stands in a file.
    """
    library, separator, rest = name.partition(":")
    return bool(separator) and library != "cnn" and (library not in LIBRARIES or ":" in rest)


def to_repeat(arch: str, weights: str | None) -> dict[str, str]:
    """Return by option what no file may choose by itself: networks whose names select code, and weights on the Hub."""
    found = {"arch": arch} if names_code(arch) else {}
    return found | ({"weights": weights} if weights and is_on_hub(weights) else {})


def warn_of_random_weights(name: str) -> None:
    """Warn if a name of timm's has a tag of pretrained weights (`timm:resnet18.a1_in1k`) that were not asked for."""
    if name.startswith("timm:") and "." in name:
        said = f"{name} names pretrained weights, but without `pretrained` its weights are random"
        warnings.warn(said, ConvsimWarning, stacklevel=3)


def usual_side(name: str) -> int:
    """Return the usual image size of a network, in pixels along each axis."""
    return BUILT_IN_SIDE if name.startswith("cnn:") or ":" not in name else OTHER_SIDE


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def cnn(width: int, classes: int) -> nn.Sequential:
    """Return a network of Table 4, whose `Conv2d(in, out, 3, 2)` reads kernel 3, padding 2, stride 1.

    Takes `[B, 3, 32, 32]`; the last maps are 3×3. width: filters of each of the four convolutions, ≥ 1.
    """
    # Pooling stands before LeakyReLU, not after it as in the table: the maximum of a rising function is the function of
    # the maximum, to the bit, and a quarter of the values is left to go through it.
    layers: list[nn.Module] = []
    for channels in (3, width, width, width):
        convolution = nn.Conv2d(channels, width, 3, padding=2)
        layers += [convolution, nn.BatchNorm2d(width), nn.MaxPool2d(2, 2), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, classes))


def resnet18(classes: int) -> nn.Module:
    """Return ResNet-18 for 32×32 images: a 3×3 first convolution of stride 1 and no pooling after it."""
    from torchvision.models import resnet18 as resnet18_for_imagenet

    model: nn.Module = resnet18_for_imagenet(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


BUILT_IN: dict[str, Callable[[int], nn.Module]] = {  # by name, given the number of classes
    "cnn1": lambda classes: cnn(64, classes),
    "cnn2": lambda classes: cnn(128, classes),
    "resnet18": resnet18,
}
ARCHS = (*BUILT_IN, "cnn:WIDTH", "torchvision:NAME", "timm:NAME", "package.module:callable")

_AUXILIARY = ("googlenet", "inception_v3")  # give a tuple of logits in training, unless told not to


def _find_in_torchvision(name: str, pretrained: bool) -> Build:
    from torchvision import models

    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        hint = did_you_mean(name, models.list_models(), "torchvision:")
        raise InputError(f"unknown network torchvision:{name}: {hint}") from error
    weights = models.get_model_weights(builder) if pretrained else None
    if weights is not None and not list(weights):
        raise InputError(f"torchvision has no pretrained weights of {name}; leave out `pretrained`")
    parameters = inspect.signature(builder).parameters
    options: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    if name.removeprefix("quantized_") in _AUXILIARY:
        options["aux_logits"] = False

    def build(classes: int | None) -> nn.Module:
        chosen = options if classes is None else options | {"num_classes": classes}
        if weights is None:
            return _build_quietly(builder, chosen)
        kept = f"it keeps {weights['DEFAULT'].url} in {torch.hub.get_dir()}/checkpoints"
        with _download("torchvision", name, kept):
            trained: nn.Module = _build_quietly(builder, options | {"weights": "DEFAULT"})
        if classes is None:
            return trained
        fresh: nn.Module = _build_quietly(builder, chosen)
        shapes = {key: tensor.shape for key, tensor in fresh.state_dict().items()}  # some depend on the classes
        fitting = {key: tensor for key, tensor in trained.state_dict().items() if shapes.get(key) == tensor.shape}
        fresh.load_state_dict(fitting, strict=False)
        return fresh

    return build


def _find_in_timm(name: str, pretrained: bool) -> Build:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"`arch` timm:{name} needs timm, which is not installed: {to_install('timm')}") from error
    elsewhere = ":" in name  # hf-hub:OWNER/NAME: timm looks for the network and its weights there
    if not elsewhere and not timm.is_model(name):
        raise InputError(f"unknown network timm:{name}: {did_you_mean(name, timm.list_models(), 'timm:')}")
    if pretrained and not elsewhere and not timm.models.is_model_pretrained(name):
        raise InputError(f"timm has no pretrained weights of {name}; leave out `pretrained`")

    def build(classes: int | None) -> nn.Module:
        options = {"model_name": name, "pretrained": pretrained}
        options |= {} if classes is None else {"num_classes": classes}
        kept = "it keeps them in the Hugging Face cache (HF_HOME)"
        with _download("timm", name, kept) if pretrained or elsewhere else nullcontext():
            return _build_quietly(timm.create_model, options)

    return build


@contextmanager
def _download(library: str, name: str, kept: str) -> Iterator[None]:
    """Turn whatever a library raises when it cannot fetch its weights into one line."""
    try:
        yield
    except Exception as error:
        what = f"{library}:{name} cannot be fetched ({brief(error)})"
        raise DownloadError(f"{what}; {library} downloads them once: {kept}") from error


def _find_callable(module_name: str, name: str) -> Build:
    where = f"`arch` {module_name}:{name}"
    if module_name.endswith(".py") or "/" in module_name:
        dotted = ".".join(part for part in Path(module_name).with_suffix("").parts if part.isidentifier())
        raise InputError(f"{where}: is a file; write {dotted}:{name}, as Python imports it from here")
    with _users_code(where, f"importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            close = get_close_matches(module_name, LIBRARIES, n=1)
            hint = f"did you mean {close[0]}:{name}?" if close else "the current folder is searched too"
            raise InputError(f"{where}: cannot import {module_name} ({error}); {hint}") from error
    make = getattr(module, name, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = did_you_mean(name, known, f"{module_name}:")
        raise InputError(f"{where}: {module_name} has no callable {name}; {hint}")

    def build(classes: int | None) -> nn.Module:
        with _users_code(where, f"calling {name}"):
            options = {}
            if classes is not None:
                parameters = inspect.signature(make).parameters.values()
                takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
                if takes_any or any(parameter.name == "num_classes" for parameter in parameters):
                    options["num_classes"] = classes
            model = _build_quietly(make, options)
        if not isinstance(model, nn.Module):
            raise InputError(f"{where}: returns a {type(model).__name__}; expected a torch.nn.Module")
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
            raise InputError(f"{where}: has lazy layers without weights; run it on an input once before returning it")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError(f"{where}: has parameters on the device meta, without values; return it on a real device")
        return model

    return build


@contextmanager
def _users_code(where: str, doing: str) -> Iterator[None]:
    """Run code of the user: it imports from the current folder too, as under `python -m`, and prints on stderr.

    Whatever it raises becomes one line.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except ConvsimError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: {doing} raised {type(error).__name__}{f': {said}' if said else ''}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _build_quietly(make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Build without the notes that libraries give on how they initialize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(**options)
