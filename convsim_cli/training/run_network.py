"""A run's network, and the checks that it can be trained on the run's data, before a folder is created."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.formats import open_checkpoint
from convsim_cli.errors import InputError
from convsim_cli.inputs.images import Dataset
from convsim_cli.networks.names import build_network, warn_of_random_weights
from convsim_cli.networks.weights import load_weights
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.run_data import used_images


def build_with_weights(arguments: Arguments, classes: int) -> nn.Module:
    """Return the network of a run before training: fresh, pretrained, or with the tensors of its `weights` file.

    Raises InputError and DownloadError.
    """
    model = build_network(arguments.arch, classes, arguments.seed, arguments.pretrained)
    if arguments.weights:
        checkpoint = open_checkpoint(Path(arguments.weights))
        load_weights(model, checkpoint, arguments.arch)
        for line in checkpoint.notes:
            warnings.warn(line, stacklevel=2)
    return model


def check_network(arguments: Arguments, dataset: Dataset) -> None:
    """Raise InputError for a network, or weights, that a run on this data set cannot use."""
    model = build_with_weights(arguments, dataset.classes)
    if not (arguments.pretrained or arguments.weights):
        warn_of_random_weights(arguments.arch)
    try:
        ConvSimPenalty(model)
    except InputError as error:
        raise InputError(f"`arch` {arguments.arch}: {error}") from error
    data = used_images(arguments, dataset)
    _check_logits(model, data, arguments)
    _check_small_batches(model, data, arguments)


def _check_logits(model: nn.Module, dataset: Dataset, arguments: Arguments) -> None:
    images = dataset.normalize(dataset.test.images[:1])
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # a network may raise anything
        raise InputError(
            f"`arch` {arguments.arch}: does not run on images {list(images.shape)} of {arguments.dataset} "
            f"({' '.join(str(error).split())[:160]})"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < dataset.classes:
        output = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"`arch` {arguments.arch}: returns {output} for one image, expected [1, {dataset.classes}] logits, "
            f"one for each class of {arguments.dataset}"
        )


def _check_small_batches(model: nn.Module, dataset: Dataset, arguments: Arguments) -> None:
    """Batch normalization may refuse a batch of one image: the last one in training, or one in evaluation."""
    last = len(dataset.train) % arguments.batch_size or arguments.batch_size
    in_training = last // arguments.processes <= 1
    evaluated = {"test": dataset.test, "validation": dataset.validation}
    alone = [name for name, split in evaluated.items() if split and len(split) // arguments.processes <= 1]
    in_evaluation = alone if arguments.bn_statistics == "batch" else []
    if not in_training and not in_evaluation:
        return
    try:
        with torch.no_grad():
            model.train()(dataset.normalize(dataset.train.images[:1]))
    except ValueError as error:
        cause = f"`batch_size` {arguments.batch_size}: the last batch of {len(dataset.train)} training images"
        if not in_training:
            cause = f"`bn_statistics` batch: the {alone[0]} set of {len(evaluated[alone[0]] or [])} images"
        raise InputError(
            f"{cause} leaves one image for a process, of which {arguments.arch} cannot normalize a batch ({error})"
        ) from error
