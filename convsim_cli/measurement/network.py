"""Run a network on images and measure every convolution's real feature maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.kernels import Kernel, Patterns, module_kernels, warn_of_unsupported, weight_of
from convsim_cli.machine.eager import as_written
from convsim_cli.machine.effective_weight import effective_weight
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.batch_norm import evaluation_mode
from convsim_cli.measurement.figures import Record, make_record
from convsim_cli.measurement.inference_statistics import INPUTS, choose_statistics, input_statistics
from convsim_cli.measurement.kernel_figures import describe
from convsim_cli.measurement.layer import Layer, LayerMaps
from convsim_cli.measurement.layer_hooks import layers_of, observed
from convsim_cli.measurement.mean_cosines import THRESHOLD

PIXELS = "pixel_values"  # the images of a batch that is a dictionary


def measure(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threshold: float = THRESHOLD,
    bn_statistics: str = "auto",
    seed: int = 0,
) -> list[Record]:
    """Return a record per convolution of a network, its feature maps taken from running the images through it.

    images: one batch `[B, C, …]`, or an iterable of batches, such as a loader: images, `(images, labels)` or
    `{"pixel_values": images}`; they are moved to the model's device. include, exclude: globs over the names of weights
    (`layer1.*`). threshold: mean cosine, in (0, 1], above which two filters are duplicates. bn_statistics: `stored`
    batch-norm statistics, those of the `inputs`, or `auto`: of the inputs where the stored ones do not belong to the
    kernels, as in a fresh network; the model keeps its own in any case. seed: of the random kernels that chance is
    measured with.

    The model is run in evaluation mode, without autocast or TF32, and left as it was. A layer that is never called has
    null feature-map figures; warns of layers that are left out. Raises InputError for a kernel with NaN or Inf, a
    pattern that matches nothing, or images of another form. Keys of a record: `measurement.figures.FIGURES`.

    >>> from torch import nn
    >>> record = measure(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 32, 32))[0]
    >>> record["name"], record["shape"], record["dead"]
    ('0.weight', [8, 3, 3, 3], 0)
    """
    selection = module_kernels(model, Patterns(include, exclude), parametrized=True)
    warn_of_unsupported(selection)
    chosen = choose_statistics(model, bn_statistics)
    batches = Batches(model, images, twice=chosen == INPUTS)
    seen = feature_maps(model, selection.kernels, batches, bn_statistics=chosen, seed=seed)
    with evaluation_mode(model):  # reading a spectral-normalized weight then leaves its state as it is
        weights = [weight_of(model, kernel).detach() for kernel in selection.kernels]
    return [
        describe(kernel) | make_record(Layer(kernel, weight, seen[kernel.name], threshold))
        for kernel, weight in zip(selection.kernels, weights, strict=True)
    ]


def fm_cos_by_layer(model: nn.Module, images: Tensor, kernels_changed: bool = False) -> dict[str, float | None]:
    """Return `fm_cos` of every convolution on one batch, on the model's device: a fraction of the cost of `measure`.

    kernels_changed: whether the kernels were changed after the batch-norm statistics were stored.
    """
    kernels = module_kernels(model, parametrized=True).kernels
    statistics = choose_statistics(model, kernels_changed=kernels_changed)
    seen = feature_maps(model, kernels, [images], bn_statistics=statistics, whole=False)
    return {name: layer.similarity.fm_cos for name, layer in seen.items()}


class Batches:
    """The images of batches of any form, moved to a model's device. Raises InputError for another form, or none."""

    def __init__(self, model: nn.Module, images: Tensor | Iterable[Any], twice: bool = False) -> None:
        """twice: keep what can be iterated once only."""
        one_shot = isinstance(images, Iterator)
        self._batches = [images] if isinstance(images, Tensor) else list(images) if twice and one_shot else images
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def __iter__(self) -> Iterator[Tensor]:
        number = 0
        for number, batch in enumerate(self._batches, 1):
            yield _images(batch, number).to(self._device)
        if not number:
            raise InputError("expected at least one batch of images, got none")


def _images(batch: Any, number: int) -> Tensor:
    images = batch
    if isinstance(batch, Mapping):
        if PIXELS not in batch:
            raise InputError(f"batch {number}: a dictionary with {', '.join(map(str, batch))}; expected {PIXELS!r}")
        images = batch[PIXELS]
    elif isinstance(batch, list | tuple) and batch:
        images = batch[0]
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"batch {number}: got {found}; expected floating images [B, C, …], (images, labels) "
            f"or a dictionary with {PIXELS!r}"
        )
    return images


def feature_maps(
    model: nn.Module,
    kernels: Iterable[Kernel],
    batches: Iterable[Tensor],
    names: Mapping[str, str] | None = None,
    *,
    bn_statistics: str | None = None,
    seed: int = 0,
    whole: bool = True,
) -> dict[str, LayerMaps]:
    """Run batches through a network and return what is seen of the maps of each kernel's layer, by the kernel's name.

    batches: on the model's device. names: the model's name of a tensor → the kernel's, where they differ.
    bn_statistics: `inputs` to re-estimate batch-norm statistics on the batches first, which are then taken twice.
    whole: measure chance and keep pairs. The network runs in evaluation mode and keeps its mode and statistics. One
    layer's maps are held at a time.
    """
    statistics = input_statistics(model, batches) if bn_statistics == INPUTS else nullcontext()
    with statistics, evaluation_mode(model), as_written(), torch.no_grad():
        seen: dict[str, LayerMaps] = {}
        with ExitStack() as hooked:
            for kernel, layer in layers_of(model, kernels, names or {}):
                if kernel.name not in seen:
                    seen[kernel.name] = LayerMaps(kernel, _weight(layer), seed=seed, whole=whole)
                hooked.enter_context(observed(layer, kernel, seen[kernel.name]))
            for images in batches:
                with full_precision(images.device):
                    model(images)
    return seen


def _weight(layer: nn.Module) -> Tensor:
    weight = effective_weight(layer)
    assert weight is not None  # a layer without one is not selected
    return weight.detach()
