"""Algorithm 2: L_CS as a regularization term, for anyone's training loop."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, module_kernels, warn_of_parametrized, weight_of
from convsim_cli.machine.precision import full_precision
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.similarity import similarity, similarity_gradient

Pairs = Literal["all", "neighbours"]


class ConvSimPenalty:
    """The sum of L_CS over a model's convolutions: `loss = task_loss + beta * penalty()`.

    model: any module; its kernels are found once. pairs: `all` for Eq. 10, `neighbours` for what the authors' public
    code sums. Not a module: it owns no parameters and does not enter state dicts. Warns of
    parametrized layers, which it leaves out. Raises InputError for a model without convolution kernels that form pairs.
    Source: Algorithm 2.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> penalty = ConvSimPenalty(model)
    >>> (1e-3 * penalty()).backward()
    >>> model[0].weight.grad.shape
    torch.Size([8, 3, 3, 3])
    """

    def __init__(self, model: nn.Module, pairs: Pairs = "all") -> None:
        selection = module_kernels(model)
        warn_of_parametrized(selection)
        if not selection.kernels:
            raise InputError("the model has no convolution kernels that form pairs")
        if pairs not in ("all", "neighbours"):
            raise InputError(f"expected pairs 'all' or 'neighbours', got {pairs!r}")
        self.pairs = pairs
        self._layers: list[tuple[Kernel, nn.Parameter]] = [
            (kernel, weight_of(model, kernel)) for kernel in selection.kernels
        ]

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar ≥ 0, differentiable with respect to the model's kernels."""
        objective = OBJECTIVES["cs" if self.pairs == "all" else "neighbours"]
        values = [objective.value(kernel.to_filters(weight), kernel.taps) for kernel, weight in self._layers]
        return torch.stack([value.to(values[0]) for value in values]).sum()

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return Eq. 10 summed over the layers, whatever `pairs` is: the figure to log."""
        device = self._layers[0][1].device
        with full_precision(device):
            values = [similarity(kernel.to_filters(weight), kernel.taps) for kernel, weight in self._layers]
        return torch.stack([value.to(values[0]) for value in values]).sum()

    @torch.no_grad()
    def add_gradient_(self, beta: float | Tensor) -> None:
        """Add β·∂penalty to the gradients that the parameters hold, as `(β·penalty()).backward()` would, without a
        graph.

        Frozen parameters are left alone. beta: weight on L_CS, dimensionless, ≥ 0; a scalar tensor stays on its
        device. Call it between `backward()` (with a gradient scaler: after `unscale_`) and the optimizer's step.
        """
        with full_precision(self._layers[0][1].device):
            for kernel, weight in self._layers:
                if not weight.requires_grad:  # frozen: backward() would leave it alone as well
                    continue
                gradient = self._gradient(kernel, weight).to(weight.dtype)
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                if isinstance(beta, Tensor):
                    weight.grad.addcmul_(gradient, beta.to(gradient))
                else:
                    weight.grad.add_(gradient, alpha=beta)

    def _gradient(self, kernel: Kernel, weight: Tensor) -> Tensor:
        gradient = similarity_gradient if self.pairs == "all" else OBJECTIVES["neighbours"].gradient
        return kernel.to_stored(gradient(kernel.to_filters(weight), kernel.taps, None), weight.dtype)
