"""Folders of image files: a labelled data set, or inputs to measure with."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convsim_cli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
from convsim_cli.inputs.images import Channels, Dataset, Split

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # most networks for photographs were trained with these
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def load_images(
    folder: Path, samples: int, side: int, mean: Channels | None = None, std: Channels | None = None
) -> Tensor:
    """Return images from a folder and its subfolders, evenly spaced by name: float32 `[samples, 3, side, side]`.

    mean, std: normalize by these, ImageNet's if None. Raises InputError for a folder without images, and for an image
    that cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{folder}: contains no images ({', '.join(IMAGE_SUFFIXES)})")
    count = min(samples, len(files))
    images = torch.stack([_decode(files[i * len(files) // count], side) for i in range(count)])
    split = Split(images, torch.zeros(count, dtype=torch.long))
    return Dataset(str(folder), split, split, 1, mean or IMAGENET_MEAN, std or IMAGENET_STD).normalize(images)


def load_folder(path: Path, side: int, test_only: bool) -> Dataset:
    """Decode a folder in the layout of torchvision's ImageFolder. See `datasets.load_dataset`."""
    classes, train, test = _splits(path)
    splits = (_decoded_split([] if test_only else train, side), _decoded_split(test, side))
    return Dataset(f"folder:{path}", *splits, len(classes), IMAGENET_MEAN, IMAGENET_STD)


def folder_digest(path: Path) -> str:
    """Return what identifies a folder of labelled images, independent of its path: SHA-256 of relative names and sizes.

    Raises InputError as `load_folder`; no image is decoded.
    """
    _, train, test = _splits(path)
    files = sorted((Path(file).relative_to(path).as_posix(), Path(file).stat().st_size) for file, _ in train + test)
    return sha256(repr(files).encode()).hexdigest()


Labelled = list[tuple[str, int]]  # image files, each with the number of its class


def _splits(path: Path) -> tuple[list[str], Labelled, Labelled]:
    """The classes of a data set, its training files and its test files, class by class."""
    train = path / "train" if (path / "train").is_dir() else path
    test = next((path / name for name in ("val", "test", "valid") if (path / name).is_dir() and train != path), None)
    classes, files = _labelled_files(train)
    if test is None:
        return classes, [file for number, file in enumerate(files) if number % 5], files[::5]
    named, held_out = _labelled_files(test)
    if named != classes:
        raise InputError(f"{test}: its classes ({', '.join(named[:3])}, …) are not those of {train}")
    return classes, files, held_out


def _labelled_files(path: Path) -> tuple[list[str], Labelled]:
    """The classes of a folder, and its image files, class by class."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(path))
    except (FileNotFoundError, OSError) as error:
        raise InputError(f"{path}: expected a folder of images for each class ({error})") from error
    return found.classes, found.samples


def _decoded_split(files: Labelled, side: int) -> Split:
    """Decode files in a fixed shuffled order, so that the first images are from all classes."""
    images = torch.empty(len(files), side, side, 3, dtype=torch.uint8)
    labels = torch.empty(len(files), dtype=torch.long)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    for place, (file, label) in enumerate(files[number] for number in order):
        images[place], labels[place] = _decode(Path(file), side), label
    return Split(images, labels)


def _decode(path: Path, side: int) -> Tensor:
    """An image file as uint8 `[side, side, 3]`: resized to the shorter side, then center-cropped."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(_in_8_bits(image).convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from error
    return torch.from_numpy(numpy.array(fitted))


def _in_8_bits(image: Image) -> Image:
    """A 16-bit gray image in 8 bits, any other unchanged. PIL's own conversion turns everything above 255 white."""
    import numpy
    from PIL.Image import fromarray

    if not image.mode.startswith("I"):
        return image
    return fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype(numpy.uint8))
