"""The training loop: baseline, Algorithm 1 before it, Algorithm 2 inside it, and the control that only rescales."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convsim_cli.device import synchronize
from convsim_cli.errors import DivergedError, FollowedError, InputError
from convsim_cli.experiments.datasets import Dataset
from convsim_cli.experiments.evaluation import evaluate
from convsim_cli.experiments.processes import ALONE, Processes
from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.minimize import Advance, Minimisation, minimize_kernel, rescale_to
from convsim_cli.penalty import ConvSimPenalty, Pairs
from convsim_cli.precision import full_precision


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


def prepare_(model: nn.Module, arguments: Arguments, advance: Advance | None = None) -> None:
    """Do to a fresh network, in place, what its mode does before training.

    init: Algorithm 1. rescale: each filter scaled to the norm that Algorithm 1 would give it, and nothing else. init
    with preserve_norm and rescale: the norm-preserved directions at those same norms.
    """
    if arguments.mode not in ("init", "rescale"):
        return
    raw, held = (
        Minimisation(arguments.iterations, arguments.init_lr, preserve_norm=preserve) for preserve in (False, True)
    )
    selection = module_kernels(model)
    direction = held.select(selection).kernels if arguments.preserve_norm else []
    with torch.no_grad():
        for kernel in selection.kernels:
            weight = weight_of(model, kernel)
            result = weight.detach().clone()
            if kernel in direction:
                result, _ = minimize_kernel(kernel, result, held, advance)
            if not arguments.preserve_norm or arguments.rescale:
                shrunk, _ = minimize_kernel(kernel, weight, raw, advance)
                result = (
                    rescale_to(kernel, result, shrunk) if arguments.mode == "rescale" or arguments.rescale else shrunk
                )
            weight.copy_(result)


def preparation_steps(model: nn.Module, arguments: Arguments) -> int:
    """Return how many iterations `prepare_` will report to `advance`."""
    if arguments.mode not in ("init", "rescale"):
        return 0
    selection = module_kernels(model)
    held = len(Minimisation(preserve_norm=True).select(selection).kernels) if arguments.preserve_norm else 0
    raw = len(selection.kernels) if not arguments.preserve_norm or arguments.rescale else 0
    return arguments.iterations * (held + raw)


class Trainer:
    """A network in training: one epoch at a time, and its whole state.

    The task loss is the cross entropy. Batches are drawn without replacement, in an order that the seed and the epoch
    alone decide. Nothing in the loop waits for the device. Several processes each take their share of every batch, and
    do together what one would: but for batch normalisation, which sees a share at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        arguments: Arguments,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dataset = dataset.to(device)
        self.arguments = arguments
        self.device = device
        self.processes = processes
        self.penalty = ConvSimPenalty(model, arguments.pairs if arguments.mode == "reg" else "all")
        self.optimiser = torch.optim.SGD(
            model.parameters(), arguments.lr, arguments.momentum, weight_decay=arguments.weight_decay, fused=True
        )
        self.epoch = 0
        self.first_loss: Tensor | None = None
        parallel = processes.parallel(self.model)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(parallel) if arguments.compile else parallel
        self._evaluated = self._forward if processes.size == 1 else self.model  # what exchanges nothing

    @property
    def steps(self) -> int:
        """Number of optimiser steps in an epoch; the last batch may be smaller."""
        return math.ceil(len(self.dataset.train) / self.arguments.batch_size)

    def run_epoch(self, advance: Advance | None = None) -> dict[str, float]:
        """Train for one epoch, evaluate, and return its row of `results.csv`.

        advance: called after every step with 1. Raises DivergedError when a loss is no longer finite.
        """
        start = time.perf_counter()
        with full_precision(self.device):  # fp32 means fp32; bf16 is switched on inside
            loss, accuracy = self._train(advance)
            self.processes.share_buffers(self.model)
            with self._autocast():
                test_loss, test_accuracy = evaluate(
                    self.model, self.dataset, self.dataset.test, self.device, self._evaluated, self.processes
                )
        row = {
            "epoch": self.epoch + 1,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "cs": self.penalty.value().item(),
            "seconds": time.perf_counter() - start,
        }
        if not all(math.isfinite(value) for value in row.values()):
            if not self.processes.leads:
                raise FollowedError
            raise DivergedError(
                f"epoch {self.epoch + 1}: the loss is {loss:g} in training and {test_loss:g} in testing; lower --lr"
                + (" or --beta" if self.arguments.mode == "reg" else "")
            )
        self.epoch += 1
        return row

    def state(self) -> dict[str, Any]:
        """Return all that a bit-exact continuation needs, beside the arguments; all processes are to ask at once."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimiser.state_dict(),
            "first_loss": self.first_loss,
            "rng": self.processes.gather(self._random_states()),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a `state` up again."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimizer"])
        self.first_loss = None if state["first_loss"] is None else state["first_loss"].to(self.device)
        ours, on_device = state["rng"][self.processes.rank]
        torch.set_rng_state(ours)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self.device)

    def _random_states(self) -> tuple[Tensor, Tensor | None]:
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), on_device

    def _train(self, advance: Advance | None) -> tuple[float, float]:
        self.model.train()
        data = self.dataset.train
        totals = self._totals()
        order = _permutation(len(data), self.arguments.seed, self.epoch).to(self.device)
        for batch in order.split(self.arguments.batch_size):
            indices = self.processes.share(batch)
            weight = len(indices) * self.processes.size / len(batch)  # of this share in the mean over processes
            if not len(indices):
                indices = batch[:1]  # a batch of fewer images than processes: one more look, that counts for nothing
            labels = data.labels[indices]
            with self._autocast():
                logits = self._forward(self.dataset.normalise(data.images[indices]))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            self.optimiser.zero_grad()
            (loss if weight == 1 else weight * loss).backward()
            self._regularise(loss.detach(), weight)
            self.optimiser.step()
            if weight:
                totals += torch.stack([loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()])
            if advance:
                advance(1)
        synchronize(self.device)
        loss_sum, correct = self.processes.add_up(totals).tolist()
        return loss_sum / len(data), 100 * correct / len(data)

    def _regularise(self, loss: Tensor, weight: float) -> None:
        """Algorithm 2: β·∂L_CS straight into the gradients. With the schedule `loss`, β falls with the task loss."""
        if self.arguments.mode != "reg":
            return
        if self.arguments.beta_schedule == "constant":
            return self.penalty.add_gradient_(self.arguments.beta)
        loss = self.processes.add_up(weight * loss) / self.processes.size
        if self.first_loss is None:
            self.first_loss = loss
        self.penalty.add_gradient_(self.arguments.beta * loss / self.first_loss)

    def _totals(self) -> Tensor:
        """Sums of loss and of right answers, on the device: nothing is read back before the end."""
        return torch.zeros(2, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.arguments.precision == "bf16" else nullcontext()


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    """An order that seed and epoch alone decide: a run resumed at an epoch draws what it would have drawn."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def be_deterministic() -> None:
    """Let nothing but deterministic algorithms run from now on: before the first product on the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
