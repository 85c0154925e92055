"""Which training images are taken together: in the steps of an epoch, and to re-estimate batch-norm statistics."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from convsim_cli.inputs.images import Split

STATISTICS_IMAGES = 4096  # training images that batch-norm statistics are re-estimated on
_MOST_IMAGES, _MOST_PIXELS = 512, 64 * 224 * 224  # of one such batch


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return an order that only seed and epoch decide, so that a resumed run draws the same batches."""
    return torch.randperm(count, generator=generator(seed, epoch, "order"))


def generator(seed: int, epoch: int, purpose: Literal["order", "augmentation"]) -> torch.Generator:
    """Return a source of random numbers that depends on nothing else."""
    offset = {"order": 0, "augmentation": 500_000}[purpose]  # beyond the epochs of a run, within those of its seed
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch + offset)


def statistics_batches(split: Split, seed: int, processes: int = 1) -> tuple[Tensor, ...]:
    """Return the indices of the images that statistics are re-estimated on, in equal batches: the first of epoch 0.

    They are the same at every epoch, so that the statistics depend on the weights alone. Each process gets as many
    batches as the others: synchronized layers wait for each other. If the images cannot be divided so, the last few
    are left out.
    """
    indices = permutation(len(split), seed, 0)[:STATISTICS_IMAGES]
    if len(indices) < processes:
        return processes * (indices,)
    height, width = split.images.shape[1:3]
    most = max(1, min(_MOST_IMAGES, _MOST_PIXELS // (height * width)))
    fewest = min(math.ceil(len(indices) / (most * processes)), len(indices) // processes)
    rounds = min(range(fewest, 2 * fewest), key=lambda rounds: len(indices) % (rounds * processes))
    count = rounds * processes
    size = len(indices) // count
    return indices[: count * size].split(size)
