"""The arguments of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from convsim_cli.errors import InputError, did_you_mean

Pairs = Literal["all", "neighbours"]


@dataclass(frozen=True)
class Arguments:
    """Everything that decides a run's result, by the names of the command line; the paper's settings (section 4.2)."""

    mode: str = "baseline"
    arch: str = "cnn1"
    dataset: str = "cifar10"
    data_dir: str = "data"
    image_size: int | None = None
    mean: str | None = None
    std: str | None = None
    weights: str | None = None
    epochs: int = 100
    batch_size: int = 512
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    iterations: int = 500
    init_lr: float = 0.001
    preserve_norm: bool = False
    rescale: bool = False
    beta: float = 0.001
    beta_schedule: Literal["constant", "loss"] = "constant"
    pairs: Pairs = "all"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    limit_train: int | None = None
    limit_test: int | None = None
    deterministic: bool = False
    seed: int = 0
    device: str = "cpu"
    processes: int = 1

    def check(self) -> None:
        """Raise InputError for values out of range and for options that contradict the mode."""
        if self.mode not in ("baseline", "init", "reg", "rescale"):
            raise InputError(f"--mode {self.mode}: expected baseline, init, reg or rescale")
        if self.image_size is not None and not self.dataset.startswith("folder:"):
            raise InputError(f"--image-size goes with --dataset folder:PATH, got --dataset {self.dataset}")
        positive = {"epochs": self.epochs, "batch-size": self.batch_size, "lr": self.lr, "init-lr": self.init_lr}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: expected a number above 0")
        least = {"momentum": self.momentum, "weight-decay": self.weight_decay, "beta": self.beta}
        for name, value in {**least, "iterations": self.iterations}.items():
            if not 0 <= value < math.inf:
                raise InputError(f"--{name} {value}: expected a number of 0 or above")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed {self.seed}: expected a number from 0 to {(1 << 32) - 1}")
        for name, limit in {"limit-train": self.limit_train, "limit-test": self.limit_test}.items():
            if limit is not None and limit < 1:
                raise InputError(f"--{name} {limit}: expected a number above 0")
        if self.rescale and not (self.mode == "init" and self.preserve_norm):
            raise InputError("--rescale goes with --mode init --preserve-norm; the control by itself is --mode rescale")
        if self.preserve_norm and self.mode != "init":
            raise InputError(f"--preserve-norm goes with --mode init, got --mode {self.mode}")
        if self.mode != "reg" and (self.pairs, self.beta_schedule) != ("all", "constant"):
            raise InputError(f"--pairs and --beta-schedule go with --mode reg, got --mode {self.mode}")


def make_arguments(values: Any, path: Path) -> Arguments:
    """Return arguments from what an args.json holds. Raises InputError, naming the file, for a key or a value it has
    not.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected the arguments of a run, by name")
    kinds = get_type_hints(Arguments)
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{path}: unknown arguments {name}: {did_you_mean(name, kinds)}")
        allowed = _allowed(kinds[name])
        if not (type(value) in allowed or value in [choice for choice in allowed if isinstance(choice, str)]):
            said = ", ".join("nothing" if a is NoneType else getattr(a, "__name__", str(a)) for a in allowed)
            raise InputError(f"{path}: {name} = {value!r}, expected {said}")
    return Arguments(**values)


def _allowed(kind: Any) -> list[Any]:
    """The types that a value may have, or the strings that it may be."""
    if kind is float:
        return [float, int]
    return list(get_args(kind)) or [kind]
