"""Image data sets by name.

Folders of image files: a labeled data set, or inputs to measure with.

Where the classes and the splits of a folder of labeled images are.

PATH/train and PATH/val hold a folder of images per class, or PATH itself does. Anything else is refused: what stands in
the wrong place would be trained on without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import torch
from torch import Tensor

from convsim_cli.errors import InputError, did_you_mean, one_of
from convsim_cli.inputs.images import Channels, Dataset, Split

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("cifar10", "cifar100", "digits", "folder:PATH")
_CIFAR = {  # the class of torchvision, mean and standard deviation of the training images
    "cifar10": ("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


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

    name: `cifar10` or `cifar100`, downloaded through torchvision if not in `data_dir`; `digits`, which needs no file;
    or `folder:PATH` with one folder of images per class, in PATH/train (or training) and PATH/val (or valid,
    validation, test, testing), or in PATH itself, where every fifth image is then for testing. Images of a folder are
    resized and center-cropped to side × side pixels; each split is in a fixed shuffled order, so that its first images
    are from all classes.
    mean, std: normalize by these instead of the data set's own. test_only: do not decode the training images of a
    folder. Raises InputError for an unknown name, and for data that is missing and cannot be downloaded: it says which
    file to get and where to put it.
    """
    if name in _CIFAR:
        found = _cifar(name, data_dir)
    elif name == "digits":
        found = _digits()
    elif name.startswith("folder:"):
        found = load_folder(Path(name.removeprefix("folder:")), side, test_only)
    else:
        raise InputError(f"unknown data set {name!r}: {did_you_mean(name, NAMES)}")
    return replace(found, mean=mean or found.mean, std=std or found.std)


def _cifar(name: str, data_dir: Path) -> Dataset:
    from torchvision import datasets

    kind, classes, mean, std = _CIFAR[name]
    source = getattr(datasets, kind)
    folder = data_dir / source.base_folder
    _refuse_inside(data_dir, source)
    try:
        with _removed_if_empty(data_dir):
            splits = [source(data_dir, train=train, download=not folder.is_dir()) for train in (True, False)]
    except (URLError, OSError, RuntimeError) as error:
        if folder.is_dir():
            raise InputError(
                f"{kind} in {folder} is damaged or incomplete; remove that folder to download it again, "
                "or name the parent of an intact one with `data_dir`"
            ) from error
        raise InputError(
            f"{kind} is not in {folder} and cannot be downloaded ({str(error).rstrip('.')}); "
            f"unpack {source.url} there, or name its parent with `data_dir`; the data set digits needs no download"
        ) from error
    train, test = (Split(torch.from_numpy(s.data).contiguous(), torch.tensor(s.targets)) for s in splits)
    return Dataset(name, train, test, classes, mean, std, tuple(splits[0].classes))


def _refuse_inside(data_dir: Path, source: Any) -> None:
    """Raise InputError for the folder of a data set's files, or one of these, in place of the folder that holds it."""
    from torchvision.datasets import CIFAR10, CIFAR100

    if (data_dir / source.base_folder).is_dir():
        return
    real = data_dir.resolve()
    for other in (CIFAR10, CIFAR100):
        if real.name == other.base_folder and real.is_dir():
            raise InputError(f"`data_dir` {data_dir} is the data set itself; name its parent: `data_dir` {real.parent}")
        files = {name for name, _ in other.train_list + other.test_list}
        if real.is_dir() and all((real / name).is_file() for name in files):
            raise InputError(
                f"`data_dir` {data_dir} holds the files of {other.__name__} themselves; call that folder "
                f"{other.base_folder} and name its parent: `data_dir` {real.parent}"
            )
    if real.exists() and not real.is_dir():
        raise InputError(f"`data_dir` {data_dir} is a file; name the folder that holds {source.base_folder}")


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folders that a failed download has created and left empty."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: a part of the archive
            for path in created:
                path.rmdir()
        raise


def _digits() -> Dataset:
    """The 1,797 8×8 digits of scikit-learn as 32×32 images of three equal channels; every fifth one is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the data set digits needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    gray = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)  # 0 to 16 as shipped
    images = gray.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(-1).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Dataset(
        "digits", Split(images[~test], labels[~test]), Split(images[test], labels[test]), 10, (0.305,) * 3, (0.376,) * 3
    )


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


TRAINING = ("train", "training")
TEST = ("val", "test", "valid", "validation", "testing")  # the first one that is there
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DEEPEST = 3  # folders in folders that are searched for what was meant
_NAMED = 5  # folders in an error

Labeled = list[tuple[str, int]]  # image files, each with the number of its class


def find_splits(path: Path) -> tuple[list[str], Labeled, Labeled]:
    """Return the classes of a data set, its training files and its test files, class by class.

    Without a folder for testing every fifth file is for that. Hidden folders and files are ignored. Raises InputError
    for a folder of another layout, with the path to use where there is one.
    """
    training, test = (_named(path, names) for names in (TRAINING, TEST))
    _refuse_splits_as_classes(training or path)
    classes, files = _labeled_files(training or path)
    if training is None or test is None:
        return classes, [file for number, file in enumerate(files) if number % 5], files[::5]
    named, held_out = _labeled_files(test)
    if named != classes:
        raise InputError(f"{test}: its classes ({_some(named)}) are not those of {training} ({_some(classes)})")
    return classes, files, held_out


def is_hidden(path: Path) -> bool:
    """Return whether a relative path leads through what a system or an editor keeps for itself."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _named(path: Path, names: Sequence[str]) -> Path | None:
    """The folder with the first of these names, in small or capital letters."""
    folders = {folder.lower(): folder for folder in _folders(path)}
    return next((path / folders[name] for name in names if name in folders), None)


def _refuse_splits_as_classes(path: Path) -> None:
    if _named(path, TRAINING):
        raise InputError(f"{path}: holds splits in place of classes; name folder:{path}")
    splits = [folder for folder in _folders(path) if folder.lower() in TEST]
    if splits:
        raise InputError(
            f"{path}: {_some(splits)} would be a class, but is named like a split, and there is no {one_of(TRAINING)} "
            f"beside it; add that, name folder:{path / splits[0]} for these images alone, or rename it"
        )
    for folder in _folders(path):
        inner = [name for name in _folders(path / folder) if name.lower() in TRAINING + TEST]
        if inner:
            meant = _meant(path)
            way = f"name folder:{meant}" if meant else "put the folders of the classes into those of the splits"
            raise InputError(f"{path}: {folder} would be a class, but holds the splits {_some(inner)}; {way}")


def _labeled_files(path: Path) -> tuple[list[str], Labeled]:
    """The classes of a folder, and its image files, class by class, as torchvision's ImageFolder orders them."""
    classes = _folders(path)
    files = [(file, label) for label, name in enumerate(classes) for file in _images(path / name)]
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if not classes or empty:
        found = f"no images in {_some([classes[label] for label in empty])}" if classes else "found no folders"
        raise InputError(f"{path}: expected a folder of images for each class ({found})")
    if len(classes) == 1:
        meant = _meant(path)
        raise InputError(
            f"{path}: the folder {classes[0]} would be the only class; expected a folder of images for each of several "
            f"classes{f': name folder:{meant}' if meant else ''}"
        )
    return classes, files


def _meant(path: Path) -> Path | None:
    """The first folder below that holds splits, or several folders of images: what was probably meant."""
    level = [path]
    for _ in range(_DEEPEST):
        level = [folder / name for folder in level for name in _folders(folder)]
        for folder in level:
            training = _named(folder, TRAINING)
            if len([name for name in _folders(training or folder) if _holds_images((training or folder) / name)]) > 1:
                return folder
    return None


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(Path(entry.name)))
    except OSError as error:
        raise InputError(f"{path}: expected a folder of images for each class ({error.strerror})") from error


def _images(folder: Path) -> list[str]:
    return [
        f"{root}/{name}"
        for root, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(Path(root, name).relative_to(folder))
    ]


def _holds_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file() for entry in entries)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
