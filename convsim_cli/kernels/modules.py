"""The kernels of a module, exactly, and the weights that its layers use at this moment.

A layer uses its own parameter, or a tensor computed from other parameters, in one of three ways:

- `torch.nn.utils.parametrize` computes the weight at each access.
- The older weight_norm, spectral_norm and pruning store a plain tensor as `layer.weight`, which a forward pre-hook
  replaces at each forward pass: between an optimizer step and the next pass it is out of date, and the graph behind it
  may be gone.
- A class with a `forward` of its own (weight standardization, masks, quantization-aware training) may compute anything.
  What reaches the convolution tells: such a layer is run on a few zeros, up to the convolution itself.

Here all of them are computed anew, once per call.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from convsim_cli.errors import ConvsimWarning, InputError, brief, kind_of, some_of
from convsim_cli.kernels.kernel import FLOATING, WRAPPERS, Kernel, Patterns, Selection, Skipped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KNOWN: tuple[Any, ...] = _CONVOLUTIONS + _TRANSPOSED  # torch 2.6 cannot compile a lookup of a class in a set
_FORWARDS = tuple(chain.from_iterable((kind.forward, getattr(kind, "_conv_forward", None)) for kind in _KNOWN))
_FUNCTIONS = frozenset(
    getattr(nn.functional, f"{name}{axes}d") for name in ("conv", "conv_transpose") for axes in (1, 2, 3)
)
_DTYPES = tuple(getattr(torch, name) for name in FLOATING)
_UPDATE = re.compile(r"(^|\.)(lora_(A|B|down|up|mid|layer)|lokr_\w+|hada_\w+|b?oft_\w+)(\.|$)")  # of another weight
_CONVOLVES = re.compile(r"conv\w*[123]d")  # in the code of a class: it calls a convolution by itself

_SCRIPTED = "scripted or traced, which hides what its layers compute; use the original module"


def module_kernels(
    model: nn.Module,
    patterns: Patterns | None = None,
    names: Mapping[str, str] | None = None,
    *,
    parametrized: bool = False,
) -> Selection:
    """Return the kernels of every convolution in a module, exactly; a shared weight counts once.

    Names are those of `state_dict()` of the module, or of the one inside DataParallel, DistributedDataParallel and
    torch.compile; or what `names` maps them to. Parameters of other layers that might be kernels are listed as skipped.
    parametrized: whether to select layers that compute their weight from other parameters, as `<layer>.weight`; you can
    read that weight (`weight_of`) but not write it. Raises InputError for a pattern that matches nothing, for sharded
    weights and for a module that is scripted as a whole.
    """
    model, names = unwrapped(model), names or {}
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"the model is {_SCRIPTED}")
    selection = Selection()
    owners: dict[object, str] = {}
    found = [
        (f"{without_wrappers(path)}.{name}".lstrip("."), layer, parameter)
        for path, layer in model.named_modules()
        for name, parameter in _candidates(layer)
    ]
    found.sort(key=lambda entry: not is_convolution(entry[1]))  # other modules can hold a layer's weight as well
    patterns = (patterns or Patterns()).resolved([names.get(path, path) for path, *_ in found])
    for path, layer, weight in found:
        name = names.get(path, path)
        refusal = patterns.refusal(name)
        convolves = is_convolution(layer) and path.rpartition(".")[2] == "weight"
        shape = _shape(layer) if convolves or weight is None else tuple(weight.shape)
        if weight is not None and _memory(weight) in owners:
            first = owners[_memory(weight)]  # a file may hold both under one name
            selection.skipped.append(Skipped(path if name == first else name, shape, f"shared with {first}"))
        elif update := _UPDATE.search(path):
            reason = refusal or f"{update[2]}: an update of another weight; merge it to include it"
            selection.skipped.append(Skipped(name, shape, reason, unsupported=not refusal))
        elif not convolves:
            unknown = f"a {type(layer).__name__}, not a convolution that convsim knows"
            reason = refusal or (_SCRIPTED if isinstance(layer, torch.jit.ScriptModule) else unknown)
            selection.skipped.append(Skipped(name, shape, reason, unsupported=not refusal))
        else:
            owners[_memory(weight)] = name
            unusable, computed = (None, False) if refusal else _usability(name, layer)
            if computed and not parametrized and not unusable:
                unusable = f"computed in the forward of a {type(layer).__name__}, so convsim cannot write it"
                if not overrides_forward(layer):
                    unusable = "parametrized: no weight of its own; remove the parametrization first"
            kernel = _kernel_of(name, layer, shape, computed)
            selection.add(kernel, refusal or unusable, unsupported=not refusal)
    return selection


def _memory(weight: Tensor | None) -> object:
    """Return a key for a parameter; parameters that share their memory have the same key."""
    if type(weight) is nn.Parameter and weight.layout is torch.strided and weight.device.type in ("cpu", "cuda", "mps"):
        with suppress(RuntimeError):  # of a storage that has no address
            if address := weight.untyped_storage().data_ptr():
                return address, weight.storage_offset(), weight.numel()
    return id(weight)


def without_wrappers(path: str) -> str:
    """Return the path of a module as `state_dict` has it, which leaves activation checkpointing out."""
    return f"{path}.".replace("_checkpoint_wrapped_module.", "").removesuffix(".")


def _candidates(layer: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Give what may be kernels among a layer's own tensors: their names, with None for a weight without a parameter."""
    if isinstance(layer, parametrize.ParametrizationList):
        return  # its layer has the tensor
    parameters = dict(layer.named_parameters(recurse=False))
    if not is_convolution(layer) and _is_quantized(layer):
        yield "weight", None
    if is_convolution(layer):
        yield "weight", parameters.pop("weight", None)
        if not overrides_forward(layer) or _hooks(layer):
            return
    elif parametrize.is_parametrized(layer):
        of_name: Any = layer.parametrizations
        behind = {name: list(tensors.parameters(recurse=False)) for name, tensors in of_name.items()}
        parameters |= {name: max(found, key=torch.Tensor.numel) for name, found in behind.items() if found}
    kind: Any = type(layer)
    convolves = hasattr(layer, "kernel_size") or _calls_convolutions(kind)
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter) or not parameter.is_floating_point() or name == "bias":
            continue
        axes = sum(side > 1 for side in parameter.shape)  # of gains per channel there is one
        if is_convolution(layer):
            likely = parameter.ndim >= 3 and axes > 1
        else:
            likely = convolves and axes > 1
            likely |= parameter.ndim > 4 and axes > 1
            likely |= parameter.ndim == 4 and axes > 1 and len(parameter) > 1  # not a position embedding `[1, C, h, w]`
            likely |= name == "weight" and 3 <= parameter.ndim <= 5  # such as torchvision's DeformConv2d
        if likely:
            yield name, parameter


def _is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer has the sizes of a convolution and, as quantized ones, neither parameters nor layers."""
    sizes = all(hasattr(layer, name) for name in ("in_channels", "out_channels", "groups"))
    sizes &= isinstance(getattr(layer, "kernel_size", None), tuple) and callable(getattr(layer, "weight", None))
    return sizes and next(chain(layer.parameters(), layer.children()), None) is None


@lru_cache(maxsize=1024)  # classes made on the fly are let go
def _calls_convolutions(kind: type) -> bool:
    """Return whether a class convolves by itself, as far as the names in its methods tell."""
    methods = chain.from_iterable(vars(base).values() for base in kind.__mro__[: kind.__mro__.index(nn.Module)])
    names = chain.from_iterable(method.__code__.co_names for method in methods if hasattr(method, "__code__"))
    return any(map(_CONVOLVES.fullmatch, names))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile, which needs no communication.

    Raises InputError if it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is {kind_of(model)}; expected a torch.nn.Module")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def warn_of_unsupported(selection: Selection, stacklevel: int = 3) -> None:
    """Warn once about all layers that are left out, except by patterns, or about a model without kernels.

    stacklevel: as `warnings.warn` takes it; 3 for a public function that calls this.
    """
    by_reason: dict[tuple[bool, str], list[str]] = {}
    for skipped in selection.skipped:
        if skipped.unsupported or (skipped.inert and selection.kernels):
            by_reason.setdefault((skipped.inert, skipped.reason), []).append(skipped.name)
    if by_reason:
        listed = "; ".join(
            f"{some_of(names) if inert else ', '.join(names)} ({reason})"
            for (inert, reason), names in sorted(by_reason.items(), key=lambda item: item[0][0])
        )
        warnings.warn(f"convsim skips {listed}", ConvsimWarning, stacklevel=stacklevel)
    elif not selection.kernels:
        warnings.warn(f"the model has {selection.no_kernels()}", ConvsimWarning, stacklevel=stacklevel)


def weight_of(model: nn.Module, kernel: Kernel) -> Tensor:
    """Return the weight that a kernel's layer currently uses. Raises as `current_kernel`."""
    return current_kernel(model, kernel)[1]


def current_kernel(model: nn.Module, kernel: Kernel) -> tuple[Kernel, Tensor]:
    """Return the weight that the layer of a kernel's name computes with now, and the kernel as the layer is now.

    The weight is the layer's parameter, or is computed from other parameters, once, as in a forward pass
    (`effective_weight`). Raises InputError if the model has no such convolution any more, and for a weight that is
    sharded, lazy, or neither a parameter nor computed by a known mechanism.
    """
    layer: Any = model
    for part in kernel.name.split(".")[:-1]:  # `get_submodule` takes seven times as long
        children = layer._modules  # a scripted module has no dictionary
        child = children.get(part) if isinstance(children, dict) else None
        layer = _inside(layer, part) if child is None else child
        if layer is None:
            break
    if not is_convolution(layer):
        found = "is no longer in the model" if layer is None else f"is now a {type(layer).__name__}"
        layer = None if layer is None else _inside(layer)
        if layer is None:
            raise InputError(f"{kernel.name}: this convolution {found}; repeat the call that looked for convolutions")
    weight = own_weight(layer)
    # while compiling, what `forward` did with the weight when the kernel was selected counts
    if weight is None or (overrides_forward(layer) and (kernel.computed or not torch.compiler.is_compiling())):
        try:
            weight = effective_weight(layer)
        except InputError as error:
            raise InputError(f"{kernel.name}: {error}") from error
    refuse_sharded(kernel.name, weight)
    reason = _unusable(layer, weight)
    if reason or weight is None:
        raise InputError(f"{kernel.name}: {reason}")
    transposed = isinstance(layer, _TRANSPOSED)
    if (weight.shape, layer.groups, transposed) != (kernel.shape, kernel.groups, kernel.transposed):
        kernel = _kernel_of(kernel.name, layer, tuple(weight.shape), kernel.computed)
    return kernel, weight


def _inside(module: nn.Module, part: str | None = None) -> nn.Module | None:
    """Return the child `part`, or the convolution for None, of what has been wrapped since: by torch.compile, say."""
    if part in WRAPPERS:
        return module  # unwrapped since
    while isinstance(module._modules, dict) and len(module._modules) == 1:
        ((name, inner),) = module._modules.items()
        if name not in WRAPPERS or inner is None:
            return None
        module = inner
        found = module if part is None and is_convolution(module) else module._modules.get(part or "")
        if found is not None:
            return found
    return None


def refuse_sharded(name: str, weight: Tensor | None) -> None:
    """Raise InputError for a DTensor, of which this process holds a part."""
    if hasattr(weight, "full_tensor"):
        raise InputError(
            f"{name} is a DTensor (fully_shard or tensor parallelism), and convsim needs whole weights; "
            "call convsim before sharding, or train with DistributedDataParallel"
        )


def is_convolution(layer: nn.Module | None) -> bool:
    """Return whether a module is a (transposed) convolution of one to three axes."""
    return isinstance(layer, _CONVOLUTIONS + _TRANSPOSED)


def axes_of(layer: nn.Module) -> int:
    """Return the number of axes that a convolution's kernels have, 1 to 3."""
    kinds = zip(_CONVOLUTIONS, _TRANSPOSED, strict=True)
    return next(axes for axes, both in enumerate(kinds, 1) if isinstance(layer, both))


def per_axis(layer: Any, name: str) -> tuple[int, ...]:
    """Return a convolution's setting, such as its `kernel_size`, for each axis: a class may hold one number for all."""
    value = getattr(layer, name)
    return (value,) * axes_of(layer) if isinstance(value, int) else tuple(value)


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, from the layer's attributes if it has no usable weight of its own."""
    weight = own_weight(layer)
    if weight is not None and not (is_convolution(layer) and _unusable(layer, weight)):
        return tuple(weight.shape)
    return _defined_shape(layer)


def _defined_shape(layer: Any) -> tuple[int, ...]:
    first, second = layer.out_channels, layer.in_channels
    if isinstance(layer, _TRANSPOSED):
        first, second = second, first
    return (first, second // layer.groups, *per_axis(layer, "kernel_size"))


def _kernel_of(name: str, layer: Any, shape: tuple[int, ...], computed: bool) -> Kernel:
    return Kernel(name, shape, layer.groups, isinstance(layer, _TRANSPOSED), computed=computed)


def _usability(name: str, layer: Any) -> tuple[str | None, bool]:
    """Return why a convolution's weight cannot be used, or None; and whether the layer computes it from others.

    Raises InputError for a sharded weight.
    """
    own = own_weight(layer)
    refuse_sharded(name, own)
    own_reason = _unusable(layer, own)
    if own is not None and (own_reason or not overrides_forward(layer)):
        return own_reason, False
    if own is None and not overrides_forward(layer):
        known = parametrize.is_parametrized(layer, "weight") or _hooks(layer)
        return (None, True) if known else (own_reason, False)
    try:
        with torch.no_grad():
            return None, effective_weight(layer) is not own
    except InputError as error:
        return str(error), True


def _unusable(layer: Any, weight: Tensor | None) -> str | None:
    """Return why a convolution's weight cannot be worked on, or None."""
    if weight is None:
        return "its weight is not a parameter, nor computed from parameters in a way that convsim knows"
    if isinstance(weight, UninitializedParameter):
        return "lazy and not yet initialized; run a forward pass first"
    if weight.ndim != 2 + axes_of(layer):
        return f"its weight is flattened or sharded, of shape {list(weight.shape)}"
    if weight.dtype not in _DTYPES:
        return f"its dtype {str(weight.dtype).removeprefix('torch.')} cannot be optimized"
    return None


def own_weight(layer: nn.Module) -> Tensor | None:
    """Return the parameter that a layer registers as its `weight`, or None if it registers none."""
    return layer._parameters.get("weight")


def overrides_forward(layer: nn.Module) -> bool:
    """Return whether a convolution's class, or the layer itself, has a `forward` other than torch's."""
    kind, own = type(layer), "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__
    if kind in _KNOWN or own:
        return own
    return kind.forward not in _FORWARDS or getattr(kind, "_conv_forward", None) not in _FORWARDS


def effective_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight that a forward pass would use now, differentiable with respect to the parameters behind it.

    A weight that is computed is computed once, as in a forward pass: in training mode this advances the power iteration
    of spectral_norm. Without a graph (`torch.no_grad`) it is read as in evaluation mode: looking changes nothing.
    Returns None if `weight` is neither a parameter nor computed by a known mechanism. Raises InputError for a layer
    with a `forward` of its own that convolves with no weight of the layer's shape.
    """
    own = own_weight(layer)
    overrides = overrides_forward(layer)
    if own is not None and (not overrides or hasattr(own, "full_tensor") or _unusable(layer, own)):
        return own
    with nullcontext() if torch.is_grad_enabled() else evaluation_mode(layer):
        if not overrides and parametrize.is_parametrized(layer, "weight"):
            computed: Tensor = layer.parametrizations["weight"]()  # type: ignore[index, operator]
            return computed
        hooks, former = _hooks(layer), layer.__dict__.get("weight")
        try:
            for hook in hooks:
                hook(layer, ())
            if overrides:
                if own is not None and _uses_as_stored(layer, own):
                    return own
                with nullcontext() if torch.is_grad_enabled() else _own_random_numbers(layer):
                    return _weight_at_convolution(layer)
            return layer.weight if hooks else None  # type: ignore[return-value]
        finally:
            if former is not None and not torch.is_grad_enabled():
                layer.__dict__["weight"] = former  # the graph behind it is the user's


_uses: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()  # what the answer rests on, and it


def _uses_as_stored(layer: nn.Module, own: Tensor) -> bool:
    """Return whether a `forward` convolves with the parameter as it is, as one does that only pads in its own way.

    It is the same tensor then, with the same values: a gain of 1 is a gain. It is tried with other values: a mask
    changes nothing of a weight that is masked already. The answer is kept until something in the layer changes that may
    decide it: a mode, an attribute, a buffer.
    """
    modules = list(layer.modules())
    state = [
        *chain.from_iterable(map(id, vars(module).values()) for module in modules),
        *(own.dtype, own.device, own.shape),
        *(
            buffer._version
            for module in modules
            if not isinstance(module, _NormBase)  # whose statistics change at every step
            for buffer in module.buffers(recurse=False)
        ),
    ]
    known, answer = _uses.get(layer, (None, False))
    if known != state:
        with torch.no_grad(), _own_random_numbers(layer):
            other = torch.linspace(1, 3, own.numel(), device=own.device)
            other[::2] *= -1
            other = other.to(own.dtype).view(own.shape)
            given = other.clone()
            used = _weight_at_convolution(layer, {"weight": given})
        answer = used is given and (used.is_meta or torch.equal(used, other))
        _uses[layer] = state, answer
    return answer


def _weight_at_convolution(layer: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the weight that a layer convolves with, found by running it on zeros. parameters: in place of its own."""
    if parameters is None:  # a `forward` may write to its parameters, as one does that masks them
        parameters = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    shape = _defined_shape(layer)
    like = next(chain(layer.parameters(), layer.buffers()), torch.empty(0, device="cpu"))
    padding = (0,) * axes_of(layer) if isinstance(layer.padding, str) else per_axis(layer, "padding")
    extents = zip(padding, per_axis(layer, "dilation"), per_axis(layer, "kernel_size"), strict=True)
    sides = [2 * pad + dilation * (k - 1) + 1 for pad, dilation, k in extents]
    # two inputs: a weight of each input's own has another shape
    zeros = torch.zeros(2, layer.in_channels, *sides, dtype=like.dtype, device=like.device)
    try:
        call = reach_convolution(layer, shape, (zeros,), parameters=parameters)
    except Exception as error:  # a user's `forward` may raise anything
        raise InputError(
            f"a {type(layer).__name__}, whose forward fails on zeros {list(zeros.shape)} ({brief(error)})"
        ) from error
    if call is None:
        raise InputError(f"a {type(layer).__name__}, whose forward uses no convolution weight {list(shape)}")
    return call.weight


class ConvolutionCall(NamedTuple):
    """A call of one of torch's convolution functions, without its bias."""

    function: Callable[..., Tensor]
    images: Tensor
    weight: Tensor
    settings: tuple[Any, ...]
    options: dict[str, Any]

    def convolve(self, weight: Tensor) -> Tensor:
        """Return the call's result for a weight and no bias."""
        return self.function(self.images, weight, None, *self.settings, **self.options)


class _Reached(BaseException):  # no Exception: a network may catch those
    """The convolution is about to run."""


class _UntilConvolution(TorchFunctionMode):
    """Stops before the first convolution with a weight of a shape, and keeps the call."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        self.call: ConvolutionCall | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function in _FUNCTIONS:
            images, weight, _ = (
                args[index] if index < len(args) else options.pop(name, None)
                for index, name in enumerate(("input", "weight", "bias"))
            )
            if weight.shape == self._shape:
                self.call = ConvolutionCall(function, images, weight, args[3:], options)
                raise _Reached
        return function(*args, **(kwargs or {}))


class _Forward(nn.Module):
    """Calls a layer's `forward` without its hooks, for `functional_call`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.layer.forward(*inputs, **options)


def reach_convolution(
    layer: nn.Module,
    shape: tuple[int, ...],
    inputs: tuple[Any, ...],
    options: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> ConvolutionCall | None:
    """Run a layer's `forward` up to its first convolution with a weight of a shape, and return the call that it makes.

    Neither hooks nor the convolution itself are called, and buffers are copies. parameters: in place of the layer's
    own. Returns None if there is no such convolution.
    """
    tensors = {name: buffer.clone() for name, buffer in layer.named_buffers()} | dict(parameters or {})
    mode = _UntilConvolution(shape)
    with kept_attributes(layer.modules()), suppress(_Reached), mode:
        functional_call(
            _Forward(layer), {f"layer.{name}": t for name, t in tensors.items()}, inputs, dict(options or {})
        )
    return mode.call


@contextmanager
def kept_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the attributes of modules back on leaving, and what was written to lists, dictionaries, sets and tensors."""
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    held = list(chain.from_iterable(was.values() for _, was in attributes))
    containers = [(value, copy.copy(value)) for value in held if type(value) in (list, dict, set)]
    tensors = [value for value in held if type(value) is Tensor and not value.is_inference()]
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for container, before in containers:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)
        for tensor, version, value in values:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back in its own mode on leaving.

    `eval` is not called: that of some layers changes weights, as one does that merges a LoRA into its weight.
    """
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}  # else it is frozen
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _own_random_numbers(layer: nn.Module) -> AbstractContextManager[None]:
    """Let a layer draw random numbers without a trace in the generators of torch."""
    devices = {tensor.device for tensor in chain(layer.parameters(), layer.buffers()) if tensor.device.type == "cuda"}
    return torch.random.fork_rng(list(devices))


def pull_back(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Return the gradient of each trainable parameter behind computed weights.

    gradients: ∂loss/∂weight, of the weights' shapes, in any floating type. No `.grad` changes; the gradient hooks of
    the parameters are called, and the weights' graphs freed.
    """
    leaves = graph_leaves(*weights)
    if not leaves:
        return {}
    likewise = [gradient.to(weight.dtype) for weight, gradient in zip(weights, gradients, strict=True)]
    return dict(zip(leaves, torch.autograd.grad(weights, leaves, likewise), strict=True))


def graph_leaves(*tensors: Tensor) -> list[Tensor]:
    """Return the leaves of the graph behind tensors, each once."""
    leaves: list[Tensor] = []
    nodes, seen = [tensor.grad_fn for tensor in tensors], set()
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
