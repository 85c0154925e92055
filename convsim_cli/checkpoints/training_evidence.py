"""Whether a checkpoint's weights have been trained, judged by what training leaves in them."""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from convsim_cli.checkpoints.checkpoint import Checkpoint
from convsim_cli.kernels import Kernel, file_kernels, living_filters

SPREAD = 3.0  # how many times the spread of independent weights a layer's norms have to show
FEWEST = 8  # living filters that a spread is taken of
NEAR_ZERO = (
    0.35  # share of weights below a tenth of their filter's root mean square: raw Algorithm 1 leaves half or more
)


def looks_trained(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint's weights look trained.

    Batch-norm statistics decide where there are any: training leaves a counter above zero or a running mean other than
    zero. Without them the filters' norms do: their spread is `SPREAD` times that of independent weights or more, in the
    median over the layers. What `convsim init` wrote is then not taken for trained.
    """
    statistics = [name for name in checkpoint.tensors if name.endswith(("num_batches_tracked", "running_mean"))]
    if statistics:
        return any(_is_nonzero(checkpoint.load(name)) for name in statistics)
    if "convsim.layers" in checkpoint.metadata:
        return False
    kernels = file_kernels(checkpoint.tensors, unfit=checkpoint.unfit).kernels
    spreads = [
        spread for kernel in kernels if (spread := norm_spread(kernel, checkpoint.load(kernel.name))) is not None
    ]
    return bool(spreads) and median(spreads) >= SPREAD


def norm_spread(kernel: Kernel, weight: Tensor) -> float | None:
    """Return the spread of a layer's filter norms, as a multiple of what independent weights give.

    That is the coefficient of variation of the living filters' norms times √(2·C·N): near 1 for Gaussian weights, 0.63
    for uniform ones. None for fewer than `FEWEST` filters, for NaN or infinity, and where `NEAR_ZERO` or more of the
    weights are next to zero: as raw Algorithm 1 takes weights there, the norms that are left spread too.
    """
    filters = kernel.to_filters(weight)
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), dtype=torch.float64)
    if not norms.isfinite().all():
        return None
    living = living_filters(filters)
    if living.sum() < FEWEST:
        return None
    weights = filters[0, 0].numel()
    next_to_zero = (0.1 * norms / weights**0.5).to(filters.dtype)  # of this type, so that no copy is made in another
    shares = (filters.abs() < next_to_zero[..., None, None]).sum(dim=(-2, -1)) / weights
    if shares[living].mean() >= NEAR_ZERO:
        return None
    norms = norms[living]
    return (norms.std(correction=0) / norms.mean() * (2 * weights) ** 0.5).item()


def _is_nonzero(statistic: Tensor) -> bool:
    if statistic.numel() * statistic.element_size() > statistic.untyped_storage().nbytes():
        return False  # an expanded tensor, perhaps larger than memory: no statistic
    return bool((statistic.to(torch.complex128) != 0).any())
