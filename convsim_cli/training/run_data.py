"""A run's data set. Where it lies is no part of a run's identity: a folder of images is identified by a digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from convsim_cli.errors import ConvsimError, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.image_folders import folder_digest
from convsim_cli.inputs.images import Dataset, parse_channels
from convsim_cli.networks.names import usual_side
from convsim_cli.training.arguments import FOLDER, Arguments


def identified(arguments: Arguments) -> Arguments:
    """Return the arguments with the digest of their image folder, if they name one. Raises InputError."""
    if arguments.folder_digest or not arguments.dataset.startswith(FOLDER):
        return arguments
    return replace(arguments, folder_digest=folder_digest(Path(arguments.dataset.removeprefix(FOLDER))))


def used_images(arguments: Arguments, dataset: Dataset) -> Dataset:
    """Return the part of a data set that a run uses, its validation images set apart. Raises InputError if too few."""
    return dataset.limited(arguments.limit_train, arguments.limit_test).hold_out(arguments.validation)


def load_data(arguments: Arguments) -> Dataset:
    """Return the whole data set of a run.

    Raises InputError if it cannot be read, and for an image folder with other images than those of the run.
    """
    side = arguments.image_size or usual_side(arguments.arch)
    mean, std = parse_channels("mean", arguments.mean), parse_channels("std", arguments.std)
    found = identified(replace(arguments, folder_digest=None)).folder_digest
    if arguments.folder_digest not in (None, found):
        raise InputError(
            f"{arguments.dataset}: names or sizes of its images differ from those that the run began with; "
            "name a folder with the same images"
        )
    return load_dataset(arguments.dataset, Path(arguments.data_dir), side, mean, std)


def resident(dataset: Dataset, device: torch.device) -> Dataset:
    """Return the data set with all of its images on a device. Raises ConvsimError where they do not fit."""
    try:
        return dataset.to(device)
    except torch.cuda.OutOfMemoryError as error:
        images = (dataset.train.images, dataset.test.images)
        count, size = sum(map(len, images)), sum(split.nbytes for split in images)
        height, width = images[0].shape[1:3]
        raise ConvsimError(
            f"the {count:,} images of {dataset.name} ({height}×{width}, {size / 1e9:.3g} GB) do not fit into the "
            f"memory of {device}, where training keeps them; lower `limit_train` or `image_size`, or choose another "
            "`device`"
        ) from error
