"""The kernels of one layer: how they are stored, how their filters pair, and which filters are alive."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from convsim_cli.similarity import Taps, to_filters, to_weight

FLOATING = ("float16", "bfloat16", "float32", "float64")  # the types that kernels are optimized in, or through
VANISHED = 1e-6  # a filter whose norm is below this share of the largest norm in its layer is dead


@dataclass(frozen=True)
class Kernel:
    """A layer's kernels: the tensor's name and shape as stored, and how its filters pair.

    shape: `[S, C, *taps]`, or `[C_in, C_out / groups, *taps]` when `transposed`. `assumed`: guessed from the shape
    alone.
    """

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    assumed: bool = False

    @property
    def filters(self) -> int:
        """Number of output channels S."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def channels(self) -> int:
        """Number of input channels that the layer takes, over all groups."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def taps(self) -> Taps:
        return self.shape[2:]

    @property
    def pairs(self) -> int:
        """Number of pairs i < j, within groups."""
        each = self.filters // self.groups
        return self.groups * each * (each - 1) // 2

    @property
    def pointwise(self) -> bool:
        """Whether a filter has a single tap per channel (1×1): L_CS is then pure norm."""
        return prod(self.taps) == 1

    def to_convolution(self, weight: Tensor) -> Tensor:
        """Return the stored weight as `[S, C, *taps]`: the first two axes of a transposed one swapped per group."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def to_filters(self, weight: Tensor) -> Tensor:
        """Return the stored weight as `[groups, S / groups, N, C]`, float32 or float64 (`similarity.to_filters`)."""
        return to_filters(self.to_convolution(weight), self.groups)[0]

    def to_stored(self, filters: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `to_filters`: a contiguous weight of the stored shape, in `dtype`."""
        return self.view_as_stored(filters).to(dtype).contiguous()

    def view_as_stored(self, filters: Tensor) -> Tensor:
        """Undo `to_filters` without a copy: filters in the stored shape, with strides of their own."""
        weight = to_weight(filters, self.taps)
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


def living_filters(filters: Tensor) -> Tensor:
    """Return which filters of a layer are alive: True where the L2 norm is at least 1e-6 of the largest in the layer.

    filters: `[groups, S / groups, N, C]`, finite (`Kernel.to_filters`); the result is `[groups, S / groups]`. Zero
    filters are dead. Weight decay leaves filters at 1e-25 of their layer, whose squares vanish in float32: norms are
    taken in float64.
    """
    found = filters.cpu() if filters.device.type == "mps" else filters  # mps has no float64
    norms = torch.linalg.vector_norm(found, dim=(-2, -1), dtype=torch.float64)
    return ((norms > 0) & (norms >= VANISHED * norms.max())).to(filters.device)
