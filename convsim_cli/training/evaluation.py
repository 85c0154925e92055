"""Test loss and accuracy during training. Each process evaluates its share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.networks.accuracy import evaluation_totals
from convsim_cli.training.processes import ALONE, Processes


def evaluate_together(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """Return what `networks.accuracy.evaluate` returns. All processes of a run must call this."""
    share = Split(processes.share(split.images), processes.share(split.labels))
    totals = evaluation_totals(model, dataset, share, device, forward)
    loss, correct = processes.sum(totals).tolist()
    return loss / len(split), 100 * correct / len(split)
