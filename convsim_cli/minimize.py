"""Algorithm 1: minimize L_CS of the kernels alone, before training.

Layers are independent under Adam and SGD, so each is minimized by itself and one layer's state is held at a time.
Kernels stay in the layout that the products like; the loop never waits for the device but for a look at the loss every
50 iterations, and on CUDA an iteration is a graph that is replayed.

Raw, as in the paper, the objective is homogeneous of degree 4 and mostly shrinks the filters. `preserve_norm` holds
every filter at its own L2 norm: the gradient is projected onto the tangent space before the optimizer sees it, and the
filter rescaled after the step; rescaling alone does not work under Adam, whose steps do not depend on the gradient's
length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convsim_cli.errors import DivergedError, InputError
from convsim_cli.kernels import Kernel, Selection, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.machine.cuda_graphs import repeated
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.kernel_figures import Record, describe, is_finite, kernel_figures
from convsim_cli.similarity import Taps, similarity, similarity_gradient

LOOK_EVERY = 50  # iterations between looks at the loss

Advance = Callable[[int], None]  # told how many iterations have been done since the last call


@dataclass(frozen=True)
class Minimization:
    """How to minimize: the paper's settings (section 4.2) unless given.

    iterations: ≥ 0; lr: step size, > 0; preserve_norm: hold every filter at its own L2 norm; tol: stop a layer when 50
    iterations lower its loss by less than this share, 0 to never stop.
    """

    iterations: int = 500
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    preserve_norm: bool = False
    tol: float = 0.0

    def __post_init__(self) -> None:
        in_range = self.iterations >= 0 and 0 < self.lr < math.inf and 0 <= self.tol < math.inf
        if not in_range or self.optimizer not in ("adam", "sgd"):
            raise InputError(
                "expected iterations ≥ 0, lr > 0, tol ≥ 0 and optimizer adam or sgd, "
                f"got {self.iterations}, {self.lr}, {self.tol} and {self.optimizer!r}"
            )

    @property
    def objective(self) -> str:
        return "norm-preserving" if self.preserve_norm else "raw"

    def select(self, selection: Selection) -> Selection:
        """Leave out what this objective cannot act on: under `preserve_norm`, kernels whose L_CS is pure norm."""
        if not self.preserve_norm:
            return selection
        kept = Selection(skipped=list(selection.skipped))
        for kernel in selection.kernels:
            kept.add(kernel, "1×1: its L_CS is pure norm, which `preserve_norm` holds" if kernel.pointwise else None)
        return kept


def minimize_(
    model: nn.Module,
    iterations: int = 500,
    *,
    lr: float = 1e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    preserve_norm: bool = False,
    tol: float = 0.0,
    advance: Advance | None = None,
) -> list[Record]:
    """Minimize L_CS of every convolution of a module, in place, and return a record per layer (Algorithm 1).

    iterations ≥ 0, lr > 0, tol ≥ 0: see `Minimization`. advance: called with the number of iterations done since the
    last call. A record holds `name`, `shape`, `groups`, `assumed` and, under `before` and `after`, `cs`, `ncs` and
    `norm`. Warns of parametrized layers, which are left out. Raises InputError for a kernel with NaN or Inf and
    DivergedError for a loss that stops being finite; the model is then untouched.

    >>> from torch import nn
    >>> record = minimize_(nn.Sequential(nn.Conv2d(3, 8, 3)), iterations=100)[0]
    >>> record["after"]["cs"] < record["before"]["cs"]
    True
    """
    how = Minimization(iterations, lr, optimizer, preserve_norm, tol)
    selection = how.select(module_kernels(model))
    warn_of_unsupported(selection)
    kernels = selection.kernels
    done = [(kernel, *minimize_kernel(kernel, weight_of(model, kernel).detach(), how, advance)) for kernel in kernels]
    with torch.no_grad():
        for kernel, weight, _ in done:
            weight_of(model, kernel).copy_(weight)
    return [record for _, _, record in done]


def minimize_kernel(
    kernel: Kernel, weight: Tensor, how: Minimization, advance: Advance | None = None
) -> tuple[Tensor, Record]:
    """Return the minimized weight, in the stored shape and dtype, on its device, and the layer's record.

    weight: as stored, untouched. Half types are minimized in float32 and cast back. Raises InputError, DivergedError.
    """
    before = _figures(kernel, weight)
    filters = _own_filters(kernel, weight)
    with full_precision(weight.device):
        minimize_filters_(filters, kernel.taps, how, kernel.name, advance)
    minimized = kernel.to_stored(filters, weight.dtype)
    del filters  # a layer less while the figures are computed
    if not is_finite(minimized):
        raise DivergedError(
            f"{kernel.name}: the kernels left the range of {str(weight.dtype).removeprefix('torch.')}; lower --lr"
        )
    return minimized, {**describe(kernel), "before": before, "after": _figures(kernel, minimized)}


def minimize_filters_(
    filters: Tensor, taps: Taps, how: Minimization, name: str, advance: Advance | None = None
) -> None:
    """Minimize L_CS of filters `[groups, S / groups, N, C]` in place. Raises DivergedError with the layer's name."""
    filters.requires_grad_()  # what optimizers take; no graph is ever built
    filters.grad = gradient = torch.empty_like(filters)
    optimizer = _optimizer(filters, how)
    former = math.inf
    with torch.no_grad():
        norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)

        def step() -> None:
            similarity_gradient(filters, taps, out=gradient)
            if how.preserve_norm:
                project_(gradient, filters, norms)
            optimizer.step()
            if how.preserve_norm:
                rescale_(filters, norms)

        iterate = repeated(step, filters.device)
        done = 0
        while done < how.iterations:
            block = min(LOOK_EVERY, how.iterations - done)
            for _ in range(block):
                iterate()
            done += block
            loss = similarity(filters, taps).item()
            if not math.isfinite(loss):
                raise DivergedError(
                    f"{name}: L_CS is {loss} after {done} iterations at lr {how.lr:g}; nothing was written, "
                    "lower --lr, or scale kernels this large down first"
                )
            if advance:
                advance(block)
            if how.tol > 0 and former - loss < how.tol * former < math.inf:
                break
            former = loss
    if advance and done < how.iterations:
        advance(how.iterations - done)
    filters.requires_grad_(False).grad = None


def rescale_to(kernel: Kernel, weight: Tensor, norms_of: Tensor) -> Tensor:
    """Return `weight` with each filter scaled to the L2 norm that it has in `norms_of`, both as stored.

    The control for what shrinking alone does: directions of one, norms of the other. A zero filter stays zero.
    """
    filters, target = _own_filters(kernel, weight), kernel.to_filters(norms_of.detach())
    rescale_(filters, torch.linalg.vector_norm(target, dim=(-2, -1), keepdim=True))
    return kernel.to_stored(filters, weight.dtype)


def _own_filters(kernel: Kernel, weight: Tensor) -> Tensor:
    """Filters that may be written to: where their layout is that of the stored weight, a copy."""
    filters = kernel.to_filters(weight.detach())
    shared = filters.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return filters.clone() if shared else filters


def _optimizer(filters: Tensor, how: Minimization) -> torch.optim.Optimizer:
    fused = filters.device.type in ("cpu", "cuda", "mps")
    if how.optimizer == "sgd":
        return torch.optim.SGD([filters], lr=how.lr, fused=fused)
    return torch.optim.Adam([filters], lr=how.lr, fused=fused, capturable=filters.device.type == "cuda")


def project_(gradient: Tensor, filters: Tensor, norms: Tensor) -> None:
    """Project a gradient, in place, onto the tangent space of each filter's sphere: g −= ⟨g, K_i⟩ K_i / ‖K_i‖².

    gradient, filters: `[groups, S / groups, N, C]`; norms: the filters' L2 norms `[groups, S / groups, 1, 1]`.
    """
    inner = gradient.flatten(2).unsqueeze(-2) @ filters.flatten(2).unsqueeze(-1)  # as products: no copy is made
    along = inner / torch.where(norms > 0, norms.square(), 1)
    gradient.addcmul_(along, filters, value=-1)


def rescale_(filters: Tensor, norms: Tensor) -> None:
    """Scale each filter, in place, to its L2 norm in `norms` (shapes as in `project_`); a zero filter stays zero."""
    present = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    filters.mul_(torch.where(present > 0, norms / present, 0))


def _figures(kernel: Kernel, weight: Tensor) -> dict[str, Any]:
    figures = kernel_figures(kernel, weight)
    return {key: figures[key] for key in ("cs", "ncs", "norm")}
