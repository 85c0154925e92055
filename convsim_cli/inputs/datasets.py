"""Image data sets by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.inputs.image_folders import load_folder
from convsim_cli.inputs.images import Channels, Dataset, Split

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
