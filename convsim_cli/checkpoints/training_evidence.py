"""Whether a checkpoint's weights have been trained, judged by what training leaves in them."""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_cli.checkpoints.checkpoint import Checkpoint


def looks_trained(checkpoint: Checkpoint) -> bool:
    """Return whether batch normalization has seen data: a counter above zero, else a running mean not zero."""
    counters = [name for name in checkpoint.tensors if name.endswith("num_batches_tracked")]
    names = counters or [name for name in checkpoint.tensors if name.endswith("running_mean")]
    return any(_is_nonzero(checkpoint.load(name)) for name in names)


def _is_nonzero(statistic: Tensor) -> bool:
    if statistic.numel() * statistic.element_size() > statistic.untyped_storage().nbytes():
        return False  # an expanded tensor, perhaps larger than memory: no statistic
    return bool((statistic.to(torch.complex128) != 0).any())
