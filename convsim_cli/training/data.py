"""The images of a run: its data set, their order in an epoch, and the flips and crops of `augment` flip-crop.

Where a data set lies does not belong to a run's identity: a folder of images is identified by a digest. The order, the
flips and the crops depend on the seed and the epoch alone, so that a resumed run draws the same batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from convsim_cli.errors import ConvsimError, InputError
from convsim_cli.inputs.datasets import folder_digest, load_dataset
from convsim_cli.inputs.images import Dataset, Split, parse_channels
from convsim_cli.networks.architectures import usual_side
from convsim_cli.training.config import FOLDER, Arguments

STATISTICS_IMAGES = 4096  # training images that batch-norm statistics are re-estimated on
_MOST_IMAGES, _MOST_PIXELS = 512, 64 * 224 * 224  # of one such batch
PADDING = 4  # black pixels on each side, before the crop


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


def identified(arguments: Arguments) -> Arguments:
    """Return the arguments with the digest of their image folder, if they name one. Raises InputError."""
    if arguments.folder_digest or not arguments.dataset.startswith(FOLDER):
        return arguments
    return replace(arguments, folder_digest=folder_digest(Path(arguments.dataset.removeprefix(FOLDER))))


def used_images(arguments: Arguments, dataset: Dataset) -> Dataset:
    """Return the images that a run uses, its validation images set apart. Raises InputError if there are too few."""
    return dataset.limited(arguments.limit_train, arguments.limit_test).hold_out(arguments.validation)


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


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training images in an epoch, `[count]`."""
    return torch.randperm(count, generator=_generator(seed, epoch, "order"))


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


@dataclass(frozen=True)
class FlipCrop:
    """What happens to each training image in one epoch: a crop of the padded image, mirrored or not.

    mirrored: `[n]` bool. corners: `[n, 2]` int64, row and column of each crop, from 0 to 2·PADDING.
    """

    mirrored: Tensor
    corners: Tensor

    @staticmethod
    def draw(count: int, seed: int, epoch: int, device: torch.device) -> FlipCrop:
        """Draw the crops and flips of an epoch, independently for each of `count` images."""
        source = _generator(seed, epoch, "augmentation")
        mirrored = torch.rand(count, generator=source) < 0.5
        corners = torch.randint(2 * PADDING + 1, (count, 2), generator=source)
        return FlipCrop(mirrored.to(device), corners.to(device))

    def apply(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return images `[B, height, width, 3]` cropped and flipped. indices: which training images they are."""
        count, height, width, channels = images.shape
        padded = torch.nn.functional.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
        corners, columns = self.corners[indices], torch.arange(width, device=images.device)
        columns = torch.where(self.mirrored[indices, None], columns.flip(0), columns) + corners[:, 1:]
        rows = corners[:, :1] + torch.arange(height, device=images.device)
        rows += torch.arange(count, device=images.device)[:, None] * padded.shape[1]
        pixels = rows[:, :, None] * padded.shape[2] + columns[:, None, :]  # one gather is 3 times as fast as a[i, y, x]
        return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


def _generator(seed: int, epoch: int, purpose: Literal["order", "augmentation"]) -> torch.Generator:
    offset = {"order": 0, "augmentation": 500_000}[purpose]  # beyond the epochs of a run, within those of its seed
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch + offset)
