"""The methods that make feature maps less similar before training, each an entry of one table.

A method minimizes an objective of the kernels (Algorithm 1), or it is a closed form: a formula that gives new kernels
at once, of a kernel alone or of the network's feature maps on images. Everything that names methods reads `METHODS`:
`init --method`, `train --method` and `--objective`, their help and completion, and the library's calls. Nothing here
imports torch, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to make feature maps less similar.

    name: what users type; meaning: a phrase for help texts, with its source.

    Without a formula, the method minimizes the objective of its name in `objectives.OBJECTIVES`: it takes iterations,
    and keeps the filters' norms if it is told to. Both formulas keep every filter's norm:

    of_kernel(kernel, weight): returns the new weight, in the stored shape and type, on its device.
    applied_to(kernel): returns the name of the closed form that a layer gets, where that depends on the layer.
    of_maps(model, kernels, images, advance): changes the kernels of a network in place, on a batch of images
    `[B, C, …]`, and returns a record of each kernel that the network calls; advance takes the layers done.
    without_means: whether it takes the means from all filters.
    """

    name: str
    meaning: str
    of_kernel: Callable[..., Any] | None = None
    applied_to: Callable[..., str] | None = None
    of_maps: Callable[..., list[dict[str, Any]]] | None = None
    without_means: bool = False

    @property
    def iterates(self) -> bool:
        """Whether it minimizes an objective: the settings of Algorithm 1 are its own."""
        return self.of_kernel is None and self.of_maps is None

    @property
    def needs_images(self) -> bool:
        """Whether it runs images through the network."""
        return self.of_maps is not None

    def warning(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """Return a warning if the network of these tensors, name → shape, may not train after this method.

        Such filters remove the mean of their input, so only a normalization layer keeps the signal at its scale. Such
        a layer has running statistics, or a weight and a bias of one axis each.
        """
        vectors = {name for name, shape in shapes.items() if len(shape) == 1}
        norms = (name.endswith(".running_mean") or {name, f"{name[:-6]}bias"} <= vectors for name in vectors)
        if not self.without_means or any(norms):
            return None
        return (
            f"`method` {self.name} subtracts the means of filters, and no layer here normalizes the maps: the "
            "signal may vanish from layer to layer, and training may fail; use dct or cs"
        )


def _closed_form(name: str) -> Callable[..., Any]:
    """Return a function of `closed_forms`, which is imported when it is called."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module("convsim_cli.closed_forms"), name)(*arguments)

    return call


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("cs", "Eq. 10 of the paper: all pairs of filters, all pairs of their channels"),
        Method("neighbours", "the authors' public code: each filter and the next, channel by channel"),
        Method("kernel", "squared inner products of all pairs of filters (section 3.1 of the paper)"),
        Method("expected", "squared inner products of feature maps on white inputs: 100 · kernel + cs"),
        Method("ocnn", "orthogonality of the convolution (Wang et al. 2020): all pairs, all lags"),
        Method("srip", "spectral norm of K Kᵀ − I, by two power iterations (Bansal et al. 2018)"),
        Method("orthoreg", "cosines of all pairs of filters, mostly similar ones (Rodríguez et al. 2017)"),
        Method(
            "orthogonal",
            "zero-mean orthogonal filters",
            of_kernel=_closed_form("orthogonalize_kernel"),
            without_means=True,
        ),
        Method(
            "dct",
            "one pattern of the discrete cosine transform per filter, orthogonal channel weights",
            of_kernel=_closed_form("dct_kernel"),
            applied_to=_closed_form("dct_method"),
        ),
        Method(
            "decorrelate",
            "feature maps that are uncorrelated on images, by ZCA-cor",
            of_maps=_closed_form("decorrelate_kernels_"),
        ),
    )
}
OBJECTIVE_NAMES = tuple(method.name for method in METHODS.values() if method.iterates)  # also of the penalty
