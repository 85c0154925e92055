"""Image data sets, resident in memory as uint8 and normalised where they are used: no worker processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean

NAMES = ("cifar10", "digits")

Channels = tuple[float, float, float]

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


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
    """A data set, and the mean and standard deviation per channel to normalise by (the full range is 0 to 1)."""

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

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images `[B, height, width, 3]` as float32 `[B, 3, height, width]`, channels_last in memory."""
        scale, shift = _scale_and_shift(self.mean, self.std, images.device)
        return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: making them for every batch would wait for it."""
    with torch.inference_mode(False):
        mean_, std_ = torch.tensor(mean), torch.tensor(std)
        return (1 / (255 * std_)).to(device), (-mean_ / std_).to(device)


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Read a data set by its name.

    name: `cifar10`, downloaded through torchvision when it is not in `data_dir`, or `digits`, which needs no file.
    Raises InputError for an unknown name, and where data cannot be had: it says which file to get and where to put it.
    """
    if name == "cifar10":
        return _cifar10(data_dir)
    if name == "digits":
        return _digits()
    raise InputError(f"unknown data set {name!r}: {did_you_mean(name, NAMES)}")


def _cifar10(data_dir: Path) -> Dataset:
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    try:
        splits = [CIFAR10(data_dir, train=train, download=not folder.is_dir()) for train in (True, False)]
    except (URLError, OSError, RuntimeError) as error:
        found = "is damaged or incomplete" if folder.is_dir() else f"is not there and cannot be downloaded ({error})"
        raise InputError(
            f"CIFAR-10 in {folder} {found}; put the unpacked {_CIFAR10_URL} there or name its parent with --data-dir; "
            "--dataset digits needs no download"
        ) from error
    train, test = (Split(torch.from_numpy(s.data).contiguous(), torch.tensor(s.targets)) for s in splits)
    return Dataset("cifar10", train, test, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _digits() -> Dataset:
    """The 1,797 8×8 digits of scikit-learn as 32×32 images of three equal channels; every fifth one is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("--dataset digits needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)  # 0 to 16 as shipped
    images = grey.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(-1).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Dataset(
        "digits", Split(images[~test], labels[~test]), Split(images[test], labels[test]), 10, (0.305,) * 3, (0.376,) * 3
    )
