"""Folders of image files: as a labelled data set, or as inputs to measure with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convsim_cli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
from convsim_cli.inputs.images import Channels, Dataset, Split

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # what networks for photographs are usually trained with
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def load_images(
    folder: Path, samples: int, side: int, mean: Channels | None = None, std: Channels | None = None
) -> Tensor:
    """Return images of a folder and those in it, evenly picked: float32 `[samples, 3, side, side]`, normalized.

    mean, std: ImageNet's unless given. Raises InputError for a folder without images and for one that cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    count = min(samples, len(files))
    images = torch.stack([_decode(files[i * len(files) // count], side) for i in range(count)])
    split = Split(images, torch.zeros(count, dtype=torch.long))
    return Dataset(str(folder), split, split, 1, mean or IMAGENET_MEAN, std or IMAGENET_STD).normalize(images)


def load_folder(path: Path, side: int, test_only: bool) -> Dataset:
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
    """A 16-bit gray image in 8 bits; any other as it is. PIL's own conversion takes all above 255 for white."""
    import numpy
    from PIL.Image import fromarray

    if not image.mode.startswith("I"):
        return image
    return fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype(numpy.uint8))
