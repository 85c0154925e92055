"""Random flips and crops of training images, made on the device. Seed, epoch and image alone decide them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convsim_cli.training.batches import generator

PADDING = 4  # black pixels on each side, before the crop


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
        source = generator(seed, epoch, "augmentation")
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
        pixels = (
            rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        )  # one gather: three times as fast as a[i, y, x]
        return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)
