"""A finished run's `summary.json`."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import nn

from convsim_cli.inputs.images import Dataset
from convsim_cli.measurement.network import fm_cos_by_layer
from convsim_cli.networks.names import count_parameters
from convsim_cli.training.results import LAST_EPOCHS, Row, best_row
from convsim_cli.training.run_state import Log
from convsim_cli.training.trainer import Trainer

FEATURE_MAP_IMAGES = 16  # the first test images, over which `fm_cos` is taken


def feature_map_cosines(
    model: nn.Module, dataset: Dataset, device: torch.device, kernels_changed: bool = False
) -> dict[str, float | None]:
    """Return `fm_cos` per layer on the first test images.

    kernels_changed: since the batch-norm statistics were stored, so that those of the images serve instead.
    """
    images = dataset.normalize(dataset.test.images[:FEATURE_MAP_IMAGES].to(device))
    return fm_cos_by_layer(model, images, kernels_changed)


def summarize_run(trainer: Trainer, log: Log) -> dict[str, Any]:
    """Return the summary of a run: accuracies in per cent, `seconds` and `images_per_second` of its epochs.

    `classes` has the number of training and test images of each class, in the order of the network's outputs.
    """
    history: list[Row] = log["history"]
    best = best_row(history)
    seconds = sum(row["seconds"] for row in history)
    validated = {"best_validation_accuracy": best["validation_accuracy"]} if "validation_accuracy" in best else {}
    return {
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        **validated,
        "last_test_accuracy": history[-1]["test_accuracy"],
        "mean_last5_test_accuracy": mean(row["test_accuracy"] for row in history[-LAST_EPOCHS:]),
        "last_train_accuracy": history[-1]["train_accuracy"],
        "cs": history[-1]["cs"],
        "beta": trainer.beta if trainer.mode.regularizes else None,
        "fm_cos": {
            "start": log["fm_cos_start"],
            "end": feature_map_cosines(trainer.model, trainer.dataset, trainer.device),
        },
        "classes": trainer.dataset.images_of_classes(),
        "parameters": count_parameters(trainer.model),
        "epochs": len(history),
        "seconds": seconds,
        "images_per_second": len(history) * len(trainer.dataset.train) / seconds,
    }
