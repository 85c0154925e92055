"""Image datasets by name, and folders of image files: labeled, or inputs to measure with.

A labeled folder holds a folder of images per class, in PATH/train and PATH/val or in PATH itself. Any other layout is
refused: images in the wrong place would be trained on with wrong labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import torch
from torch import Tensor

from convsim_cli.errors import InputError, brief, did_you_mean, one_of, open_regular, some_of, to_install, wait_for_lock
from convsim_cli.inputs.images import Channels, Dataset, Split

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # most networks for photographs were trained with these
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
TRAINING = ("train", "training")  # names of folders, in small or capital letters
TEST = ("val", "test", "valid", "validation", "testing")  # the first one that is there
DEEPEST = 3  # levels of folders that are searched for what was meant
DECODED = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever its name: PIL would run programs on others

Labeled = list[tuple[str, int]]  # image files, each with the number of its class


def load_dataset(
    name: str,
    data_dir: str | Path,
    side: int = 32,
    mean: Channels | None = None,
    std: Channels | None = None,
    *,
    test_only: bool = False,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Dataset:
    """Read a dataset by its name.

    name: `cifar10` or `cifar100`, downloaded through torchvision if not in `data_dir`; `digits`, which needs no file;
    or `folder:PATH` with one folder of images per class, in PATH/train (or training) and PATH/val (or valid,
    validation, test, testing), or in PATH itself, where every fifth image is then for testing. Images of a folder are
    resized and center-cropped to side × side pixels; each split is in a fixed shuffled order, so that its first images
    are from all classes. mean, std: normalize by these instead of the dataset's own. test_only: do not decode the
    training images of a folder; limit_train, limit_test: decode only so many images of it. Raises InputError for an
    unknown name, and for data that is missing and cannot be downloaded: it says which file to get and where to put it.
    """
    if name in DATASETS:
        found = DATASETS[name](Path(data_dir))
    elif name.startswith("folder:"):
        path = Path(name.removeprefix("folder:"))
        classes, train, test = find_splits(path)
        splits = _decoded_split([] if test_only else train, side, limit_train), _decoded_split(test, side, limit_test)
        found = Dataset(f"folder:{path}", *splits, len(classes), IMAGENET_MEAN, IMAGENET_STD, tuple(classes))
    else:
        raise InputError(f"unknown dataset {name!r}: {did_you_mean(name, NAMES)}")
    return replace(found, mean=mean or found.mean, std=std or found.std)


def load_images(
    folder: Path, samples: int, side: int, mean: Channels | None = None, std: Channels | None = None
) -> Tensor:
    """Return images from a folder and its subfolders, evenly spaced by name: float32 `[samples, 3, side, side]`.

    mean, std: normalize by these, ImageNet's if None. Raises InputError for a folder without images, and for an image
    that cannot be read.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = sorted(image_files(folder))
    if not files:
        raise InputError(f"{folder}: contains no images ({', '.join(IMG_EXTENSIONS)})")
    count = min(samples, len(files))
    images = torch.stack([decode_image(files[i * len(files) // count], side) for i in range(count)])
    split = Split(images, torch.zeros(count, dtype=torch.long))
    return Dataset(str(folder), split, split, 1, mean or IMAGENET_MEAN, std or IMAGENET_STD).normalize(images)


def folder_digest(path: Path) -> str:
    """Return what identifies a folder of labeled images, independent of its path: SHA-256 of relative names and sizes.

    Raises InputError as `find_splits`; no image is decoded.
    """
    _, train, test = find_splits(path)
    files = sorted((Path(file).relative_to(path).as_posix(), Path(file).stat().st_size) for file, _ in train + test)
    return sha256(repr(files).encode()).hexdigest()


def _cifar(kind: str, classes: int, mean: Channels, std: Channels, data_dir: Path) -> Dataset:
    """Read torchvision's dataset of this class, downloaded if it is not there."""
    from torchvision import datasets

    source = getattr(datasets, kind)
    folder = data_dir / source.base_folder
    _refuse_inside(data_dir, source)
    created = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
    try:
        with _locked(data_dir, to_write=not folder.is_dir()):
            splits = [source(data_dir, train=train, download=not folder.is_dir()) for train in (True, False)]
    except (URLError, OSError, RuntimeError) as error:
        if folder.is_dir() and isinstance(error, OSError) and not isinstance(error, URLError):
            raise InputError(f"{kind} in {folder} cannot be read ({brief(error)})") from error
        if folder.is_dir():
            raise InputError(
                f"{kind} in {folder} is damaged or incomplete; remove that folder to download it again, "
                "or point `data_dir` to the parent of an intact one"
            ) from error
        raise InputError(
            f"{kind} is not in {folder} and cannot be downloaded ({str(error).rstrip('.')}); "
            f"unpack {source.url} there, or point `data_dir` to its parent; "
            "the dataset digits needs scikit-learn, but no download"
        ) from error
    finally:
        with suppress(OSError):  # of the folders of a failed download, only empty ones go
            for path in created:
                path.rmdir()
    train, test = (Split(torch.from_numpy(s.data).contiguous(), torch.tensor(s.targets)) for s in splits)
    return Dataset(kind.lower(), train, test, classes, mean, std, tuple(splits[0].classes))


@contextmanager
def _locked(folder: Path, to_write: bool) -> Iterator[None]:
    """Wait for processes that download to a folder; to write there, also for those that read."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with suppress(OSError):  # no locks here, or a folder that may not be listed
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, descriptor)
            wait_for_lock(descriptor, f"{'uses' if to_write else 'downloads to'} {folder}", shared=not to_write)
        yield


def _refuse_inside(data_dir: Path, source: Any) -> None:
    """Raise InputError if `data_dir` is the dataset's own folder, or one of its files, instead of the parent."""
    from torchvision.datasets import CIFAR10, CIFAR100

    if (data_dir / source.base_folder).is_dir():
        return
    real = data_dir.resolve()
    for other in (CIFAR10, CIFAR100):
        if real.name == other.base_folder and real.is_dir():
            raise InputError(f"`data_dir` {data_dir} is the dataset itself; use its parent: `data_dir` {real.parent}")
        files = {name for name, _ in other.train_list + other.test_list}
        if real.is_dir() and all((real / name).is_file() for name in files):
            raise InputError(
                f"`data_dir` {data_dir} holds the files of {other.__name__} themselves; call that folder "
                f"{other.base_folder} and use its parent: `data_dir` {real.parent}"
            )
    if real.exists() and not real.is_dir():
        raise InputError(f"`data_dir` {data_dir} is a file; use the folder that contains {source.base_folder}")


def _digits(_: Path) -> Dataset:
    """The 1,797 8×8 digits of scikit-learn as 32×32 images of three equal channels; every fifth one is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"the dataset digits needs scikit-learn, which is not installed: {to_install('demo')}"
        ) from error
    bunch = load_digits()
    gray = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)  # 0 to 16 as shipped
    images = gray.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(-1).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Dataset(
        "digits", Split(images[~test], labels[~test]), Split(images[test], labels[test]), 10, (0.305,) * 3, (0.376,) * 3
    )


DATASETS: dict[str, Callable[[Path], Dataset]] = {  # mean and standard deviation are the training images'
    "cifar10": partial(_cifar, "CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": partial(_cifar, "CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": _digits,
}
NAMES = (*DATASETS, "folder:PATH")


def _decoded_split(files: Labeled, side: int, limit: int | None = None) -> Split:
    """Decode files, the first `limit`, in a fixed shuffled order, so that the first images are from all classes."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    try:
        images = torch.empty(len(order), side, side, 3, dtype=torch.uint8)
    except RuntimeError as error:
        raise InputError(
            f"`image_size` {side}: {len(order):,} images of that size do not fit into memory; choose a smaller one"
        ) from error
    labels = torch.empty(len(order), dtype=torch.long)
    for place, (file, label) in enumerate(files[number] for number in order):
        images[place], labels[place] = decode_image(Path(file), side), label
    return Split(images, labels)


def decode_image(path: Path, side: int) -> Tensor:
    """Return an image file as uint8 `[side, side, 3]`: resized to the shorter side, then center-cropped.

    It is turned as its EXIF orientation says; of an animation the first frame is taken, and what is transparent is
    shown on white. Raises InputError for a file that is no readable image, and for one whose values have no known
    range: floats, 32 bits, or 16 bits of which only the lowest 12 are used.
    """
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_regular(path) as stream, Image.open(stream, formats=DECODED) as file:
            # PIL keeps the upper 8 of 16 bits, except in gray; in a BMP 16 are those of a pixel
            of_16_bits = ";16" in str(getattr(file, "tile", "")) and file.format != "BMP"
            ImageOps.exif_transpose(file, in_place=True)
            image: Image.Image = file
            if file.mode == "F" or (file.mode == "I" and file.format != "PPM"):  # PIL scales those to 16 bits
                raise ValueError("its values are floats or have 32 bits, of unknown range; convert it to 8 bits")
            is_gray = file.mode.startswith("I")
            if is_gray or of_16_bits:
                values = numpy.asarray(file)
                colors = values[..., : len(file.getbands()) - ("A" in file.getbands())] if values.ndim > 2 else values
                if 0 < colors.max() < (1 << 12 if is_gray else 1 << 4):
                    raise ValueError("16-bit, but no value exceeds 4095: 12-bit or all dark; convert it to 8 bits")
            if is_gray:  # 16-bit gray: PIL's own conversion turns everything above 255 white
                image = Image.fromarray((values >> 8).astype(numpy.uint8))
            if "transparency" in image.info or {"A", "a"} & {*image.getbands()}:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            fitted = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
            return torch.from_numpy(numpy.array(fitted))
    except UnidentifiedImageError as error:  # its own message names no file
        raise InputError(f"{path}: not a readable image (its format is none of {', '.join(DECODED)})") from error
    except Exception as error:  # a damaged image may make its decoder raise anything
        raise InputError(f"{path}: not a readable image ({brief(error)})") from error


def find_splits(path: Path) -> tuple[list[str], Labeled, Labeled]:
    """Return the classes of a dataset, its training files and its test files, class by class.

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
        raise InputError(f"{test}: its classes ({some_of(named)}) are not those of {training} ({some_of(classes)})")
    return classes, files, held_out


def _named(path: Path, names: Sequence[str]) -> Path | None:
    """The folder with the first of these names, in small or capital letters."""
    folders = {folder.lower(): folder for folder in _folders(path)}
    return next((path / folders[name] for name in names if name in folders), None)


def _refuse_splits_as_classes(path: Path) -> None:
    if _named(path, TRAINING):
        raise InputError(f"{path}: contains splits instead of classes; use folder:{path}")
    splits = [folder for folder in _folders(path) if folder.lower() in TEST]
    if splits:
        raise InputError(
            f"{path}: {some_of(splits)} would be a class, but is named like a split, and there is no "
            f"{one_of(TRAINING)} beside it; add that, use folder:{path / splits[0]} for these images alone, or rename "
            "it"
        )
    for folder in _folders(path):
        inner = [name for name in _folders(path / folder) if name.lower() in TRAINING + TEST]
        if inner:
            meant = _meant(path)
            way = f"use folder:{meant}" if meant else "put the class folders into the split folders"
            raise InputError(f"{path}: {folder} would be a class, but contains the splits {some_of(inner)}; {way}")


def _labeled_files(path: Path) -> tuple[list[str], Labeled]:
    """Return the classes of a folder, and its image files, by class, in the order of torchvision's ImageFolder."""
    classes = _folders(path)
    _refuse_broken_links(path.iterdir())
    by_class = [image_files(path / name) for name in classes]
    files = [(str(file), label) for label, images in enumerate(by_class) for file in images]
    empty = [name for name, images in zip(classes, by_class, strict=True) if not images]
    if not classes or empty:
        found = f"no images in {some_of(empty)}" if classes else "found no folders"
        raise InputError(f"{path}: expected a folder of images for each class ({found})")
    if len(classes) == 1:
        meant = _meant(path)
        raise InputError(
            f"{path}: the folder {classes[0]} would be the only class; expected a folder of images for each of several "
            f"classes{f': use folder:{meant}' if meant else ''}"
        )
    return classes, files


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders, also those behind links, in torchvision's order.

    Raises InputError for a folder that cannot be read, one that would be read twice, a broken link, and a pipe or
    device in place of an image.
    """
    from torchvision.datasets.folder import is_image_file

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    files: list[Path] = []
    above = Path(os.path.abspath(folder)).parent  # noqa: PTH100 - not behind links, and of ".." too
    seen = {os.path.realpath(above): above}
    for root, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(root)
        former = seen.setdefault(os.path.realpath(place), place)
        if former != place:
            raise InputError(f"{place} and {former} are one folder, whose images would count twice; remove the link")
        subfolders[:] = [name for name in subfolders if not _is_hidden(Path(name))]
        shown = [place / name for name in names if not _is_hidden(Path(name))]
        _refuse_broken_links(shown)
        files += [file for file in shown if is_image_file(file.name)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: a pipe or a device, expected an image; remove it")
    return sorted(files, key=lambda file: (str(file.parent), file.name))


def _refuse_broken_links(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_symlink() and not path.exists() and not _is_hidden(Path(path.name)):
            raise InputError(f"{path}: a broken link; remove it, or restore its target")


def _meant(path: Path) -> Path | None:
    """The first folder below that holds splits, or several folders of images: what was probably meant."""
    from torchvision.datasets.folder import is_image_file

    level = [path]
    for _ in range(DEEPEST):
        level = [folder / name for folder in level for name in _folders(folder)]
        for folder in level:
            classes = _named(folder, TRAINING) or folder
            files = [(classes / name).iterdir() for name in _folders(classes)]
            if sum(any(is_image_file(file.name) and file.is_file() for file in some) for some in files) > 1:
                return folder
    return None


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if not _is_hidden(Path(entry.name)) and entry.is_dir())
    except OSError as error:
        raise InputError(f"{error.filename}: expected a folder of images for each class ({error.strerror})") from error


def _is_hidden(path: Path) -> bool:
    """Return whether a relative path contains hidden or system folders, or is such a file."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
