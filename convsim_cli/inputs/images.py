"""Images in memory, as uint8, and normalized where they are used: no worker processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite

import torch
from torch import Tensor

from convsim_cli.errors import InputError

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Split:
    """Images `[n, height, width, 3]` as uint8, channels last, with labels `[n]` as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def first(self, count: int | None) -> Split:
        """Return the first `count` images, all of them for None. Raises InputError for fewer than one."""
        if count is not None and count < 1:
            raise InputError(f"expected at least one image, got a limit of {count}")
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set, and the mean and standard deviation per channel to normalize by (the full range is 0 to 1)."""

    name: str
    train: Split
    test: Split
    classes: int
    mean: Channels
    std: Channels

    def limited(self, train: int | None, test: int | None) -> Dataset:
        """Return the first images of either split."""
        return replace(self, train=self.train.first(train), test=self.test.first(test))

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images `[B, height, width, 3]` as float32 `[B, 3, height, width]`, channels_last in memory."""
        scale, shift = _scale_and_shift(self.mean, self.std, images.device)
        return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: making them for every batch would wait for it."""
    with torch.inference_mode(False):
        mean_, std_ = torch.tensor(mean), torch.tensor(std)
        return (1 / (255 * std_)).to(device), (-mean_ / std_).to(device)


def parse_channels(option: str, text: str | None) -> Channels | None:
    """Return what --mean or --std lists. Raises InputError unless it is three finite numbers, of a --std above 0."""
    if text is None:
        return None
    try:
        red, green, blue = (float(item) for item in text.replace(",", " ").split())
    except ValueError:
        raise InputError(f"{option} {text!r}: expected three numbers, for instance 0.485,0.456,0.406") from None
    if not all(map(isfinite, (red, green, blue))):
        raise InputError(f"{option} {text!r}: expected finite numbers")
    if option == "--std" and min(red, green, blue) <= 0:
        raise InputError(f"{option} {text!r}: expected numbers above 0")
    return red, green, blue
