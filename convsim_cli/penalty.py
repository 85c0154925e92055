"""Keep kernels dissimilar during training (Algorithm 2): an objective as a penalty, for any training loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError, describe_tensor, is_number
from convsim_cli.kernels import (
    Kernel,
    Patterns,
    current_kernel,
    living_filters,
    module_kernels,
    overrides_forward,
    pull_back,
    refuse_meta,
    warn_of_unsupported,
)
from convsim_cli.layers import layers_of
from convsim_cli.objectives import OBJECTIVES, Objective, Value, find_objective, make_objective
from convsim_cli.precision import full_precision, transformed

LARGEST_BETA = 3.4e38  # in float32


class ConvSimPenalty:
    """An objective, summed over a model's convolutions: `loss = task_loss + beta * penalty()`.

    model: any module. objective: `cs` (Eq. 10), `neighbours`, `kernel`, `expected`, `ocnn`, `srip` or `orthoreg`; or a
    function of a layer's filters `[groups, S / groups, N, C]` and its kernel size that returns a differentiable scalar,
    whose own `backward` runs in the precision that is set then (in full float32 in `add_gradient_`).
    include, exclude: globs over names of kernels, such as `layer1.*`.

    The penalty selects layers by name when it is created, and looks their weights up at each call: it follows replaced
    and compiled layers, `load_state_dict(assign=True)`, and parametrizations and pruning added or removed later. It
    computes a parametrized weight once per call, and likewise a weight that a layer computes in its `forward`, such
    as timm's StdConv2d: that layer is run on a few zeros, up to its convolution, which torch.compile cannot trace. It
    does not include layers with new names. A call raises InputError if a selected layer is gone, is no longer a
    convolution, or has a weight that the penalty cannot follow, such as a DTensor (`fully_shard`) or one on the meta
    device; and under a transform of torch.func that does not act on the model's own weights: there, let the model call
    its penalty within `functional_call`, or use `convolutional_similarity`.

    The penalty is not a module: it owns no parameters and does not enter state dicts. Pickling or copying it includes
    its model; a copy of the model alone needs a penalty of its own. Warns about skipped layers that it cannot act on
    (lazy layers, unknown types). Raises InputError for an unknown objective, for a pattern that matches nothing, and
    for a model without kernels that form pairs. Source: Algorithm 2.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> penalty = ConvSimPenalty(model)
    >>> (1e-3 * penalty()).backward()
    >>> model[0].weight.grad.shape
    torch.Size([8, 3, 3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        objective: str | Value = "cs",
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self._objective = _to_objective(objective)
        selection = module_kernels(model, Patterns(include, exclude), parametrized=True)
        selection.require_kernels("the model has")
        warn_of_unsupported(selection)
        self._model, self._kernels = model, selection.kernels
        layers = (layer for _, layer in layers_of(model, self._kernels))
        self._runs_layers = any(kernel.computed for kernel in self._kernels) and any(map(overrides_forward, layers))

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar, ≥ 0 for the named objectives, differentiable with respect to the parameters."""
        if not self._runs_layers:
            return self._sum(self._objective)
        if torch.compiler.is_compiling():
            raise InputError(
                "torch.compile cannot trace a penalty on weights that layers compute in their `forward`; call the "
                "penalty outside the code compiled with fullgraph"
            )
        # loading torch.compile takes seconds: where it has not been loaded, nothing is compiled
        call = torch.compiler.disable(self._sum) if "torch._dynamo" in sys.modules else self._sum
        return call(self._objective)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return Eq. 10 summed over the layers, whatever the objective: the figure to log.

        Parametrized weights are read as in evaluation mode, so that logging does not change the model.
        """
        return self._sum(OBJECTIVES["cs"])

    @torch.no_grad()
    def add_gradient_(self, beta: float | Tensor, preserve_norm: bool = False) -> None:
        """Add β·∂penalty to the parameters' gradients, as `(beta * penalty()).backward()` would, without a graph.

        Call it between `backward()` (with a gradient scaler: after `unscale_`) and the optimizer's step. beta: weight
        of the penalty, finite and ≥ 0. A tensor with one element stays on its device: its value is checked on the CPU
        only, since reading it elsewhere would wait for the device. Frozen parameters are left alone. Half-precision
        gradients are added to in float32 and rounded once. Gradient hooks of a parameter, including post-accumulate
        hooks, are called with the penalty's gradient. preserve_norm: remove from each filter's gradient the component
        along the filter, so that it reduces similarity without shrinking. Raises InputError for another beta, and as a
        call of the penalty; all gradients are then unchanged.
        """
        _check_beta(beta)
        beta = beta.reshape(()) if isinstance(beta, Tensor) else float(beta)  # torch takes no ints above 64 bits
        own, behind = self._contributions(beta, preserve_norm)
        for parameter in [kept for kept in own if kept._backward_hooks or kept._post_accumulate_grad_hooks]:
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
            torch.autograd.backward([parameter], [(beta * own.pop(parameter)).to(dtype)])
        _accumulate(own, beta)
        _accumulate(behind, 1.0)
        for parameter in behind:  # autograd has called their other hooks
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)

    @torch.no_grad()
    def gradient_ratio(self, preserve_norm: bool = False) -> Tensor:
        """Return ‖gradient‖ that the parameters behind the kernels hold / ‖gradient‖ that `add_gradient_(1)` would add.

        A scalar on the kernels' device, to choose β by: 0.01 of it makes the penalty's gradient 1 % of the task's. Call
        it right before `add_gradient_`: after the last `backward()` of an accumulated gradient, and with a gradient
        scaler after `unscale_`. preserve_norm, errors: as `add_gradient_`. ∞ or NaN where the penalty's gradient is
        zero. Raises InputError if no parameter behind the kernels has a gradient.
        """
        own, behind = self._contributions(1.0, preserve_norm)
        added = [*own.values(), *behind.values()]
        if not added:
            return torch.tensor(math.nan, device="cpu")
        held = [parameter.grad for parameter in own | behind if parameter.grad is not None]
        if not held:
            raise InputError("no parameter behind the kernels has a gradient; call it after `backward()`")
        return _norm(held, added[0]) / _norm(added, added[0])

    def _contributions(
        self, beta: float | Tensor, preserve_norm: bool
    ) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """The gradients of trainable kernels, still to be multiplied by β, and of parameters behind computed ones."""
        _check_preserve_norm(preserve_norm)
        with torch.enable_grad():  # a computed weight leads to its parameters through a graph
            layers = self._layers()
        for kernel, weight in layers:
            refuse_meta(kernel.name, weight)
        own: dict[Tensor, Tensor] = {}
        computed: list[Tensor] = []
        gradients: list[Tensor] = []
        with full_precision(layers[0][1].device):
            for kernel, weight in layers:
                if not weight.requires_grad:
                    continue
                gradient = self._gradient(kernel, weight, preserve_norm)
                if weight.is_leaf:
                    own[weight] = own[weight] + gradient if weight in own else gradient  # tied since
                else:
                    computed.append(weight)
                    gradients.append(beta * gradient)
        return own, pull_back(computed, gradients)

    def _layers(self) -> list[tuple[Kernel, Tensor]]:
        return [current_kernel(self._model, kernel) for kernel in self._kernels]

    def _sum(self, objective: Objective) -> Tensor:
        values = []
        layers = self._layers()
        if transformed() and not any(torch._C._functorch.is_functorch_wrapped_tensor(weight) for _, weight in layers):
            raise InputError(
                "a transform of torch.func does not reach this penalty, which reads the weights that the model holds; "
                "let the model call it within `functional_call`, or use `convolutional_similarity`"
            )
        for kernel, weight in layers:
            refuse_meta(kernel.name, weight)
            values.append(objective.value(_filters(objective, kernel, weight), kernel.taps))
        return torch.stack([value.to(values[0]) for value in values]).sum()

    def _gradient(self, kernel: Kernel, weight: Tensor, preserve_norm: bool) -> Tensor:
        """∂objective/∂weight, in float32 or float64, in the weight's shape."""
        filters = _filters(self._objective, kernel, weight.detach())
        if not preserve_norm:
            return kernel.view_as_stored(self._objective.gradient(filters, kernel.taps, None))
        if kernel.pointwise and self._objective.norm_only_pointwise:
            return torch.zeros_like(weight)
        return kernel.view_as_stored(self._objective.tangent_gradient(filters, kernel.taps, None, None))


def _filters(objective: Objective, kernel: Kernel, weight: Tensor) -> Tensor:
    filters = kernel.to_filters(weight)
    if objective.vanishes_with_filters:
        return filters
    return filters.masked_fill(~living_filters(filters.detach())[..., None, None], 0)


def check_settings(
    beta: float | Tensor, objective: str | Value, include: Sequence[str], exclude: Sequence[str], preserve_norm: bool
) -> None:
    """Raise InputError for what `ConvSimPenalty` and its `add_gradient_` refuse whatever the model."""
    _check_beta(beta)
    _check_preserve_norm(preserve_norm)
    _to_objective(objective)
    Patterns(include, exclude)


def _to_objective(objective: str | Value) -> Objective:
    return find_objective(objective) if isinstance(objective, str) else make_objective(objective)


def _check_preserve_norm(preserve_norm: object) -> None:
    if preserve_norm not in (True, False):
        raise InputError(f"`preserve_norm` is {preserve_norm!r}; expected true or false")


def _check_beta(beta: float | Tensor) -> None:
    if isinstance(beta, Tensor):
        if beta.numel() != 1 or beta.is_complex() or beta.is_meta or beta.layout != torch.strided:
            raise InputError(f"`beta` is a {describe_tensor(beta)} tensor; expected one real number")
        if beta.device.type != "cpu":
            return
    elif not is_number(beta):
        raise InputError(
            f"`beta` {beta!r}: expected a number or a tensor of one value; `ConvSimPenalty.gradient_ratio` helps to "
            "choose it"
        )
    value = beta.item() if isinstance(beta, Tensor) else beta
    if not 0 <= value <= LARGEST_BETA:
        raise InputError(f"`beta` is {value}; expected a finite number ≥ 0, at most {LARGEST_BETA:g}")


def _accumulate(gradients: dict[Tensor, Tensor], factor: float | Tensor) -> None:
    """Add gradients, times a factor, to those of their parameters: with a number, in few launches for all.

    A single gradient of another layout or type would make `_foreach_add_` launch once for each of all.
    """
    alike: list[tuple[Tensor, Tensor]] = []
    for parameter, gradient in gradients.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        if isinstance(factor, Tensor):
            parameter.grad.addcmul_(gradient, factor)
        elif gradient.dtype == parameter.grad.dtype and _strides(gradient) == _strides(parameter.grad):
            alike.append((parameter.grad, gradient))
        else:
            parameter.grad.add_(gradient, alpha=factor)
    if alike and not isinstance(factor, Tensor):
        torch._foreach_add_(*map(list, zip(*alike, strict=True)), alpha=factor)


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _norm(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    """The L2 norm of all values together, as a scalar on the device of `like`."""
    norms = [torch.linalg.vector_norm(gradient.float()).to(like.device) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
