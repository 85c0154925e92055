"""Image data sets, resident in memory as uint8 and normalised where they are used: no worker processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("cifar10", "cifar100", "digits", "folder:PATH")

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # what networks for photographs are usually trained with
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

_CIFAR = {  # the class of torchvision, mean and standard deviation of the training images
    "cifar10": ("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


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


def load_dataset(
    name: str,
    data_dir: Path,
    side: int = 32,
    mean: Channels | None = None,
    std: Channels | None = None,
    *,
    test_only: bool = False,
) -> Dataset:
    """Read a data set by its name.

    name: `cifar10` or `cifar100`, downloaded through torchvision when it is not in `data_dir`; `digits`, which needs no
    file; or `folder:PATH`, a folder of images per class, in PATH/train and PATH/val (or test) or else with every fifth
    image for testing, side × side pixels cut from the middle, either split in one fixed shuffled order, so that its
    first images are of all classes. mean, std: instead of the data set's own. test_only: leave a folder's training
    images undecoded and that split empty. Raises InputError for an unknown name, and where data cannot be had: it says
    which file to get and where to put it.
    """
    if name in _CIFAR:
        found = _cifar(name, data_dir)
    elif name == "digits":
        found = _digits()
    elif name.startswith("folder:"):
        found = _folder(Path(name.removeprefix("folder:")), side, test_only)
    else:
        raise InputError(f"unknown data set {name!r}: {did_you_mean(name, NAMES)}")
    return replace(found, mean=mean or found.mean, std=std or found.std)


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


def load_images(
    folder: Path, samples: int, side: int, mean: Channels | None = None, std: Channels | None = None
) -> Tensor:
    """Return images of a folder and those in it, evenly picked: float32 `[samples, 3, side, side]`, normalised.

    mean, std: ImageNet's unless given. Raises InputError for a folder without images and for one that cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    count = min(samples, len(files))
    images = torch.stack([_decode(files[i * len(files) // count], side) for i in range(count)])
    split = Split(images, torch.zeros(count, dtype=torch.long))
    return Dataset(str(folder), split, split, 1, mean or IMAGENET_MEAN, std or IMAGENET_STD).normalise(images)


def _cifar(name: str, data_dir: Path) -> Dataset:
    from torchvision import datasets

    kind, classes, mean, std = _CIFAR[name]
    source = getattr(datasets, kind)
    folder = data_dir / source.base_folder
    try:
        splits = [source(data_dir, train=train, download=not folder.is_dir()) for train in (True, False)]
    except (URLError, OSError, RuntimeError) as error:
        if folder.is_dir():
            raise InputError(
                f"{kind} in {folder} is damaged or incomplete; remove that folder, and it is fetched anew, "
                "or name the parent of a whole one with --data-dir"
            ) from error
        raise InputError(
            f"{kind} in {folder} is not there and cannot be downloaded ({str(error).rstrip('.')}); "
            f"put the unpacked {source.url} there or name its parent with --data-dir; "
            "--dataset digits needs no download"
        ) from error
    train, test = (Split(torch.from_numpy(s.data).contiguous(), torch.tensor(s.targets)) for s in splits)
    return Dataset(name, train, test, classes, mean, std)


def _folder(path: Path, side: int, test_only: bool) -> Dataset:
    """ImageFolder's layout, decoded once."""
    train = path / "train" if (path / "train").is_dir() else path
    test = next((path / name for name in ("val", "test", "valid") if (path / name).is_dir() and train != path), None)
    classes, files = _labelled_files(train)
    if test is not None:
        named, held_out = _labelled_files(test)
        if named != classes:
            raise InputError(f"{test}: its classes ({', '.join(named[:3])}, …) are not those of {train}")
    else:
        files, held_out = [file for number, file in enumerate(files) if number % 5], files[::5]
    splits = (_decoded_split([] if test_only else files, side), _decoded_split(held_out, side))
    return Dataset(f"folder:{path}", *splits, len(classes), IMAGENET_MEAN, IMAGENET_STD)


def _labelled_files(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """The classes of a folder, and its image files class by class, each with its label."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(path))
    except (FileNotFoundError, OSError) as error:
        raise InputError(f"{path}: expected a folder of images for each class ({error})") from error
    return found.classes, found.samples


def _decoded_split(files: list[tuple[str, int]], side: int) -> Split:
    """Decode files in a fixed shuffled order: the first of them are then of all classes, however few are taken."""
    images = torch.empty(len(files), side, side, 3, dtype=torch.uint8)
    labels = torch.empty(len(files), dtype=torch.long)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    for place, (file, label) in enumerate(files[number] for number in order):
        images[place], labels[place] = _decode(Path(file), side), label
    return Split(images, labels)


def _decode(path: Path, side: int) -> Tensor:
    """An image file as uint8 `[side, side, 3]`: its shorter side brought to that length, the middle kept."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(_in_8_bits(image).convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from error
    return torch.from_numpy(numpy.array(fitted))


def _in_8_bits(image: Image) -> Image:
    """A 16-bit grey image in 8 bits; any other as it is. PIL's own conversion takes all above 255 for white."""
    import numpy
    from PIL.Image import fromarray

    if not image.mode.startswith("I"):
        return image
    return fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype(numpy.uint8))


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
