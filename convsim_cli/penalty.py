"""Algorithm 2: an objective as a regularization term, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Patterns, current_kernel, module_kernels, warn_of_unsupported
from convsim_cli.machine.effective_weight import pull_back
from convsim_cli.machine.precision import full_precision
from convsim_cli.objectives import OBJECTIVES, Objective, find_objective

Layers = list[tuple[Kernel, Tensor]]


class ConvSimPenalty:
    """An objective, summed over a model's convolutions: `loss = task_loss + beta * penalty()`.

    model: any module. objective: `cs` is Eq. 10; `convsim_cli.objectives.OBJECTIVES` lists all. include, exclude: globs
    over names of kernels, such as `layer1.*`.

    The penalty selects layers by name when it is created, and looks their weights up at each call: it follows replaced
    layers, `load_state_dict(assign=True)`, and parametrizations and pruning added or removed later. It computes a
    parametrized weight once per call. It does not see layers with new names. A call raises InputError where a selected
    layer is gone, is no convolution any more, or has a weight that the penalty cannot follow, such as a DTensor
    (`fully_shard`).

    The penalty is not a module: it owns no parameters and does not enter state dicts. Warns of layers that it leaves
    out because it cannot act on them (lazy layers, unknown types). Raises InputError for an unknown objective, for a
    pattern that matches nothing, and for a model without kernels that form pairs. Source: Algorithm 2.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> penalty = ConvSimPenalty(model)
    >>> (1e-3 * penalty()).backward()
    >>> model[0].weight.grad.shape
    torch.Size([8, 3, 3, 3])
    """

    def __init__(
        self, model: nn.Module, objective: str = "cs", *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        self._objective = find_objective(objective)
        selection = module_kernels(model, Patterns(include, exclude), parametrized=True)
        warn_of_unsupported(selection)
        if not selection.kernels:
            raise InputError(
                "the model has no convolution kernels that form pairs"
                + "".join(f"; {skipped.name}: {skipped.reason}" for skipped in selection.skipped[:3])
            )
        self._model = model
        self._kernels = selection.kernels

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar ≥ 0, differentiable with respect to the model's parameters."""
        return self._sum(self._objective)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return Eq. 10 summed over the layers, whatever the objective: the figure to log.

        Parametrized weights are read as in evaluation mode, so that logging does not change the model.
        """
        return self._sum(OBJECTIVES["cs"])

    @torch.no_grad()
    def add_gradient_(self, beta: float | Tensor) -> None:
        """Add β·∂penalty to the parameters' gradients, as `(beta * penalty()).backward()` would, without a graph.

        Call it between `backward()` (with a gradient scaler: after `unscale_`) and the optimizer's step. beta: weight
        of the penalty, dimensionless, finite and ≥ 0. A tensor with one element stays on its device: its value is
        checked on the CPU only, since reading it elsewhere would wait for the device. Frozen parameters are left
        alone. Half-precision gradients are added to in float32 and rounded once. Raises InputError for another beta,
        and as a call of the penalty; all gradients are then as they were.
        """
        _check_beta(beta)
        with torch.enable_grad():  # a computed weight leads to its parameters through a graph
            layers = self._layers()
        own: dict[Tensor, Tensor] = {}
        behind: list[tuple[Tensor, Tensor]] = []
        with full_precision(layers[0][1].device):
            for kernel, weight in layers:
                if not weight.requires_grad:
                    continue
                gradient = self._gradient(kernel, weight)
                if weight.is_leaf:
                    own[weight] = own[weight] + gradient if weight in own else gradient  # tied since
                else:
                    behind += pull_back(weight, beta * gradient)
        _accumulate(own, beta)
        for parameter, gradient in behind:  # which several layers can share
            _accumulate({parameter: gradient}, 1.0)

    def _layers(self) -> Layers:
        return [current_kernel(self._model, kernel) for kernel in self._kernels]

    def _sum(self, objective: Objective) -> Tensor:
        values = [objective.value(kernel.to_filters(weight), kernel.taps) for kernel, weight in self._layers()]
        return torch.stack([value.to(values[0]) for value in values]).sum()

    def _gradient(self, kernel: Kernel, weight: Tensor) -> Tensor:
        """∂objective/∂weight, in float32 or float64, in the weight's shape."""
        gradient = self._objective.gradient(kernel.to_filters(weight.detach()), kernel.taps, None)
        return kernel.view_as_stored(gradient)


def _check_beta(beta: float | Tensor) -> None:
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            raise InputError(f"`beta` has the shape {list(beta.shape)}; expected one number")
        if beta.device.type != "cpu":
            return
    if not 0 <= float(beta) < math.inf:
        raise InputError(f"`beta` is {float(beta)}; expected a finite number ≥ 0")


def _accumulate(gradients: dict[Tensor, Tensor], factor: float | Tensor) -> None:
    """Add gradients, times a factor, to those of their parameters: with a number, in few launches for all."""
    sums = [_gradient_of(parameter) for parameter in gradients]
    if isinstance(factor, Tensor):
        for total, gradient in zip(sums, gradients.values(), strict=True):
            total.addcmul_(gradient, factor)
    elif sums:
        torch._foreach_add_(sums, list(gradients.values()), alpha=factor)


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
