"""The loop of Algorithm 1, on filters: settings, layers stacked to be minimized together, and the iterations.

Filters stay in the layout that the products like. The loop waits for the device only to read the losses every 50
iterations; on CUDA an iteration of all stacks is one graph that is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convsim_cli.errors import DivergedError, InputError
from convsim_cli.kernels import Kernel, Selection, living_filters
from convsim_cli.machine.cuda_graphs import repeated
from convsim_cli.machine.precision import full_precision
from convsim_cli.machine.progress import Advance
from convsim_cli.objectives import find_objective, rescale_
from convsim_cli.similarity import Taps

LOOK_EVERY = 50  # iterations between two readings of the losses
OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Minimization:
    """How to minimize: the paper's settings (section 4.2) unless given.

    iterations: a whole number ≥ 0. lr: step size, > 0. preserve_norm: hold every filter at its own L2 norm. tol: stop a
    layer when 50 iterations lower its loss by less than this share, ≥ 0; 0 never stops. objective: a name in
    `objectives.OBJECTIVES`. Raises InputError for other values.
    """

    iterations: int = 500
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    preserve_norm: bool = False
    tol: float = 0.0
    objective: str = "cs"

    def __post_init__(self) -> None:
        whole = isinstance(self.iterations, int) and self.iterations >= 0
        _require(whole, "iterations", self.iterations, "a whole number ≥ 0")
        _require(0 < self.lr < math.inf, "lr", self.lr, "a finite number > 0")
        _require(0 <= self.tol < math.inf, "tol", self.tol, "a finite number ≥ 0")
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, " or ".join(OPTIMIZERS))
        find_objective(self.objective)

    @property
    def label(self) -> str:
        """What reports call the objective: `raw` or `norm-preserving` for `cs`, the name for the others."""
        if self.objective != "cs":
            return self.objective
        return "norm-preserving" if self.preserve_norm else "raw"

    def select(self, selection: Selection) -> Selection:
        """Leave out kernels on which there is nothing to minimize: the norms are held, and they alone matter."""
        if not (self.preserve_norm and find_objective(self.objective).norm_only_pointwise):
            return selection
        kept = Selection(skipped=list(selection.skipped))
        for kernel in selection.kernels:
            kept.add(kernel, "1×1: its L_CS is pure norm, which `preserve_norm` holds" if kernel.pointwise else None)
        return kept

    def steps(self, kernels: Iterable[Kernel]) -> int:
        """Return the total that `advance` counts to: each value of a kernel takes one step per iteration."""
        return self.iterations * sum(math.prod(kernel.shape) for kernel in kernels)


@dataclass(eq=False)
class Part:
    """One layer of a stack.

    filters: `[groups, S / groups, N, C]`; living: which of them are alive; loss: as last read.
    """

    kernel: Kernel
    filters: Tensor
    living: Tensor
    loss: float = math.inf

    def to_stored(self, weight: Tensor) -> Tensor:
        """Return the filters in the shape and type of the stored weight, from which dead filters are taken."""
        filters = self.filters
        if not self.living.all():
            filters = torch.where(self.living[..., None, None], filters, self.kernel.to_filters(weight))
        return self.kernel.to_stored(filters, weight.dtype)


class Stack:
    """Layers whose filters have one shape, stacked along the axis of groups to be minimized together.

    filters: `[layers · groups, S / groups, N, C]`, float32 or float64, contiguous; dead filters are zero, and stay so.
    norms: their L2 norms `[layers · groups, S / groups, 1, 1]`; parts: layer by layer.
    """

    def __init__(self, kernels: Sequence[Kernel], weights: Sequence[Tensor]) -> None:
        first = kernels[0].to_filters(weights[0])
        self.taps: Taps = kernels[0].taps
        self.filters = first.new_empty(len(kernels) * first.shape[0], *first.shape[1:])
        self.parts: list[Part] = []
        for kernel, weight, filters in zip(kernels, weights, self.filters.chunk(len(kernels)), strict=True):
            filters.copy_(kernel.to_filters(weight))
            living = living_filters(filters)
            self.parts.append(Part(kernel, filters.masked_fill_(~living[..., None, None], 0), living))
        wide = torch.float32 if self.filters.device.type == "mps" else torch.float64  # squares must not underflow
        norms = torch.linalg.vector_norm(self.filters, dim=(-2, -1), keepdim=True, dtype=wide)
        self.norms = norms.to(self.filters.dtype)


def descend_(stacks: Sequence[Stack], how: Minimization, advance: Advance | None = None) -> None:
    """Minimize the layers of stacks on one device; their parts hold the results.

    advance: takes the steps (`Minimization.steps`) completed since the last call. Raises DivergedError with the name of
    a layer whose loss stops being finite.
    """
    device, values = stacks[0].filters.device, sum(stack.filters.numel() for stack in stacks)
    running = [part for stack in stacks for part in stack.parts]
    done = 0
    with torch.no_grad(), full_precision(device):
        iterate = repeated(_iteration(stacks, how), device)
        while done < how.iterations and running:
            block = min(LOOK_EVERY, how.iterations - done)
            for _ in range(block):
                iterate()
            done += block
            if how.preserve_norm:  # an iteration leaves this to the next one
                for stack in stacks:
                    rescale_(stack.filters, stack.norms)
            running = _still_running(running, how, done)
            if advance:
                advance(block * values)
    if advance and done < how.iterations:
        advance((how.iterations - done) * values)
    for stack in stacks:
        stack.filters.grad = None


def _iteration(stacks: Sequence[Stack], how: Minimization) -> Callable[[], None]:
    objective = find_objective(how.objective)
    gradients = [torch.empty_like(stack.filters) for stack in stacks]
    for stack, gradient in zip(stacks, gradients, strict=True):
        stack.filters.grad = gradient
    optimizer = _optimizer([stack.filters for stack in stacks], how)

    def iterate() -> None:
        for stack, gradient in zip(stacks, gradients, strict=True):
            if how.preserve_norm:
                objective.tangent_gradient(stack.filters, stack.taps, stack.norms, gradient)
            else:
                objective.gradient(stack.filters, stack.taps, gradient)
        optimizer.step()

    return iterate


def _still_running(running: list[Part], how: Minimization, done: int) -> list[Part]:
    """Read the losses, and set aside the layers that `tol` stops: further iterations of a stack do not reach them."""
    value = find_objective(how.objective).value
    losses = [value(part.filters, part.kernel.taps) for part in running]
    going: list[Part] = []
    stopped: list[Part] = []
    for part, loss in zip(running, torch.stack([loss.to(losses[0]) for loss in losses]).tolist(), strict=True):
        if not math.isfinite(loss):
            raise DivergedError(
                f"{part.kernel.name}: the objective is {loss} after {done} iterations at `lr` {how.lr:g}; nothing was "
                "written, lower `lr`, or scale kernels this large down first"
            )
        converged = how.tol > 0 and part.loss - loss < how.tol * part.loss < math.inf
        (stopped if converged else going).append(part)
        part.loss = loss
    if going:
        for part in stopped:
            part.filters = part.filters.clone()
    return going


def _optimizer(filters: list[Tensor], how: Minimization) -> torch.optim.Optimizer:
    kind = filters[0].device.type
    fused = kind in ("cpu", "cuda", "mps")
    if how.optimizer == "sgd":
        return torch.optim.SGD(filters, lr=how.lr, fused=fused)
    return torch.optim.Adam(filters, lr=how.lr, fused=fused, capturable=kind == "cuda")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"`{name}` is {value!r}; expected {expected}")
