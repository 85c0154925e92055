"""What a training run can be told: its mode, and its arguments.

A mode is one entry in `MODES`. An argument is one field of `Arguments`, with its type, default, range, help text and
unit. The options of `convsim train`, the checks and `args.json` all follow from these two tables. Nothing here imports
torch, so that `convsim train --help` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from convsim_cli.errors import InputError, did_you_mean, one_of

GROUPS = ("Method", "Recipe", "Data", "Run")  # the headings of the options in `--help`
FOLDER = "folder:"  # what the `dataset` of a folder of images begins with

Directions = Literal["own", "init", "orthogonal", "decorrelate"]


@dataclass(frozen=True)
class Mode:
    """A way to train.

    help: a phrase for `--help`. takes: its arguments, out of those that not all modes have. regularizes: whether
    training adds the gradient of the objective to that of the task (Algorithm 2). lowers: whether it always lowers
    similarity; the other modes need `preserve_norm` for that, or do not lower it. directions: where the filters get
    their directions before training (`prepare.prepare_`), None to leave the kernels alone.
    """

    name: str
    help: str
    takes: frozenset[str] = frozenset()
    regularizes: bool = False
    lowers: bool = False
    directions: Directions | None = None


_INIT = frozenset({"objective", "preserve_norm", "rescale"})
_REG = frozenset({"objective", "preserve_norm", "beta_schedule"})

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("baseline", "plain training"),
        Mode("init", "Algorithm 1 before training", _INIT, directions="init"),
        Mode("reg", "Algorithm 2 during training", _REG, regularizes=True),
        Mode("init+reg", "both", _INIT | _REG, regularizes=True, directions="init"),
        Mode(
            "rescale",
            "a control that only scales the filters, as init would or by --factor",
            frozenset({"objective", "factor"}),
            directions="own",
        ),
        Mode(
            "orthogonal",
            "orthogonal filters before training, each at its own norm",
            frozenset({"rescale"}),
            lowers=True,
            directions="orthogonal",
        ),
        Mode(
            "decorrelate",
            "filters whose feature maps of the first 1,024 training images are uncorrelated, each at its own norm",
            frozenset({"rescale"}),
            lowers=True,
            directions="decorrelate",
        ),
    )
}


def modes_that_take(argument: str) -> list[str]:
    """Return the modes that an argument belongs to, none for an argument that all modes share."""
    return [mode.name for mode in MODES.values() if argument in mode.takes]


@dataclass(frozen=True)
class Declaration:
    """What is declared of an argument.

    types: the types that a value may have; a number or a word for (float, str). help: what it means, with its unit.
    group: the heading of its option, one of `GROUPS`, or None for an argument that is no option. choices: the values
    that a string may have, any if empty. above: exclusive lower bound of a number; least, most: inclusive bounds.
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
        if fits:
            return
        limits = f"of {self.least} or above" if self.most == math.inf else f"from {self.least} to {self.most}"
        number = "a number " + (limits if self.above is None else f"above {self.above}")
        numbers = [number] if float in self.types or not self.choices else []
        raise InputError(f"`{self.name}` {value}: expected {one_of([*self.choices, *numbers])}")


def setting(default: Any, help: str, group: str | None = None, **more: Any) -> Any:
    """Declare a field of `Arguments`. help, group and the rest: as in `Declaration`."""
    return field(default=default, metadata={"help": help, "group": group, **more})


@dataclass(frozen=True)
class Arguments:
    """Everything that decides a run's result, with the paper's settings as defaults (section 4.2)."""

    mode: str = setting("baseline", "How to train.", "Method", choices=MODES)
    arch: str = setting(
        "cnn1",
        "cnn1, cnn2, cnn:WIDTH or resnet18 (these for 32×32 images), torchvision:NAME, timm:NAME or "
        "package.module:callable.",
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
    pretrained: bool = setting(False, "Start from the weights that torchvision or timm publishes.", "Recipe")
    epochs: int = setting(100, "Number of epochs.", "Recipe", above=0)
    batch_size: int = setting(512, "Images per step.", "Recipe", above=0)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD, or Adam with decoupled weight decay.", "Recipe")
    lr: float = setting(0.01, "Learning rate, with a schedule its largest value", "Recipe", above=0)
    momentum: float = setting(0.0, "Momentum of SGD.", "Recipe", least=0)
    nesterov: bool = setting(False, "Nesterov's momentum; requires --momentum.", "Recipe")
    weight_decay: float = setting(
        0.0, "With sgd an L2 penalty of this weight, with adamw decoupled decay.", "Recipe", least=0
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "Keep the learning rate, or lower it to 0 over all epochs, along half a cosine.", "Recipe"
    )
    warmup: int = setting(0, "Raise the learning rate from 0 over this many epochs first.", "Recipe", metavar="EPOCHS")
    augment: Literal["none", "flip-crop"] = setting(
        "none", "flip-crop: mirror training images at random, and crop them after padding by 4 pixels.", "Recipe"
    )
    label_smoothing: float = setting(
        0.0, "Mix this share of the uniform distribution into the targets.", "Recipe", most=1
    )
    iterations: int = setting(500, "Iterations of Algorithm 1, before training.", "Method", least=0)
    init_lr: float = setting(0.001, "Step size of Adam in Algorithm 1", "Method", above=0)
    preserve_norm: bool = setting(
        False,
        "Lower similarity without shrinking: init holds every norm, the gradient of reg has no part along a filter.",
        "Method",
    )
    rescale: bool = setting(
        False,
        "Scale the filters to the norms that raw init would give; with init, it requires --preserve-norm.",
        "Method",
    )
    factor: float | None = setting(
        None, "Scale every filter by this factor, dimensionless, without Algorithm 1.", "Method", metavar="F", above=0
    )
    beta: float | Literal["auto"] = setting(
        0.001,
        "reg, init+reg: weight of the objective, dimensionless; auto: its gradient is 1 % of the task's at the first "
        "batch.",
        "Method",
        metavar="X|auto",
    )
    beta_schedule: Literal["constant", "loss"] = setting(
        "constant", "Keep beta constant, or lower it with the task loss.", "Method"
    )
    objective: str = setting(
        "cs",
        "What to minimize: cs (Eq. 10), neighbours (the authors' public code), or kernel orthogonality: kernel, ocnn, "
        "srip or orthoreg.",
        "Method",
        metavar="NAME",
    )
    hold_similarity: bool = setting(
        False,
        "Project optimizer steps so that no layer's normalized similarity (ncs) rises, to first order.",
        "Method",
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
    validation: int | None = setting(
        None,
        "Hold out the last N training images (after --limit-train); the best epoch is chosen on them, not on the test "
        "images.",
        "Data",
        above=0,
    )
    folder_digest: str | None = setting(None, "What identifies the images of a folder:PATH, independent of its path.")
    deterministic: bool = setting(False, "Bit-exact on CUDA too; the CPU always is.", "Run")
    tensorboard: bool = setting(False, "Write each epoch's results for TensorBoard too (extra: tensorboard).", "Run")
    seed: int = setting(0, "Random seed.", "Run", least=0, most=(1 << 32) - 1)
    device: str = setting("cpu", "Where the run computes.")
    processes: int = setting(1, "Data-parallel processes, as torchrun started them.", above=0)

    def check(self) -> None:
        """Raise InputError for a value out of range, and for arguments that contradict each other."""
        from convsim_cli.objectives import find_objective  # imports torch

        for name, declaration in declarations().items():
            declaration.check(getattr(self, name))
        find_objective(self.objective)
        if self.pretrained and self.weights:
            raise InputError("`pretrained` and `weights` both say what to start from; choose one")
        for name in ("momentum", "nesterov"):
            if self.optimizer != "sgd" and getattr(self, name):
                raise InputError(f"`{name}` goes with `optimizer` sgd, got `optimizer` {self.optimizer}")
        if self.nesterov and not self.momentum:
            raise InputError("`nesterov` requires a `momentum` above 0, for instance 0.9")
        if self.warmup > self.epochs:
            raise InputError(f"`warmup` {self.warmup}: expected no more than the run's `epochs` {self.epochs}")
        if self.image_size is not None and not self.dataset.startswith(FOLDER):
            raise InputError(f"`image_size` goes with `dataset` folder:PATH, got `dataset` {self.dataset}")
        for name, declaration in declarations().items():
            takers = modes_that_take(name)
            if takers and self.mode not in takers and getattr(self, name) != declaration.default:
                raise InputError(f"`{name}` goes with `mode` {', '.join(takers)}, got `mode` {self.mode}")
        if self.rescale and "preserve_norm" in MODES[self.mode].takes and not self.preserve_norm:
            raise InputError(f"`rescale` changes nothing in raw `mode` {self.mode}; add `preserve_norm`")
        if self.beta == "auto" and not MODES[self.mode].regularizes:
            modes = ", ".join(mode.name for mode in MODES.values() if mode.regularizes)
            raise InputError(f"`beta` auto goes with `mode` {modes}, got `mode` {self.mode}")
        if self.factor is not None and self.objective != "cs":
            raise InputError(f"`factor` {self.factor} cannot be combined with `objective` {self.objective}")

    def identity(self) -> dict[str, Any]:
        """Return what makes this run the one it is: all that its results depend on.

        That leaves out where its data lies and, except with a schedule over all epochs, their number.
        """
        left_out = {"data_dir", "tensorboard"}
        left_out |= {"epochs"} if self.schedule == "constant" else set()
        left_out |= {"dataset"} if self.folder_digest else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@cache
def declarations() -> dict[str, Declaration]:
    """Return the declarations of all arguments by name, in their order."""
    hints, found = get_type_hints(Arguments), {}
    for item in fields(Arguments):
        kind = hints[item.name]
        kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
        words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one)]
        types = tuple(str if get_origin(one) is Literal else one for one in kinds)
        types = (*types, int) if float in types else types
        more = {**item.metadata, "choices": words} if words else item.metadata
        found[item.name] = Declaration(item.name, types, item.default, **more)
    return found


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
