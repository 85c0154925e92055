"""Where the classes and the splits of a folder of labeled images are.

PATH/train and PATH/val hold a folder of images per class, or PATH itself does. Anything else is refused: what stands in
the wrong place would be trained on without a word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from convsim_cli.errors import InputError, one_of

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
