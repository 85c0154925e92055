"""The per-layer report: what scaling moves, and what it cannot move.

Keys of a record: `cs` L_CS (Eq. 10); `ncs` L_CS free of scale; `kernel_cos` mean |cos| of filter pairs; `fm_cos` mean
|cos| of feature-map pairs; `fm_cos_random` what it would be by chance; `fm_inner2` the paper's feature-map similarity;
`norm` ‖W‖; `dead` filters that are zero or whose map is zero on every input; `redundant` filters with a partner of mean
|cos| above 0.95.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, is_convolution, module_kernels, warn_of_parametrised, weight_of
from convsim_cli.precision import full_precision
from convsim_cli.probes import FeatureMapSimilarity, finite
from convsim_cli.similarity import similarity

Record = dict[str, Any]
FIGURES = ("cs", "ncs", "kernel_cos", "fm_cos", "fm_inner2", "norm", "dead", "fm_cos_random", "redundant")


def measure(model: nn.Module, images: Tensor | Iterable[Tensor]) -> list[Record]:
    """Return a record per convolution of a network, its feature maps taken from running the images through it.

    images: one batch `[B, C, …]`, or several, on the model's device. The model is run in evaluation mode, without
    autocast or TF32, and left as it was. A layer that was never called has null feature-map figures; a parametrised one
    is left out, with a warning. Raises InputError for a kernel with NaN or Inf. Source: the keys' formulas in this
    module's head.

    >>> from torch import nn
    >>> record = measure(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 32, 32))[0]
    >>> record["name"], record["shape"], record["dead"]
    ('0.weight', [8, 3, 3, 3], 0)
    """
    selection = module_kernels(model)
    warn_of_parametrised(selection)
    kernels = selection.kernels
    maps = feature_maps(model, kernels, [images] if isinstance(images, Tensor) else images)
    return [layer_record(kernel, weight_of(model, kernel).detach(), maps[kernel.name].result()) for kernel in kernels]


def layer_record(kernel: Kernel, weight: Tensor, maps: Mapping[str, Any]) -> Record:
    """Join what a layer is, its kernel figures and those of its feature maps (`FeatureMapSimilarity.result`)."""
    figures = kernel_figures(kernel, weight)
    found = {**figures, **maps, "dead": max(figures["zero"], maps["dead"] or 0)}
    return describe(kernel) | {key: found[key] for key in FIGURES}


def describe(kernel: Kernel) -> Record:
    """Return the keys that say which layer a record is of."""
    return {"name": kernel.name, "shape": list(kernel.shape), "groups": kernel.groups, "assumed": kernel.assumed}


def kernel_figures(kernel: Kernel, weight: Tensor) -> Record:
    """Return `cs`, `ncs`, `kernel_cos`, `norm` and the number of `zero` filters of a stored weight, in float64.

    `ncs` and `kernel_cos` are None where fewer than two filters of a group are non-zero. Raises InputError for NaN or
    Inf.
    """
    check_finite(kernel, weight)
    stored = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()  # mps has no float64
    filters = kernel.to_filters(stored).to(torch.float64, copy=True)  # the one copy that is held, divided in place
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), keepdim=True)
    live = (norms > 0).sum(dim=1).flatten()
    pairs = (live * (live - 1)).sum().item() / 2
    with full_precision(stored.device):
        value = similarity(filters, kernel.taps).item()
        unit = filters.div_(torch.where(norms > 0, norms, 1)).flatten(2)
        ncs = 1.0 if kernel.pointwise or not pairs else similarity(filters, kernel.taps).item() / pairs
        cosines = unit @ unit.mT
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    return {
        "cs": finite(value),
        "ncs": ncs if pairs else None,
        "kernel_cos": cosines.abs_().sum().item() / 2 / pairs if pairs else None,
        "norm": finite(torch.linalg.vector_norm(norms).item()),
        "zero": norms.numel() - int(live.sum().item()),
    }


def check_finite(kernel: Kernel, weight: Tensor, where: Path | None = None) -> None:
    """Raise InputError, naming the tensor (and the file it is in), where a kernel holds NaN or Inf."""
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        file = f"{where}: " if where else ""
        raise InputError(
            f"{file}{kernel.name} {list(kernel.shape)}: {bad} of {weight.numel()} values are NaN or Inf; "
            "mend it, or leave it out (--exclude)"
        )


def is_finite(weight: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf, without a copy of it."""
    return not weight.numel() or bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def feature_maps(
    model: nn.Module, kernels: Iterable[Kernel], batches: Iterable[Tensor], names: Mapping[str, str] | None = None
) -> dict[str, FeatureMapSimilarity]:
    """Run batches through a network and return the similarity of the maps of each kernel's layer, by the kernel's name.

    names: the model's name of a tensor → the kernel's, where they differ. The network runs in evaluation mode and is
    left in the mode it was in. One layer's maps are held at a time; their `calls` counts how often a layer was called.
    """
    kernels = list(kernels)
    similarities = {kernel.name: FeatureMapSimilarity(kernel.groups) for kernel in kernels}
    with _evaluation(model), _as_written(), _hooks(model, similarities, names or {}), torch.no_grad():
        for images in batches:
            with full_precision(images.device):
                model(images)
    return similarities


@contextmanager
def _hooks(
    model: nn.Module, similarities: Mapping[str, FeatureMapSimilarity], names: Mapping[str, str]
) -> Iterator[None]:
    named = model.named_parameters(remove_duplicate=False)  # a parameter may be registered under several names
    known = [(weight, names.get(name, name)) for name, weight in named]
    weights = {id(weight): similarities[name] for weight, name in known if name in similarities}
    handles = []
    for layer in model.modules():
        found = weights.get(id(layer.weight)) if is_convolution(layer) else None
        if found is not None:
            handles.append(layer.register_forward_hook(_hook(found), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_written() -> AbstractContextManager[Any]:
    """Run what torch.compile has compiled as it was written: compiled code does not call hooks that came after it.

    Only where its machinery is loaded: loading it takes seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _hook(similarity: FeatureMapSimilarity) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def collect(layer: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
        similarity.calls += 1
        maps = output if layer.bias is None else _without_bias(layer, inputs, options)
        if maps.ndim < layer.weight.ndim:  # a single image without an axis for the batch
            maps = maps.unsqueeze(0)
        for chunk in maps.split(similarity.chunk(*maps.shape[1:])):
            similarity.update(chunk)

    return collect


def _without_bias(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Convolve again: subtracting the bias would leave rounding in maps that are small beside it."""
    bias: Any = layer.bias
    layer.bias = None  # type: ignore[assignment]
    try:
        maps: Tensor = layer.forward(*inputs, **options)
        return maps
    finally:
        layer.bias = bias


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
