"""The modes and arguments of a training run.

A mode is one entry in `MODES`. An argument is one field of `Arguments`, with its type, default, range, help text and
unit. The options of `convsim train`, the checks and `args.json` all follow from these two tables. Nothing here imports
torch, so that `convsim train --help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.methods import METHODS, OBJECTIVE_NAMES
from convsim_cli.settings import ARCH_HELP, DATA, declarations, setting

FOLDER = "folder:"  # what the `dataset` of a folder of images begins with


@dataclass(frozen=True)
class Mode:
    """A way to train.

    meaning: a phrase for `--help`. takes: its arguments, out of those that not all modes have. initializes: whether the
    run's `method` changes the kernels before training. scales: whether the filters get other norms before training,
    those of raw Algorithm 1 or `factor` times their own. regularizes: whether training adds the gradient of the
    objective to that of the task (Algorithm 2).
    """

    name: str
    meaning: str
    takes: frozenset[str] = frozenset()
    initializes: bool = False
    scales: bool = False
    regularizes: bool = False


_INIT = frozenset({"method", "preserve_norm", "rescale"})
_REG = frozenset({"objective", "preserve_norm", "beta_schedule"})

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("baseline", "plain training"),
        Mode("init", "--method before training", _INIT, initializes=True),
        Mode("reg", "--objective as a penalty during training (Algorithm 2)", _REG, regularizes=True),
        Mode("init+reg", "both", _INIT | _REG, initializes=True, regularizes=True),
        Mode(
            "rescale",
            "a control that only scales the filters, as raw cs would or by --factor",
            frozenset({"factor"}),
            scales=True,
        ),
    )
}


def modes_that_take(argument: str) -> list[str]:
    """Return the modes that an argument belongs to, none for an argument that all modes share."""
    return [mode.name for mode in MODES.values() if argument in mode.takes]


@dataclass(frozen=True)
class Arguments:
    """Everything that determines a run's result, with the paper's settings (section 4.2) as defaults but for one."""

    mode: str = setting("baseline", "Mode.", "Method", metavar="NAME", common=True, choices=MODES)
    method: str = setting(
        "cs",
        "Method of init. decorrelate uses the first 1,024 training images.",
        "Method",
        metavar="NAME",
        common=True,
        choices=METHODS,
    )
    iterations: int = setting(500, "Iterations of Algorithm 1, before training.", "Method", metavar="N")
    init_lr: float = setting(0.001, "Step size of Adam in Algorithm 1.", "Method", metavar="X", above=0)
    rescale: bool = setting(
        False,
        "With --mode init or init+reg: after a method that keeps norms, scale the filters to the norms from raw cs.",
        "Method",
    )
    factor: float | None = setting(
        None,
        "With --mode rescale: scale every filter by this factor, without Algorithm 1.",
        "Method",
        metavar="F",
        above=0,
    )
    objective: str = setting(
        "cs",
        f"Objective of reg. One of {', '.join(OBJECTIVE_NAMES)}.",
        "Method",
        metavar="NAME",
        common=True,
        choices=OBJECTIVE_NAMES,
    )
    beta: float | Literal["auto"] = setting(
        0.001,
        "Weight of the penalty, or auto. auto: its gradient is 1 % of the task's on the first batch.",
        "Method",
        metavar="X|auto",
        common=True,
        most=3.4e38,  # in float32
    )
    beta_schedule: Literal["constant", "loss"] = setting(
        "constant", "Keep beta constant, or lower it with the task loss.", "Method"
    )
    preserve_norm: bool = setting(
        False,
        "Keep init and reg from shrinking filters. init fixes every norm; reg removes the gradient along each filter.",
        "Method",
        common=True,
    )
    arch: str = setting(
        "cnn1",
        ARCH_HELP,
        "Recipe",
        metavar="NAME",
        common=True,
    )
    weights: str | None = setting(None, "Start from this checkpoint.", "Recipe", metavar="FILE")
    pretrained: bool = setting(False, "Start from weights published by torchvision or timm.", "Recipe")
    epochs: int = setting(100, "Number of epochs.", "Recipe", metavar="N", common=True, above=0)
    batch_size: int = setting(512, "Images per step.", "Recipe", metavar="N", common=True, above=0)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD, or Adam with decoupled weight decay.", "Recipe")
    lr: float = setting(0.01, "Learning rate. With a schedule, its peak.", "Recipe", metavar="X", common=True, above=0)
    kernel_lr: float | None = setting(
        None, "Learning rate of convolution kernels, instead of --lr.", "Recipe", metavar="X", above=0
    )
    momentum: float = setting(0.0, "Momentum of SGD.", "Recipe", metavar="X", common=True)
    nesterov: bool = setting(False, "Nesterov's momentum; requires --momentum.", "Recipe")
    weight_decay: float = setting(
        0.0,
        "Weight decay. With sgd an L2 penalty of this weight, with adamw decoupled decay.",
        "Recipe",
        metavar="X",
        common=True,
    )
    decay: Literal["weights", "all"] = setting(
        "weights", "Parameters with weight decay. weights: all but biases and batch norm.", "Recipe"
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant",
        "constant or cosine. cosine lowers the learning rate to 0 over all epochs, along half a cosine.",
        "Recipe",
        metavar="NAME",
    )
    warmup: int = setting(0, "Warm up the learning rate from 0 over this many epochs.", "Recipe", metavar="EPOCHS")
    augment: Literal["none", "flip-crop"] = setting(
        "none",
        "none or flip-crop. flip-crop mirrors training images at random, and crops them after padding by 4 pixels.",
        "Recipe",
        metavar="NAME",
    )
    label_smoothing: float = setting(
        0.0, "Share of the uniform distribution in the targets.", "Recipe", metavar="X", most=1
    )
    bn_statistics: Literal["precise", "running", "batch"] = setting(
        "precise",
        "Batch-norm statistics in evaluation. precise: re-estimated on 4,096 training images before each "
        "one; running: running averages; batch: those of each test batch, as in the authors' code.",
        "Recipe",
    )
    precision: Literal["fp32", "tf32", "bf16"] = setting(
        "fp32", "fp32: full float32; tf32: TF32 products on CUDA, float32 elsewhere; bf16: bfloat16 autocast.", "Recipe"
    )
    compile: bool = setting(False, "Compile the network with torch.compile.", "Recipe")
    dataset: str = setting(
        "cifar10",
        f"{', '.join(DATA)}, or folder:PATH. PATH contains a folder per class.",
        "Data",
        metavar="NAME",
        common=True,
        known=DATA,
    )
    data_dir: str = setting(
        "data", "Dataset folder; missing datasets are downloaded.", "Data", metavar="DIR", common=True
    )
    image_size: int | None = setting(
        None,
        "folder:PATH: pixels along each axis. Default: 32, or 224 if --arch is not built in.",
        "Data",
        metavar="N",
        above=0,
    )
    mean: str | None = setting(
        None, "Mean for image normalization, on a scale from 0 to 1. Default: the dataset's.", "Data", metavar="R,G,B"
    )
    std: str | None = setting(None, "Standard deviation for image normalization.", "Data", metavar="R,G,B")
    limit_train: int | None = setting(None, "Use only the first N training images.", "Data", metavar="N", above=0)
    limit_test: int | None = setting(None, "Use only the first N test images.", "Data", metavar="N", above=0)
    validation: int | None = setting(
        None,
        "Hold out the last N training images (after --limit-train). The best epoch is chosen on them, not on the test "
        "images.",
        "Data",
        metavar="N",
        above=0,
    )
    folder_digest: str | None = setting(None, "Digest of the images of a folder:PATH, independent of its path.")
    deterministic: bool = setting(False, "Bitwise reproducible on CUDA (the CPU always is).", "Run")
    tensorboard: bool = setting(False, "Also write results for TensorBoard (extra: tensorboard).", "Run")
    seed: int = setting(0, "Random seed.", "Run", metavar="N", most=(1 << 32) - 1)
    device: str = setting("cpu", "Device of the run.")
    processes: int = setting(1, "Data-parallel processes, as torchrun started them.", above=0)

    def check(self) -> None:
        """Raise InputError for a value out of range, and for arguments that contradict each other."""
        if self.mode in ("orthogonal", "decorrelate"):  # modes of version 0.2
            raise InputError(f"`mode` {self.mode} was replaced by `mode` init with `method` {self.mode}")
        for name, declaration in declarations(Arguments).items():
            declaration.check(getattr(self, name))
        if self.pretrained and self.weights:
            raise InputError("`pretrained` and `weights` both set the initial weights; choose one")
        for name in ("momentum", "nesterov"):
            if self.optimizer != "sgd" and getattr(self, name):
                raise InputError(f"`{name}` requires `optimizer` sgd, got `optimizer` {self.optimizer}")
        if self.nesterov and not self.momentum:
            raise InputError("`nesterov` requires a `momentum` above 0, for instance 0.9")
        if self.warmup > self.epochs:
            raise InputError(f"`warmup` {self.warmup}: expected no more than the run's `epochs` {self.epochs}")
        if self.image_size is not None and not self.dataset.startswith(FOLDER):
            raise InputError(f"`image_size` requires `dataset` folder:PATH, got `dataset` {self.dataset}")
        for name, declaration in declarations(Arguments).items():
            takers = modes_that_take(name)
            if takers and self.mode not in takers and getattr(self, name) != declaration.default:
                instead = "; init takes `method`" if name == "objective" and self.mode == "init" else ""
                raise InputError(f"`{name}` requires `mode` {', '.join(takers)}, got `mode` {self.mode}{instead}")
        if self.mode == "init" and self.preserve_norm and not METHODS[self.method].iterates:
            raise InputError(f"`method` {self.method} already keeps every filter's norm; remove `preserve_norm`")
        if self.rescale and not self.keeps_norms:
            raise InputError(f"`rescale` has no effect after raw `method` {self.method}; add `preserve_norm`")
        if self.beta == "auto":
            self.check_beta_is_used()

    def check_beta_is_used(self) -> None:
        """Raise InputError for a mode without a penalty. A number from a run's args.json may be there without one."""
        if not MODES[self.mode].regularizes:
            modes = ", ".join(mode.name for mode in MODES.values() if mode.regularizes)
            raise InputError(f"`beta` {self.beta} requires `mode` {modes}, got `mode` {self.mode}")

    @property
    def label(self) -> str:
        """The mode, and what it does to the kernels where that is not the default: init-orthogonal, reg-srip."""
        mode, parts = MODES[self.mode], [self.mode]
        parts += [self.method] if mode.initializes and self.method != "cs" else []
        parts += [self.objective] if mode.regularizes and self.objective not in ("cs", *parts) else []
        return "-".join(parts)

    @property
    def keeps_norms(self) -> bool:
        """Whether the run's method changes the kernels before training, and every filter keeps its norm."""
        return MODES[self.mode].initializes and (self.preserve_norm or not METHODS[self.method].iterates)

    @property
    def takes_raw_norms(self) -> bool:
        """Whether filters are scaled to the norms that raw `cs` gives them."""
        return self.rescale or (MODES[self.mode].scales and self.factor is None)

    @property
    def minimizes(self) -> bool:
        """Whether Algorithm 1 runs before training."""
        return self.takes_raw_norms or (MODES[self.mode].initializes and METHODS[self.method].iterates)

    def identity(self) -> dict[str, Any]:
        """Return what identifies this run: everything that its results depend on.

        This excludes the location of its data, settings that its mode does not use, what a weight decay of 0 acts on
        and, without a schedule over all epochs, their number.
        """
        left_out = {"data_dir", "tensorboard"} | ({"decay"} if not self.weight_decay else set())
        left_out |= set() if MODES[self.mode].regularizes else {"beta"}
        left_out |= set() if self.minimizes else {"iterations", "init_lr"}
        left_out |= {"epochs"} if self.schedule == "constant" else set()
        left_out |= {"dataset"} if self.folder_digest else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def without_unused(values: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a file without those that contradict what was typed, and that nobody could take back.

    For instance, a control is started from the file of a run by typing another mode.
    """
    unused = set()
    if mode := MODES.get(typed.get("mode", "")):
        unused |= {name for name in values if (takers := modes_that_take(name)) and mode.name not in takers}
        unused |= set() if mode.regularizes else {"beta"}
    method = METHODS.get(typed.get("method", values.get("method", "")))
    if method and not method.iterates and typed.get("mode", values.get("mode")) == "init":
        unused.add("preserve_norm")
    if typed.get("optimizer", "sgd") != "sgd":
        unused |= {"momentum", "nesterov"}
    if typed.get("momentum") == 0:
        unused.add("nesterov")
    if typed.get("weights"):
        unused.add("pretrained")
    if typed.get("pretrained"):
        unused.add("weights")
    if not typed.get("dataset", FOLDER).startswith(FOLDER):
        unused.add("image_size")
    return {name: value for name, value in values.items() if name not in unused}


def make_arguments(values: Any, path: Path) -> Arguments:
    """Return the arguments that a run's args.json holds. Raises InputError as `parse_arguments`, also for `check`."""
    arguments = Arguments(**parse_arguments(values, path))
    try:
        arguments.check()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return arguments


def parse_arguments(values: Any, path: Path) -> dict[str, Any]:
    """Return by name the arguments that an args.json holds, translated if it is of an earlier version.

    Raises InputError, naming the file, for an unknown name and for a value of another type or out of range.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a run's arguments, by name")
    known, values = declarations(Arguments), _translated(values, path)
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{path}: unknown argument {name}: {did_you_mean(name, known)}")
        try:
            known[name].check(value)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return values


def _translated(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the arguments of an earlier version as today's.

    Version 0.1 had `pairs` in place of `objective`, and evaluated with running batch-norm statistics. In 0.2 some
    methods were modes, `objective` also said what init minimized, weight decay acted on all parameters, and
    `hold_similarity` kept optimizer steps from raising ncs.
    """
    values = {"bn_statistics": "running", "decay": "all", **values}
    if (held := values.pop("hold_similarity", False)) is not False:
        raise InputError(f"{path}: hold_similarity = {held!r}; this version reads only runs without it")
    if "pairs" in values:
        objectives, pairs = {"all": "cs", "neighbours": "neighbours"}, values.pop("pairs")
        if pairs not in list(objectives):
            raise InputError(f"{path}: pairs = {pairs!r}, expected all, neighbours")
        values["objective"] = objectives[pairs]
    if "method" in values:
        return values
    mode, objective = values.get("mode", "baseline"), values.get("objective", "cs")
    if (mode == "rescale" or values.get("rescale")) and objective != "cs":
        raise InputError(f"{path}: rescales to the norms of objective {objective}; this version knows only those of cs")
    if mode in ("orthogonal", "decorrelate"):
        return {**values, "mode": "init", "method": mode}
    if mode == "init":
        return {**values, "method": objective, "objective": "cs"}
    return {**values, "method": objective} if mode == "init+reg" else values
