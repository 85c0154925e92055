"""The kernels of a module, exactly, and the weights that its layers use at this moment.

A layer uses its own parameter, or a tensor computed from other parameters. `torch.nn.utils.parametrize` computes the
weight at each access. The older weight_norm, spectral_norm and pruning store a plain tensor as `layer.weight`, which a
forward pre-hook replaces at each forward pass: between an optimizer step and the next pass it is out of date, and the
graph behind it may be gone. Here both are recomputed, once per call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from convsim_cli.errors import InputError
from convsim_cli.kernels.kernel import FLOATING, Kernel, Patterns, Selection, Skipped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DTYPES = tuple(getattr(torch, name) for name in FLOATING)


def module_kernels(
    model: nn.Module,
    patterns: Patterns | None = None,
    names: Mapping[str, str] | None = None,
    *,
    parametrized: bool = False,
) -> Selection:
    """Return the kernels of every convolution in a module, exactly; a shared weight counts once.

    Names are those of `model.state_dict()`, or what `names` maps them to. Other layers with a `weight` of the shape of
    kernels are listed as skipped. parametrized: whether to select layers that compute their weight from other
    parameters, as `<layer>.weight`; you can read that weight (`weight_of`) but not write it. Raises InputError for a
    pattern that matches nothing and for sharded weights.
    """
    names = names or {}
    selection = Selection()
    owners: dict[int, str] = {}
    layers = []
    for path, layer in model.named_modules():
        weight = own_weight(layer)
        has_kernels = is_convolution(layer)
        if weight is not None and not isinstance(weight, UninitializedParameter):
            has_kernels |= weight.is_floating_point() and 3 <= weight.ndim <= 5  # such as torchvision's DeformConv2d
        if has_kernels:
            layers.append((f"{path}.weight".lstrip("."), layer))
    patterns = (patterns or Patterns()).resolved([names.get(path, path) for path, _ in layers])
    for path, layer in layers:
        name, weight = names.get(path, path), own_weight(layer)
        refusal = patterns.refusal(name)
        if weight is not None and id(weight) in owners:
            first = owners[id(weight)]  # a file may hold both under one name
            selection.skipped.append(Skipped(path if name == first else name, _shape(layer), f"shared with {first}"))
        elif not is_convolution(layer):
            unknown = f"a {type(layer).__name__}, which is no convolution that convsim knows"
            selection.skipped.append(Skipped(name, _shape(layer), refusal or unknown, unsupported=not refusal))
        else:
            owners[id(weight)] = name
            if refusal:
                reason: str | None = refusal
            elif weight is None and (parametrize.is_parametrized(layer, "weight") or _hooks(layer)):
                unwritable = "parametrized: no weight of its own; remove the parametrization first"
                reason = None if parametrized else unwritable
            else:
                refuse_sharded(name, weight)
                reason = _unusable(layer, weight)
            selection.add(_kernel_of(name, layer, _shape(layer)), reason, unsupported=not refusal)
    return selection


def warn_of_unsupported(selection: Selection) -> None:
    """Warn, once, of all layers that a library call leaves out because convsim cannot act on them."""
    by_reason: dict[str, list[str]] = {}
    for skipped in selection.skipped:
        if skipped.unsupported:
            by_reason.setdefault(skipped.reason, []).append(skipped.name)
    if by_reason:
        listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
        warnings.warn(f"convsim leaves out {listed}", stacklevel=3)


def weight_of(model: nn.Module, kernel: Kernel) -> Tensor:
    """Return the weight that a kernel's layer computes with now. Raises as `current_kernel`."""
    return current_kernel(model, kernel)[1]


def current_kernel(model: nn.Module, kernel: Kernel) -> tuple[Kernel, Tensor]:
    """Return the weight that the layer of a kernel's name computes with now, and the kernel as the layer is now.

    The weight is the layer's parameter, or is computed from other parameters, once, as in a forward pass
    (`effective_weight`). Raises InputError where the model has no such convolution any more, and for a weight that is
    sharded, lazy, or neither a parameter nor computed by a known mechanism.
    """
    layer: Any = model
    for part in kernel.name.split(".")[:-1]:  # `get_submodule` takes seven times as long
        layer = None if layer is None else layer._modules.get(part)
    if layer is None or not is_convolution(layer):
        found = "is no longer in the model" if layer is None else f"is now a {type(layer).__name__}"
        raise InputError(f"{kernel.name}: this convolution {found}; repeat the call that looked for convolutions")
    weight = effective_weight(layer)
    refuse_sharded(kernel.name, weight)
    reason = _unusable(layer, weight)
    if reason or weight is None:
        raise InputError(f"{kernel.name}: {reason}")
    transposed = isinstance(layer, _TRANSPOSED)
    if (weight.shape, layer.groups, transposed) != (kernel.shape, kernel.groups, kernel.transposed):
        kernel = _kernel_of(kernel.name, layer, tuple(weight.shape))
    return kernel, weight


def refuse_sharded(name: str, weight: Tensor | None) -> None:
    """Raise InputError for a DTensor, of which this process holds a part."""
    if hasattr(weight, "full_tensor"):
        raise InputError(
            f"{name} is a DTensor (fully_shard or tensor parallelism), and convsim needs whole weights; "
            "call convsim before sharding, or train with DistributedDataParallel"
        )


def is_convolution(layer: nn.Module) -> bool:
    """Return whether a module is a (transposed) convolution of one to three axes."""
    return isinstance(layer, _CONVOLUTIONS + _TRANSPOSED)


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, from the layer's attributes if it has no usable weight of its own."""
    weight = own_weight(layer)
    if weight is not None and not (is_convolution(layer) and _unusable(layer, weight)):
        return tuple(weight.shape)
    first, second = layer.out_channels, layer.in_channels
    if isinstance(layer, _TRANSPOSED):
        first, second = second, first
    return (first, second // layer.groups, *layer.kernel_size)


def _kernel_of(name: str, layer: Any, shape: tuple[int, ...]) -> Kernel:
    return Kernel(name, shape, layer.groups, isinstance(layer, _TRANSPOSED))


def _unusable(layer: Any, weight: Tensor | None) -> str | None:
    """Return why a convolution's weight cannot be worked on, or None."""
    if weight is None:
        return "its weight is not a parameter, nor computed from parameters in a way that convsim knows"
    if isinstance(weight, UninitializedParameter):
        return "lazy and not yet initialized; run a forward pass first"
    if weight.ndim != 2 + len(layer.kernel_size):
        return f"its weight is flattened or sharded, of shape {list(weight.shape)}"
    if weight.dtype not in _DTYPES:
        return f"its type {str(weight.dtype).removeprefix('torch.')} cannot be optimized"
    return None


def own_weight(layer: nn.Module) -> Tensor | None:
    """Return the parameter that a layer registers as its `weight`, or None where it registers none."""
    return layer._parameters.get("weight")


def effective_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight that a forward pass would use now, differentiable with respect to the parameters behind it.

    A weight that is computed is computed once, as in a forward pass: in training mode this advances the power iteration
    of spectral_norm. Without a graph (`torch.no_grad`) it is read as in evaluation mode: looking changes nothing.
    Returns None where `weight` is neither a parameter nor computed by a known mechanism.
    """
    own = own_weight(layer)
    if own is not None:
        return own
    with nullcontext() if torch.is_grad_enabled() else evaluation_mode(layer):
        if parametrize.is_parametrized(layer, "weight"):
            computed: Tensor = layer.parametrizations["weight"]()  # type: ignore[index, operator]
            return computed
        hooks = _hooks(layer)
        for hook in hooks:
            hook(layer, ())
    return layer.weight if hooks else None  # type: ignore[return-value]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back in its own mode on leaving."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def pull_back(weight: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each trainable parameter behind a computed weight with its share of the weight's gradient.

    gradient: ∂loss/∂weight, of the weight's shape, in any floating type. No `.grad` changes; the weight's graph is
    freed.
    """
    leaves = graph_leaves(weight)
    return list(zip(leaves, torch.autograd.grad(weight, leaves, gradient.to(weight.dtype)), strict=True))


def graph_leaves(tensor: Tensor) -> list[Tensor]:
    """Return the leaves of the graph behind a tensor, each once."""
    leaves: list[Tensor] = []
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return leaves


def _hooks(layer: nn.Module) -> list[Callable[[nn.Module, Any], object]]:
    """Return the forward pre-hooks that compute `weight`, in their order."""
    return [
        hook
        for hook in layer._forward_pre_hooks.values()
        if (isinstance(hook, WeightNorm | SpectralNorm) and hook.name == "weight")
        or (isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight")
    ]
