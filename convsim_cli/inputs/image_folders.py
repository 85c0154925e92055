"""Folders of image files: a labeled data set, or inputs to measure with."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convsim_cli.errors import InputError
from convsim_cli.inputs.folder_layout import IMAGE_SUFFIXES, Labeled, find_splits, is_hidden
from convsim_cli.inputs.images import Channels, Dataset, Split

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # most networks for photographs were trained with these
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


def load_images(
    folder: Path, samples: int, side: int, mean: Channels | None = None, std: Channels | None = None
) -> Tensor:
    """Return images from a folder and its subfolders, evenly spaced by name: float32 `[samples, 3, side, side]`.

    mean, std: normalize by these, ImageNet's if None. Raises InputError for a folder without images, and for an image
    that cannot be read.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(path for path in found if not is_hidden(path.relative_to(folder)))
    if not files:
        raise InputError(f"{folder}: contains no images ({', '.join(IMAGE_SUFFIXES)})")
    count = min(samples, len(files))
    images = torch.stack([_decode(files[i * len(files) // count], side) for i in range(count)])
    split = Split(images, torch.zeros(count, dtype=torch.long))
    return Dataset(str(folder), split, split, 1, mean or IMAGENET_MEAN, std or IMAGENET_STD).normalize(images)


def load_folder(path: Path, side: int, test_only: bool) -> Dataset:
    """Decode a folder of labeled images. See `datasets.load_dataset`."""
    classes, train, test = find_splits(path)
    splits = (_decoded_split([] if test_only else train, side), _decoded_split(test, side))
    return Dataset(f"folder:{path}", *splits, len(classes), IMAGENET_MEAN, IMAGENET_STD, tuple(classes))


def folder_digest(path: Path) -> str:
    """Return what identifies a folder of labeled images, independent of its path: SHA-256 of relative names and sizes.

    Raises InputError as `load_folder`; no image is decoded.
    """
    _, train, test = find_splits(path)
    files = sorted((Path(file).relative_to(path).as_posix(), Path(file).stat().st_size) for file, _ in train + test)
    return sha256(repr(files).encode()).hexdigest()


def _decoded_split(files: Labeled, side: int) -> Split:
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
