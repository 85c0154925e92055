"""Evaluation during training: batch-norm statistics, test loss and accuracy. Each process does its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.measurement.batch_norm import batch_norm_layers, reestimate_statistics
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


def reestimate_together(
    model: nn.Module, dataset: Dataset, batches: Sequence[Tensor], processes: Processes = ALONE
) -> None:
    """Re-estimate the batch-norm statistics of a network in training mode, in place, on batches of training images.

    batches: indices, on the device: equal batches, and equally many for each process. The averages are those over all
    batches. A layer that its owner keeps in evaluation mode trains with its statistics, and keeps them. All processes
    of a run must call this.
    """
    layers = [layer for layer in batch_norm_layers(model) if layer.training]
    share = batches[processes.rank :: processes.size]
    reestimate_statistics(model, (dataset.normalize(dataset.train.images[indices]) for indices in share), layers)
    if processes.size == 1:
        return
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            assert statistic is not None  # these layers keep statistics
            processes.sum(statistic.div_(processes.size))
