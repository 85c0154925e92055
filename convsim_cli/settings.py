"""How options are declared: once, as fields of a dataclass, each with its type, range, unit and help.

The options of a command, the arguments of the library call of that name, their checks, and a run's `args.json` all
follow from the declarations. Here are those of `init` and `measure`; `training.config` has those of `train`. Nothing
here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, signature
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from convsim_cli.errors import InputError, did_you_mean, is_number, one_of
from convsim_cli.methods import METHODS

Channels = tuple[float, float, float]
Call = TypeVar("Call", bound=Callable[..., Any])
Options = TypeVar("Options", bound="CheckpointOptions")

DATA = ("cifar10", "cifar100", "digits")  # sets of images, by name; there are folders too
INPUTS = ("white", "uniform", "natural", *DATA)
ARCH_HELP = (
    "cnn1, cnn2, resnet18, torchvision:NAME, timm:NAME, …. Also cnn:WIDTH and package.module:callable. The built-in "
    "networks are for 32×32 images."
)
LARGEST = (1 << 63) - 1  # whole number that torch takes
KINDS = {  # in errors
    bool: "true or false",
    Sequence: "a list",
    Mapping: "a dictionary",
    tuple: "three numbers",
    PathLike: "a path",
    str: "a string",
}


@dataclass(frozen=True)
class Declaration:
    """What is declared of an option.

    types: the types that a value may have; a number or a word for (float, int, str). help: what it means, with its
    unit; `--help` shows its first sentence. group: the heading of its option, None for an argument that is no option.
    common: whether `--help` shows it; `--help-all` shows every option. choices: the values that a string may have, any
    if empty; the entries of a table explain themselves by their `meaning`. known: names to complete, where there are
    others too. above: exclusive lower bound of a number; least, most: inclusive bounds.
    """

    name: str
    types: tuple[type, ...]
    default: Any
    help: str
    group: str | None = None
    metavar: str | None = None
    common: bool = False
    choices: Collection[str] = ()
    known: Collection[str] = ()
    above: float | None = None
    least: float = 0
    most: float = math.inf

    def has_type(self, value: Any) -> bool:
        """Return whether a value has one of the types; a bool is not a number, and a string is not a list."""
        if isinstance(value, bool | str):
            return type(value) in self.types
        return isinstance(value, self.types)

    def check(self, value: Any) -> None:
        """Raise InputError for a value of another type, out of range, or not among the choices."""
        fits = self.has_type(value)
        if "\0" in str(value):
            raise InputError(f"`{self.name}` {value!r}: contains a NUL character")
        try:
            os.fsencode(str(value))
        except UnicodeEncodeError as error:  # of half a character; bytes of a path that are no text can be encoded
            raise InputError(f"`{self.name}` {value!r}: contains a character that no file name can have") from error
        if fits and isinstance(value, str):
            fits = not self.choices or value in self.choices
        elif fits and isinstance(value, int | float) and not isinstance(value, bool):
            fits = (value >= self.least if self.above is None else value > self.above) and value <= self.most
            fits = fits and value < math.inf
        if not fits:
            close = get_close_matches(str(value).lower(), self.choices, n=1)
            closest = f"; did you mean {close[0]!r}?" if close else ""
            expected = one_of([*self.choices, *self._expected_types()])
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number")
            raise InputError(f"`{self.name}` {value}: expected {expected}{closest}")
        if isinstance(value, tuple) and tuple in self.types and not (len(value) == 3 and all(map(is_number, value))):
            raise InputError(f"`{self.name}` {value}: expected three numbers")
        if isinstance(value, Mapping):
            for pattern, number in value.items():
                if not (isinstance(pattern, str) and is_number(number, whole=True)):
                    raise InputError(f"`{self.name}` {pattern!r}: {number!r}; expected a pattern and a whole number")
        if isinstance(value, int) and value > LARGEST:
            raise InputError(f"`{self.name}` {value}: expected a 64-bit number, at most {LARGEST}")

    def _expected_types(self) -> list[str]:
        limits = f"of {self.least} or above" if self.most == math.inf else f"from {self.least} to {self.most}"
        if self.above is not None:
            limits = f"above {self.above}" if self.most == math.inf else f"in ({self.above}, {self.most}]"
        if float in self.types:
            return [f"a number {limits}"]
        if int in self.types:
            return [f"a whole number {limits}"]
        return [name for kind, name in KINDS.items() if kind in self.types and not (kind is str and self.choices)]


def setting(default: Any, help: str, group: str | None = None, **more: Any) -> Any:
    """Declare a field. help, group and the rest: as in `Declaration`."""
    return field(default=default, metadata={"help": help, "group": group, **more})


@cache
def declarations(options: type) -> dict[str, Declaration]:
    """Return the declarations of a dataclass's fields by name, in their order."""
    hints, found = get_type_hints(options), {}
    for item in fields(options):
        kind = hints[item.name]
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one)]
        types = tuple(str if get_origin(one) is Literal else get_origin(one) or one for one in kinds)
        types = (*types, int) if float in types else types
        more = {**item.metadata, "choices": words} if words else item.metadata
        found[item.name] = Declaration(item.name, types, item.default, **more)
    return found


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """The network, the tensors to use, and the device."""

    arch: str | None = setting(None, ARCH_HELP, "Network", metavar="NAME", common=True)
    pretrained: bool = setting(False, "Weights published by torchvision or timm. Requires --arch.", "Network")
    num_classes: int | None = setting(
        None, "Number of classes. Default: that of the --arch network.", "Network", metavar="N", above=0
    )
    key: str | None = setting(
        None, "Nested dictionary to load from a pickle, such as ema.state_dict.", "Network", metavar="KEY"
    )
    include: Sequence[str] = setting(
        (), "Only tensors matching GLOB. Required for 5-D tensors, and for 3-D beside 4-D.", "Layers", metavar="GLOB"
    )
    exclude: Sequence[str] = setting((), "Skip tensors matching GLOB.", "Layers", metavar="GLOB")
    groups: Mapping[str, int] | None = setting(
        None, "Number of groups of layers matching GLOB.", "Layers", metavar="GLOB=N"
    )
    transposed: Sequence[str] = setting(
        (), "Layers matching GLOB are transposed convolutions.", "Layers", metavar="GLOB"
    )
    layout: Literal["torch", "hwio", "ohwi"] | None = setting(
        None,
        "Axis order of the file's kernels. torch: out, in, taps; hwio: taps, in, out; ohwi: out, taps, in; for 1-D, "
        "2-D and 3-D kernels. Without it, files of other frameworks are refused.",
        "Layers",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.", "Run", metavar="NAME")
    seed: int = setting(0, "Random seed.", "Run", metavar="N", most=(1 << 32) - 1)

    def check(self) -> None:
        """Raise InputError for a value of another type or out of range."""
        kind: type = type(self)
        for name, declaration in declarations(kind).items():
            declaration.check(getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class InputOptions(CheckpointOptions):
    """The checkpoint options, and the network's input."""

    input: str | None = setting(None, "Input of the network.", "Inputs", metavar="INPUT", known=INPUTS)
    samples: int = setting(16, "Number of inputs.", "Inputs", metavar="N", above=0)
    input_size: int | None = setting(
        None,
        "Pixels along each axis of an input. Default: a data set's own, else 32, or 224 if --arch is not built in.",
        "Inputs",
        metavar="N",
        above=0,
    )
    input_channels: int | None = setting(
        None,
        "Channels of a synthetic input, with --arch. Default: found by trial.",
        "Inputs",
        metavar="N",
        above=0,
    )
    data_dir: str | PathLike[str] = setting(
        "data", "Dataset folder; missing datasets are downloaded.", "Inputs", metavar="DIR"
    )
    mean: Channels | None = setting(
        None,
        "Mean for image normalization. On a scale from 0 to 1. Default: the dataset's.",
        "Inputs",
        metavar="R,G,B",
    )
    std: Channels | None = setting(None, "Standard deviation for image normalization.", "Inputs", metavar="R,G,B")

    def check(self) -> None:
        """Raise InputError for a value of another type or out of range, and for an input path that does not exist."""
        super().check()
        path = self.input or ""
        if "/" in path and not path.startswith("folder:") and not Path(path).is_dir():
            raise InputError(f"`input` {path}: no such folder")


@dataclass(frozen=True, kw_only=True)
class InitOptions(InputOptions):
    """The options of `init`: a method, its settings, and what is saved."""

    method: str = setting("cs", "How to change the kernels.", "Method", metavar="NAME", common=True, choices=METHODS)
    preserve_norm: bool = setting(False, "Keep each filter's L2 norm fixed.", "Method", common=True)
    iterations: int = setting(500, "Iterations of Algorithm 1 per layer.", "Method", metavar="N", common=True)
    lr: float = setting(0.001, "Step size of Algorithm 1.", "Method", metavar="X", common=True, above=0)
    optimizer: Literal["adam", "sgd"] = setting("adam", "Optimizer of Algorithm 1.", "Method")
    input: str | None = setting(
        None,
        "Images for decorrelate: cifar10, folder:PATH, …. Requires --arch. Training images of "
        f"{', '.join(DATA)} or folder:PATH, a folder of images, or white, uniform or natural noise.",
        "Inputs",
        metavar="INPUT",
        common=True,
        known=INPUTS,
    )
    samples: int = setting(256, "Number of inputs.", "Inputs", metavar="N", above=0)
    probe: Literal["white", "uniform", "natural"] | None = setting(
        None,
        "Show fm_corr before and after, on white, uniform or natural noise.",
        "Figures",
        metavar="INPUT",
        common=True,
    )
    dry_run: bool = setting(False, "Show what would change; write nothing.", "Saving", common=True)
    no_backup: bool = setting(False, "Do not keep the original as CHECKPOINT.bak.", "Saving")
    force: bool = setting(False, "Also overwrite read-only and shared files.", "Saving")

    def check(self) -> None:
        """Raise InputError for a value of another type or out of range, and for options that the method ignores."""
        super().check()
        method = METHODS[self.method]
        for name, declaration in declarations(InitOptions).items():
            if getattr(self, name) == declaration.default:
                continue
            if name == "preserve_norm" and not method.iterates:
                raise InputError(f"`method` {self.method} already keeps every filter's norm; remove `preserve_norm`")
            if name in ("iterations", "lr", "optimizer") and not method.iterates:
                raise InputError(f"`{name}` has no effect on `method` {self.method}, which is a closed form; remove it")
            if declaration.group == "Inputs" and not method.needs_images:
                takers = ", ".join(one.name for one in METHODS.values() if one.needs_images)
                raise InputError(f"`{name}` requires `method` {takers}, got `method` {self.method}")
        if method.needs_images and self.input is None:
            raise InputError(f"`method` {self.method} requires `input`, for instance cifar10")
        if method.needs_images and self.arch is None:
            raise InputError(f"`method` {self.method} requires `arch`: the inputs run through the network")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(InputOptions):
    """The options of `measure`: its inputs, and what is listed beside the figures."""

    input: str = setting(
        "white",
        "white, uniform, natural, cifar10, folder:PATH, …. White or uniform noise, or noise with the 1/f spectrum of "
        f"photographs; without --arch also features, with it also {', '.join(DATA)}, folder:PATH, or a folder.",
        "Inputs",
        metavar="INPUT",
        common=True,
        known=(*INPUTS, "features"),
    )
    bn_statistics: Literal["auto", "stored", "inputs"] = setting(
        "auto",
        "Batch-norm statistics of the --arch network. auto: the stored ones, unless they no longer match the "
        "kernels; then those of the inputs.",
        "Figures",
    )
    threshold: float = setting(
        0.95, "Correlation above which two filters are duplicates.", "Figures", metavar="X", above=0, most=1
    )
    top: int = setting(0, "List each layer's N most correlated filter pairs.", "Figures", metavar="N", common=True)


def make_options(options: type[Options], call: str, given: Mapping[str, Any]) -> Options:
    """Return the options that a library call was given. Raises TypeError for a name that it does not have."""
    known = [item.name for item in fields(options)]
    for name in given:
        if name not in known:
            raise TypeError(f"{call}() has no argument {name!r}: {did_you_mean(name, known)}")
    return options(**given)


def with_signature_of(options: type) -> Callable[[Call], Call]:
    """Decorate a function that takes `**options`: its signature shows the fields of the dataclass."""

    def decorate(function: Call) -> Call:
        shown = signature(function)
        own = [one for one in shown.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        made = [
            Parameter(item.name, Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            for item in fields(options)
        ]
        function.__signature__ = shown.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        return function

    return decorate
