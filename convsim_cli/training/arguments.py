"""The arguments of a training run. Each is declared once: type, default, range, help text with its unit, and group.

`convsim train` makes its options from these declarations; the checks and `args.json` follow them too. Nothing here
imports torch, so that `convsim train --help` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.training.modes import MODES, modes_that_take

GROUPS = ("Method", "Recipe", "Data", "Run")  # the headings of the options in `--help`
FOLDER = "folder:"  # what the `dataset` of a folder of images begins with


@dataclass(frozen=True)
class Declaration:
    """What is declared of an argument.

    types: the types that a value may have. help: what it means, with its unit. group: the heading of its option, one of
    `GROUPS`, or None for an argument that is no option. choices: the values that a string may have, any if empty.
    above: exclusive lower bound of a number; least, most: inclusive bounds.
    """

    name: str
    types: tuple[type, ...]
    default: Any
    help: str
    group: str | None = None
    metavar: str | None = None
    choices: Collection[str] = ()
    above: float | None = None
    least: float = 0
    most: float = math.inf

    def check(self, value: Any) -> None:
        """Raise InputError for a value, of one of the types, that is out of range or not among the choices."""
        if value is None or isinstance(value, bool):
            return
        if isinstance(value, str):
            fits = not self.choices or value in self.choices
        else:
            fits = (value >= self.least if self.above is None else value > self.above) and value <= self.most
            fits = fits and value < math.inf
        if not fits:
            raise InputError(f"`{self.name}` {value}: expected {self._expected()}")

    def _expected(self) -> str:
        if self.choices:
            *others, last = self.choices
            return f"{', '.join(others)} or {last}"
        if self.above is not None:
            return f"a number above {self.above}"
        if self.most < math.inf:
            return f"a number from {self.least} to {self.most}"
        return f"a number of {self.least} or above"


def setting(default: Any, help: str, group: str | None = None, **more: Any) -> Any:
    """Declare a field of `Arguments`. help, group and the rest: as in `Declaration`."""
    return field(default=default, metadata={"help": help, "group": group, **more})


@dataclass(frozen=True)
class Arguments:
    """Everything that decides a run's result, with the paper's settings as defaults (section 4.2)."""

    mode: str = setting("baseline", "How to train.", "Method", choices=MODES)
    arch: str = setting(
        "cnn1",
        "cnn1, cnn2, cnn:WIDTH, resnet18, torchvision:NAME, timm:NAME or package.module:callable.",
        "Recipe",
        metavar="NAME",
    )
    dataset: str = setting(
        "cifar10", "cifar10, cifar100, digits, or folder:PATH with one folder per class.", "Data", metavar="NAME"
    )
    data_dir: str = setting("data", "Where data sets are, or are downloaded to.", "Data", metavar="DIR")
    image_size: int | None = setting(
        None,
        "folder:PATH: pixels along each axis; unless given, 32 for the built-in networks and 224 for others.",
        "Data",
        above=0,
    )
    mean: str | None = setting(
        None, "Normalize images by this mean, on a scale from 0 to 1, not the data set's.", "Data", metavar="R,G,B"
    )
    std: str | None = setting(None, "Normalize images by this standard deviation.", "Data", metavar="R,G,B")
    weights: str | None = setting(None, "Start from this checkpoint.", "Recipe", metavar="FILE")
    epochs: int = setting(100, "Number of epochs.", "Recipe", above=0)
    batch_size: int = setting(512, "Images per step.", "Recipe", above=0)
    lr: float = setting(0.01, "Learning rate of SGD", "Recipe", above=0)
    momentum: float = setting(0.0, "Momentum of SGD.", "Recipe", least=0)
    weight_decay: float = setting(0.0, "L2 penalty of SGD.", "Recipe", least=0)
    iterations: int = setting(500, "Iterations of Algorithm 1 (init, rescale).", "Method", least=0)
    init_lr: float = setting(0.001, "Step size of Adam in Algorithm 1", "Method", above=0)
    preserve_norm: bool = setting(False, "Keep every filter at its own norm.", "Method")
    rescale: bool = setting(
        False, "With --preserve-norm, scale the filters afterwards to the norms that raw init would give.", "Method"
    )
    beta: float = setting(0.001, "reg: weight of the objective, dimensionless.", "Method", least=0)
    beta_schedule: Literal["constant", "loss"] = setting(
        "constant", "Keep beta constant, or lower it with the task loss.", "Method"
    )
    objective: str = setting(
        "cs",
        "What to minimize: cs (Eq. 10), neighbours (the authors' public code) or kernel (kernel orthogonality).",
        "Method",
        metavar="NAME",
    )
    bn_statistics: Literal["precise", "running", "batch"] = setting(
        "precise",
        "What batch norm uses in evaluation. precise: statistics re-estimated before each one, on 4,096 training "
        "images; running: running averages; batch: the statistics of each test batch, as in the authors' code.",
        "Recipe",
    )
    precision: Literal["fp32", "tf32", "bf16"] = setting(
        "fp32", "fp32: full float32; tf32: TF32 products on CUDA, float32 elsewhere; bf16: bfloat16 autocast.", "Recipe"
    )
    compile: bool = setting(False, "Compile the network with torch.compile.", "Recipe")
    limit_train: int | None = setting(None, "Only the first N training images.", "Data", above=0)
    limit_test: int | None = setting(None, "Only the first N test images.", "Data", above=0)
    folder_digest: str | None = setting(None, "What identifies the images of a folder:PATH, independent of its path.")
    deterministic: bool = setting(False, "Bit-exact on CUDA too; the CPU always is.", "Run")
    seed: int = setting(0, "Seed of everything that is random.", "Run", least=0, most=(1 << 32) - 1)
    device: str = setting("cpu", "Where the run computes.")
    processes: int = setting(1, "Data-parallel processes, as torchrun started them.", above=0)

    def check(self) -> None:
        """Raise InputError for a value out of range, and for arguments that contradict each other."""
        from convsim_cli.objectives import find_objective  # imports torch

        for name, declaration in declarations().items():
            declaration.check(getattr(self, name))
        find_objective(self.objective)
        if self.image_size is not None and not self.dataset.startswith(FOLDER):
            raise InputError(f"`image_size` goes with `dataset` folder:PATH, got `dataset` {self.dataset}")
        if self.rescale and not (self.mode == "init" and self.preserve_norm):
            raise InputError("`rescale` goes with `mode` init and `preserve_norm`; the control alone is `mode` rescale")
        for name, declaration in declarations().items():
            takers = modes_that_take(name)
            if takers and self.mode not in takers and getattr(self, name) != declaration.default:
                raise InputError(f"`{name}` goes with `mode` {', '.join(takers)}, got `mode` {self.mode}")

    def identity(self) -> dict[str, Any]:
        """Return what makes this run the one it is: all but the number of epochs and where its data lies."""
        values = asdict(self)
        for name in ("epochs", "data_dir", *(["dataset"] if self.folder_digest else [])):
            del values[name]
        return values


@cache
def declarations() -> dict[str, Declaration]:
    """Return the declarations of all arguments by name, in their order."""
    kinds = get_type_hints(Arguments)
    return {
        item.name: _declaration(item.name, kinds[item.name], item.default, item.metadata) for item in fields(Arguments)
    }


def _declaration(name: str, kind: Any, default: Any, metadata: Any) -> Declaration:
    if get_origin(kind) is Literal:
        return Declaration(name, (str,), default, choices=get_args(kind), **metadata)
    types = (float, int) if kind is float else get_args(kind) or (kind,)
    return Declaration(name, types, default, **metadata)


def make_arguments(values: Any, path: Path) -> Arguments:
    """Return the arguments that a run's args.json holds. Raises InputError as `parse_arguments` and `check`."""
    arguments = Arguments(**parse_arguments(values, path))
    arguments.check()
    return arguments


def parse_arguments(values: Any, path: Path) -> dict[str, Any]:
    """Return by name the arguments that an args.json holds, translated if it is of an earlier version.

    Raises InputError, naming the file, for an unknown name and for a value of another type.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected the arguments of a run, by name")
    known, values = declarations(), _translated(values, path)
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{path}: unknown arguments {name}: {did_you_mean(name, known)}")
        if type(value) not in known[name].types:
            names = ("nothing" if kind is NoneType else kind.__name__ for kind in known[name].types)
            raise InputError(f"{path}: {name} = {value!r}, expected {', '.join(names)}")
    return values


def _translated(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Version 0.1 had `pairs` in place of `objective`, and evaluated with running batch-norm statistics."""
    values = {"bn_statistics": "running", **values}
    if "pairs" not in values:
        return values
    objectives = {"all": "cs", "neighbours": "neighbours"}
    pairs = values["pairs"]
    if pairs not in list(objectives):
        raise InputError(f"{path}: pairs = {pairs!r}, expected all, neighbours")
    return {name: value for name, value in values.items() if name != "pairs"} | {"objective": objectives[pairs]}
