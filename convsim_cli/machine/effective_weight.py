"""The weight that a layer computes with: its own parameter, or a tensor computed from other parameters.

`torch.nn.utils.parametrize` computes the weight at each access. The older weight_norm, spectral_norm and pruning store
a plain tensor as `layer.weight`, which a forward pre-hook replaces at each forward pass: between an optimizer step and
the next pass it is out of date, and the graph behind it may be gone. Both are computed anew here, once per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def own_weight(layer: nn.Module) -> Tensor | None:
    """Return the parameter that a layer registers as its `weight`, or None where it registers none."""
    return layer._parameters.get("weight")


def computes_weight(layer: nn.Module) -> bool:
    """Return whether a layer computes its `weight` from other parameters."""
    return parametrize.is_parametrized(layer, "weight") or bool(_hooks(layer))


def effective_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight that a forward pass would use now, differentiable with respect to the parameters behind it.

    A weight that is computed is computed once, as in a forward pass: in training mode this advances the power iteration
    of spectral_norm. Without a graph (`torch.no_grad`) it is read as in evaluation mode: looking changes nothing.
    Returns None where `weight` is neither a parameter nor computed by a known mechanism.
    """
    own = own_weight(layer)
    if own is not None:
        return own
    with nullcontext() if torch.is_grad_enabled() else _evaluation(layer):
        if parametrize.is_parametrized(layer, "weight"):
            computed: Tensor = layer.parametrizations["weight"]()  # type: ignore[index, operator]
            return computed
        hooks = _hooks(layer)
        for hook in hooks:
            hook(layer, ())
    return layer.weight if hooks else None  # type: ignore[return-value]


def pull_back(weight: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each trainable parameter behind a computed weight with its share of the weight's gradient.

    gradient: ∂loss/∂weight, of the weight's shape, in any floating type. No `.grad` changes; the weight's graph is
    freed.
    """
    leaves = list(_leaves(weight))
    return list(zip(leaves, torch.autograd.grad(weight, leaves, gradient.to(weight.dtype)), strict=True))


@contextmanager
def _evaluation(layer: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in layer.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _hooks(layer: nn.Module) -> list[Callable[[nn.Module, Any], object]]:
    """The forward pre-hooks that compute `weight`, in their order."""
    return [hook for hook in layer._forward_pre_hooks.values() if _computed_by(hook) == "weight"]


def _computed_by(hook: object) -> str | None:
    """The name of the tensor that a forward pre-hook computes, None for a hook of another kind."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return hook.name
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else None


def _leaves(weight: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph behind a tensor."""
    nodes, seen = [weight.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            yield node.variable
        nodes.extend(following for following, _ in node.next_functions)
