"""Algorithm 1: minimize an objective of the kernels alone, before training.

Raw, as in the paper, the objective is homogeneous of degree 4 and mostly shrinks the filters. `preserve_norm` holds
every filter at its own L2 norm: the gradient is projected onto the tangent space before the optimizer sees it, and the
filter rescaled after the step; rescaling alone does not work under Adam, whose steps do not depend on the gradient's
length. Dead filters (`living_filters`) keep every bit.

Layers are independent under Adam and SGD. Small ones are minimized together: layers of equal shape are stacked along
the axis of groups, which changes no bit of the result on the CPU, and on CUDA an iteration of all stacks is one graph
that is replayed. A large layer is minimized by itself, so that no other optimizer state is held beside its own. The
loop waits for the device only to read the losses every 50 iterations, and what surrounds it once for all layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convsim_cli.device import Advance, repeated
from convsim_cli.errors import ConvsimWarning, DivergedError, InputError, is_number
from convsim_cli.kernels import (
    Kernel,
    Patterns,
    Selection,
    living_filters,
    module_kernels,
    refuse_sharded,
    undone_on_failure,
    warn_of_unsupported,
    weight_of,
)
from convsim_cli.measurement.kernel_figures import are_finite, check_finite, compare_weights
from convsim_cli.objectives import find_objective, rescale_
from convsim_cli.precision import full_precision
from convsim_cli.similarity import to_filters

LOOK_EVERY = 50  # iterations between two readings of the losses
LARGE = 16 << 20  # bytes of float32: a layer above this is minimized by itself
TOGETHER = {"cuda": 256 << 20}  # bytes of small layers minimized together, by device; LARGE elsewhere
OPTIMIZERS = ("adam", "sgd")

Layer = tuple[Kernel, Tensor]  # and its weight as stored


@dataclass(frozen=True)
class Minimization:
    """How to minimize: the paper's settings (section 4.2) unless given.

    iterations: a whole number ≥ 0. lr: step size, > 0. preserve_norm: hold every filter at its own L2 norm. objective:
    a name in `objectives.OBJECTIVES`. Raises InputError for other values.
    """

    iterations: int = 500
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    preserve_norm: bool = False
    objective: str = "cs"

    def __post_init__(self) -> None:
        if not is_number(self.iterations, whole=True) or self.iterations < 0:
            raise InputError(f"`iterations` is {self.iterations!r}; expected a whole number ≥ 0")
        if not (is_number(self.lr) and 0 < self.lr < math.inf):
            raise InputError(f"`lr` is {self.lr!r}; expected a finite number > 0")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"`optimizer` is {self.optimizer!r}; expected {' or '.join(OPTIMIZERS)}")
        if self.preserve_norm not in (True, False):
            raise InputError(f"`preserve_norm` is {self.preserve_norm!r}; expected true or false")
        find_objective(self.objective)

    def select(self, selection: Selection) -> Selection:
        """Leave out kernels on which there is nothing to minimize: the norms are held, and they alone matter."""
        if not (self.preserve_norm and find_objective(self.objective).norm_only_pointwise):
            return selection
        kept = Selection(skipped=list(selection.skipped))
        for kernel in selection.kernels:
            fixed = "1×1: its L_CS depends only on norms, which `preserve_norm` fixes"
            kept.add(kernel, fixed if kernel.pointwise else None, inert=True)
        return kept

    def steps(self, kernels: Iterable[Kernel]) -> int:
        """Return the total that `advance` counts to: each value of a kernel takes one step per iteration."""
        return self.iterations * sum(math.prod(kernel.shape) for kernel in kernels)


def minimize_(
    model: nn.Module,
    iterations: int = 500,
    *,
    lr: float = 1e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    preserve_norm: bool = False,
    objective: str = "cs",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Minimize an objective of every convolution of a module, in place, and return a record per layer (Algorithm 1).

    iterations: a whole number ≥ 0. lr: step size, > 0; weights far below 1e-5 hardly change, because their gradients
    are below Adam's ε of 1e-8. preserve_norm: hold every filter at its own L2 norm. objective: `cs` (Eq. 10),
    `neighbours`, `kernel`, `expected`, `ocnn`, `srip` or `orthoreg`. include, exclude: globs over names of kernels,
    such as `layer1.*`. advance: called with the steps completed since the last call; each value of a kernel takes one
    step per iteration. A record contains `name`, `shape`, `groups`, `assumed` and, under `before` and `after`, `cs`,
    `ncs` and `norm`. Warns about layers that it leaves out: those that convsim cannot change (parametrized,
    lazy, of unknown types), those without pairs of filters, and 1×1 layers whose norms are held; and about a model
    without kernels. Raises InputError for settings out of range, a pattern that matches
    nothing, a sharded weight and a kernel with NaN or Inf, and DivergedError for a loss that stops being finite; the
    model is then untouched.

    >>> from torch import nn
    >>> record = minimize_(nn.Sequential(nn.Conv2d(3, 8, 3)), iterations=100)[0]
    >>> record["after"]["cs"] < record["before"]["cs"]
    True
    """
    settings = Minimization(iterations, lr, optimizer, preserve_norm, objective)
    selection = settings.select(module_kernels(model, Patterns(include, exclude)))
    warn_of_unsupported(selection)
    weights = [weight_of(model, kernel) for kernel in selection.kernels]
    done = list(minimize_kernels(zip(selection.kernels, weights, strict=True), settings, advance))
    with torch.no_grad(), undone_on_failure(weights):
        for weight, (minimized, _) in zip(weights, done, strict=True):
            weight.copy_(minimized)
    return [record for _, record in done]


def minimize_weight_(
    weight: Tensor,
    groups: int = 1,
    *,
    iterations: int = 500,
    lr: float = 1e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    preserve_norm: bool = False,
    objective: str = "cs",
) -> Tensor:
    """Minimize an objective of one convolution's weight, in place, and return the weight, like `torch.nn.init`.

    weight: `[S, C, *taps]` with 1 to 3 axes of taps, floating; S filters in `groups` consecutive groups. For a
    transposed convolution without groups pass `weight.transpose(0, 1)`. objective: `cs` (Eq. 10), `neighbours`,
    `kernel`, `expected`, `ocnn`, `srip` or `orthoreg`. The other settings are those of `minimize_`. Warns if there is
    nothing to minimize. Raises ValueError for another shape, type or number of groups, for settings out of range and
    for NaN or Inf, and DivergedError for a loss that stops being finite; the weight is then untouched.

    >>> weight = minimize_weight_(torch.nn.init.kaiming_normal_(torch.empty(8, 3, 3, 3)), iterations=100)
    """
    settings = Minimization(iterations, lr, optimizer, preserve_norm, objective)
    refuse_sharded("the weight", weight)
    to_filters(weight, groups)  # raises for what is no weight
    selection = Selection()
    selection.add(Kernel("weight", tuple(weight.shape), groups))
    selection = settings.select(selection)
    if selection.skipped:
        warnings.warn(f"the weight is unchanged: {selection.skipped[0].reason}", ConvsimWarning, stacklevel=2)
        return weight
    ((minimized, _),) = minimize_kernels([(selection.kernels[0], weight)], settings)
    with torch.no_grad():
        return weight.copy_(minimized)


def minimize_kernels(
    layers: Iterable[Layer], settings: Minimization, advance: Advance | None = None
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield each layer's minimized weight, in the stored shape and dtype, on its device, and its record; in order.

    layers: kernels and their weights as stored, on one device; the weights are not written to. Half types are minimized
    in float32 and cast back. Small layers are taken ahead and minimized together, a large one by itself. advance: takes
    the steps (`Minimization.steps`) completed since the last call. Raises InputError for NaN or Inf, DivergedError.
    """
    for batch in batch_layers(layers):
        check_finite(batch)
        minimized = _minimized(batch, settings, advance)
        if not are_finite(list(minimized.values())):
            kernel, weight = next(layer for layer in batch if not are_finite([minimized[layer[0].name]]))
            kind = str(weight.dtype).removeprefix("torch.")
            raise DivergedError(f"{kernel.name}: the kernels exceeded the range of {kind}; lower `lr`")
        records = compare_weights([(kernel, weight, minimized[kernel.name]) for kernel, weight in batch])
        for (kernel, _), record in zip(batch, records, strict=True):
            yield minimized.pop(kernel.name), record


def batch_layers(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Yield small layers of one device together, up to a total size, and each large layer by itself."""
    batch: list[Layer] = []
    total = 0
    for kernel, weight in layers:
        most = TOGETHER.get(weight.device.type, LARGE)
        size = most if 4 * weight.numel() > LARGE else 4 * weight.numel()
        if batch and (total + size > most or weight.device != batch[0][1].device):
            yield batch
            batch, total = [], 0
        batch.append((kernel, weight.detach()))
        total += size
    if batch:
        yield batch


def _minimized(batch: list[Layer], settings: Minimization, advance: Advance | None) -> dict[str, Tensor]:
    """Return the minimized weights, as stored, by name. A CPU takes one stack at a time: its caches are small.

    A function of its own, so that no stack is in memory when its results are used.
    """
    groups = group_by_shape(batch)
    found: dict[str, Tensor] = {}
    for together in [[group] for group in groups] if batch[0][1].device.type == "cpu" else [groups]:
        stacks = [Stack(*zip(*group, strict=True)) for group in together]
        descend_(stacks, settings, advance)
        for stack in stacks:
            found |= stack.to_stored()
    return found


def group_by_shape(batch: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers of a batch in groups that can be stacked.

    On the CPU, layers are stacked only if their results have the same bits as alone: with 16 filters every tensor of
    each layer starts at a cache line, so that vectorized loops and products take the same course; a single tap makes
    vectors of matrices, which are multiplied in another way as soon as there are two.
    """
    groups: dict[object, list[Layer]] = {}
    for kernel, weight in batch:
        alone = weight.device.type == "cpu" and (kernel.filters % 16 > 0 or kernel.pointwise)
        shape = (kernel.groups, kernel.filters, kernel.channels, kernel.taps, weight.dtype == torch.float64)
        groups.setdefault(kernel.name if alone else shape, []).append((kernel, weight))
    return list(groups.values())


class Stack:
    """Layers whose filters have one shape, stacked along the axis of groups to be minimized together.

    filters: `[layers · groups, S / groups, N, C]`, float32 or float64, contiguous; dead filters are zero, and stay so.
    norms: their L2 norms `[layers · groups, S / groups, 1, 1]`.
    """

    def __init__(self, kernels: Sequence[Kernel], weights: Sequence[Tensor]) -> None:
        first = kernels[0].to_filters(weights[0])
        self.kernels, self.taps = kernels, kernels[0].taps
        self.filters = first.new_empty(len(kernels) * first.shape[0], *first.shape[1:])
        self._weights, self._living = weights, []
        for kernel, weight, filters in zip(kernels, weights, self.layers(), strict=True):
            filters.copy_(kernel.to_filters(weight))
            self._living.append(living_filters(filters)[..., None, None])
            filters.masked_fill_(~self._living[-1], 0)
        wide = torch.float32 if self.filters.device.type == "mps" else torch.float64  # squares must not underflow
        norms = torch.linalg.vector_norm(self.filters, dim=(-2, -1), keepdim=True, dtype=wide)
        self.norms = norms.to(self.filters.dtype)

    def layers(self) -> Sequence[Tensor]:
        """Return views of the filters, layer by layer."""
        return self.filters.chunk(len(self.kernels))

    def to_stored(self) -> dict[str, Tensor]:
        """Return each layer's filters by name, in the stored shape and type; dead ones are those of the weight."""
        found = {}
        for kernel, weight, filters, living in zip(
            self.kernels, self._weights, self.layers(), self._living, strict=True
        ):
            whole = (
                filters if living.is_cpu and living.all() else torch.where(living, filters, kernel.to_filters(weight))
            )
            found[kernel.name] = kernel.to_stored(whole, weight.dtype)
        return found


def rescale_to(kernel: Kernel, weight: Tensor, norms_of: Tensor) -> Tensor:
    """Return `weight` with each filter scaled to the L2 norm that it has in `norms_of`, both as stored.

    The control for what shrinking alone does: directions of one, norms of the other. Dead filters keep every bit.
    """
    stack, target = Stack([kernel], [weight.detach()]), kernel.to_filters(norms_of.detach())
    rescale_(stack.filters, torch.linalg.vector_norm(target, dim=(-2, -1), keepdim=True))
    return stack.to_stored()[kernel.name]


def descend_(stacks: Sequence[Stack], settings: Minimization, advance: Advance | None = None) -> None:
    """Minimize the layers of stacks on one device, in place.

    advance: takes the steps (`Minimization.steps`) completed since the last call. Raises DivergedError with the name of
    a layer whose loss stops being finite.
    """
    device, values = stacks[0].filters.device, sum(stack.filters.numel() for stack in stacks)
    with torch.no_grad(), full_precision(device):
        iterate = repeated(make_iteration(stacks, settings), device)
        for done in range(0, settings.iterations, LOOK_EVERY):
            block = min(LOOK_EVERY, settings.iterations - done)
            for _ in range(block):
                iterate()
            if settings.preserve_norm:  # an iteration leaves this to the next one
                for stack in stacks:
                    rescale_(stack.filters, stack.norms)
            _check_losses(stacks, settings, done + block)
            if advance:
                advance(block * values)
    for stack in stacks:
        stack.filters.grad = None


def make_iteration(stacks: Sequence[Stack], settings: Minimization) -> Callable[[], None]:
    """Return what does one iteration on stacks of one device, in place: their gradients are set up here."""
    objective = find_objective(settings.objective)
    gradients = [torch.empty_like(stack.filters) for stack in stacks]
    for stack, gradient in zip(stacks, gradients, strict=True):
        stack.filters.grad = gradient
    filters, kind = [stack.filters for stack in stacks], stacks[0].filters.device.type
    fused = kind in ("cpu", "cuda", "mps")
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(filters, lr=settings.lr, fused=fused)
    else:
        optimizer = torch.optim.Adam(filters, lr=settings.lr, fused=fused, capturable=kind == "cuda")

    def iterate() -> None:
        for stack, gradient in zip(stacks, gradients, strict=True):
            if settings.preserve_norm:
                objective.tangent_gradient(stack.filters, stack.taps, stack.norms, gradient)
            else:
                objective.gradient(stack.filters, stack.taps, gradient)
        optimizer.step()

    return iterate


def _check_losses(stacks: Sequence[Stack], settings: Minimization, done: int) -> None:
    value = find_objective(settings.objective).value
    losses = [value(filters, stack.taps) for stack in stacks for filters in stack.layers()]
    kernels = [kernel for stack in stacks for kernel in stack.kernels]
    for kernel, loss in zip(kernels, torch.stack([loss.to(losses[0]) for loss in losses]).tolist(), strict=True):
        if not math.isfinite(loss):
            raise DivergedError(
                f"{kernel.name}: the objective is {loss} after {done} iterations at `lr` {settings.lr:g}; nothing was "
                "written; lower `lr`, or scale kernels this large down first"
            )
