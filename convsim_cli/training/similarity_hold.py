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

from convsim_cli.kernels import Kernel, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.kernels.kernel import VANISHED
from convsim_cli.machine.precision import full_precision
from convsim_cli.similarity import normalized_gradient


class SimilarityHold:
    """Holds the normalized similarity of a model's convolutions in optimizer steps: `with hold(): optimizer.step()`.

    Keeps no state between steps. It adds 1.5 times as much to a step as the penalty on Eq. 10 does. Warns of layers
    that are left out: parametrized, lazy, of unknown types.
    """

    def __init__(self, model: nn.Module) -> None:
        selection = module_kernels(model)
        warn_of_unsupported(selection)
        self._model = model
        self._kernels = [kernel for kernel in selection.kernels if not kernel.pointwise]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Correct what the block does to the kernels. Nothing waits for the device."""
        layers = [(kernel, weight_of(self._model, kernel)) for kernel in self._kernels]
        trained = [(kernel, weight.detach()) for kernel, weight in layers if weight.requires_grad]
        former = [kernel.to_filters(weight).clone() for kernel, weight in trained]
        yield
        with torch.no_grad():
            for (kernel, weight), was in zip(trained, former, strict=True):
                _correct_(kernel, weight, was)


def _correct_(kernel: Kernel, weight: Tensor, was: Tensor) -> None:
    """Take from a weight the part of its last change that raises ncs. was: its former filters, overwritten."""
    with full_precision(weight.device):
        rising = normalized_gradient(was, kernel.taps, VANISHED)
        change = torch.sub(kernel.to_filters(weight), was, out=was)
        along = torch.dot(change.flatten(), rising.flatten()).clamp_min(0)
        squares = torch.dot(rising.flatten(), rising.flatten())
    factor = torch.where(squares > 0, along / torch.where(squares > 0, squares, 1), 0)
    weight.addcmul_(kernel.view_as_stored(rising).to(weight.dtype), factor, value=-1)
