"""Keep optimizer steps from raising the normalized similarity of kernels again.

After a step K ← K + Δ, each layer's Δ loses the part that raises `ncs` to first order:

    Δ ← Δ − max(0, ⟨Δ, g⟩) / ‖g‖² · g,        g = ∂ncs/∂K at the former K

whichever optimizer made Δ, and whatever its momentum. With unit filters K̂_i = K_i / ‖K_i‖, ncs = L_CS(K̂) / pairs:
g_i is the gradient of Eq. 10 at K̂ without its part along K̂_i, over ‖K_i‖. The number of pairs cancels. A layer where
g = 0 is left alone: 1×1 kernels have an ncs of 1 whatever they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convsim_cli.kernels import Kernel, living_filters, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.machine.precision import full_precision
from convsim_cli.similarity import tangent_gradient


class SimilarityHold:
    """Holds the normalized similarity of a model's convolutions in optimizer steps: `with hold(): optimizer.step()`.

    Keeps no state between steps. It adds about as much to a step as the penalty on Eq. 10 does. Warns of layers that are
    left out: parametrized, lazy, of unknown types.
    """

    def __init__(self, model: nn.Module) -> None:
        selection = module_kernels(model)
        warn_of_unsupported(selection)
        self._model = model
        self._kernels = [kernel for kernel in selection.kernels if not kernel.pointwise]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Correct what the block does to the kernels. Nothing waits for the device."""
        weights = [(kernel, weight_of(self._model, kernel)) for kernel in self._kernels]
        trained = [(kernel, weight.detach()) for kernel, weight in weights if weight.requires_grad]
        rising = [normalized_gradient(kernel, weight) for kernel, weight in trained]
        former = [weight.clone() for _, weight in trained]
        yield
        for (_, weight), gradient, was in zip(trained, rising, former, strict=True):
            along = ((weight - was) * gradient).sum()
            squares = gradient.square().sum()
            factor = torch.where(squares > 0, along.clamp_min(0) / torch.where(squares > 0, squares, 1), 0)
            weight.sub_(factor * gradient)


@torch.no_grad()
def normalized_gradient(kernel: Kernel, weight: Tensor) -> Tensor:
    """Return ∂ncs/∂weight times the number of pairs, in the stored shape; 0 for dead filters, which do not count."""
    filters = kernel.to_filters(weight.detach())
    living = living_filters(filters)[..., None, None]
    norms = torch.where(living, torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True), 1)
    unit = torch.where(living, filters / norms, 0)
    with full_precision(weight.device):
        gradient = tangent_gradient(unit, kernel.taps, living.to(unit.dtype))
    return kernel.view_as_stored(gradient / norms)
