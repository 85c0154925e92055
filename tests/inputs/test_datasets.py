from __future__ import annotations

import builtins
import fcntl
import hashlib
import os
import pickle
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy
import pytest
import torch

from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.inputs.datasets import _locked, decode_image, folder_digest, load_dataset
from convsim_cli.inputs.images import Channels


@pytest.mark.slow
def test_cifar10_is_whole_and_its_channels_are_normalized(data_dir: Path) -> None:
    data = load_dataset("cifar10", data_dir)
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.labels.bincount(), torch.full((10,), 5_000))
    batch = data.normalize(data.train.images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)


def test_digits_need_no_files_and_split_the_same_way_every_time(tmp_path: Path) -> None:
    data, again = (load_dataset("digits", tmp_path) for _ in range(2))
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape[1:] == (32, 32, 3)
    assert torch.equal(data.test.images, again.test.images)
    batch = data.normalize(data.train.images)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)


def test_limits_take_the_first_images_and_none_at_all_is_refused() -> None:
    data = load_dataset("digits", Path()).limited(10, None)
    assert (len(data.train), len(data.test)) == (10, 360)
    with pytest.raises(InputError, match="at least one image"):
        data.limited(0, 1)


def test_without_a_network_the_error_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    with pytest.raises(InputError) as caught:
        load_dataset("cifar10", tmp_path)
    for said in (
        "cifar-10-python.tar.gz",
        str(tmp_path / "cifar-10-batches-py"),
        "digits needs scikit-learn, but no download",
        "no route",
    ):
        assert said in str(caught.value)


def test_a_damaged_copy_is_never_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cut short")
    with pytest.raises(InputError, match="damaged or incomplete"):
        load_dataset("cifar10", tmp_path)


def make_archive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of one image a file, where torchvision will look for the real one, with its checksums."""
    from torchvision.datasets import CIFAR10

    def checksum(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    source = folder / CIFAR10.base_folder
    source.mkdir(parents=True)
    batches = {name: {"data": numpy.full((1, 3072), 9, numpy.uint8), "labels": [3]} for name, _ in CIFAR10.train_list}
    batches |= {"test_batch": batches["data_batch_1"], "batches.meta": {"label_names": list("abcdefghij")}}
    for name, content in batches.items():
        (source / name).write_bytes(pickle.dumps(content))
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, CIFAR10.base_folder)
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, [[name, checksum(source / name)] for name in names])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksum(source / "batches.meta")})
    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum(archive))
    return archive


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server that torchvision takes for CIFAR-10's own."""
    folder = tmp_path / "server"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{found.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", url)
        yield folder
        found.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("harm", ["cut short", "tampered with"])
def test_a_download_cut_short_or_tampered_with_is_named_and_fetched_again(
    harm: str, tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_archive(server, monkeypatch)
    whole = archive.read_bytes()
    half = len(whole) // 2
    archive.write_bytes(whole[:half] if harm == "cut short" else whole[:half] + b"x" + whole[half + 1 :])
    data_dir = tmp_path / "data"
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot be downloaded.*corrupted"):
            load_dataset("cifar10", data_dir)
        assert [path.name for path in data_dir.iterdir()] == [archive.name]  # nothing was unpacked
    archive.write_bytes(whole)
    assert load_dataset("cifar10", data_dir).train.images.shape == (5, 32, 32, 3)
    (data_dir / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"torn while it was unpacked")
    with pytest.raises(InputError, match="damaged or incomplete; remove that folder"):
        load_dataset("cifar10", data_dir)


def test_an_unknown_name_gets_a_suggestion_and_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10", Path())
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'convsim\[demo\]'"):
        load_dataset("digits", Path())


def make_images(folder: Path, per_class: dict[str, int], shade: int = 0) -> None:
    from PIL import Image

    for number, (name, count) in enumerate(per_class.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (60, 40), (50 * number + shade, index, 7)).save(folder / name / f"{index}.png")


def test_a_folder_of_classes_is_decoded_once_to_the_size_asked_for(tmp_path: Path) -> None:
    make_images(tmp_path, {"cat": 6, "dog": 4})
    data = load_dataset(f"folder:{tmp_path}", Path(), side=24)
    assert (data.classes, len(data.train), len(data.test)) == (2, 8, 2)
    assert data.train.images.shape == (8, 24, 24, 3)
    assert data.train.images.dtype == torch.uint8
    assert sorted(data.train.labels.tolist()) == [0] * 4 + [1] * 4  # the first and the sixth are for testing
    corners = [tuple(image[0, 0].tolist()) for image in data.train.images]
    seen = dict(zip(corners, data.train.labels.tolist(), strict=True))
    assert seen[50, 3, 7] == 1
    assert seen[0, 1, 7] == 0
    assert (0, 0, 7) not in seen


def test_a_folders_first_images_are_of_all_classes_every_time(tmp_path: Path) -> None:
    make_images(tmp_path, {"cat": 20, "dog": 20})
    first, again = (load_dataset(f"folder:{tmp_path}", Path(), side=4).limited(8, 4) for _ in range(2))
    assert set(first.train.labels.tolist()) == set(first.test.labels.tolist()) == {0, 1}
    assert torch.equal(first.train.images, again.train.images)


def test_training_images_that_nobody_asked_for_are_not_decoded(tmp_path: Path) -> None:
    make_images(tmp_path / "train", {"cat": 2, "dog": 2})
    make_images(tmp_path / "val", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"torn")
    data = load_dataset(f"folder:{tmp_path}", Path(), side=4, test_only=True)
    assert (len(data.train), len(data.test)) == (0, 4)
    with pytest.raises(InputError, match="not a readable image"):
        load_dataset(f"folder:{tmp_path}", Path(), side=4)


def test_gray_images_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    from PIL import Image

    make_images(tmp_path, {"cat": 0, "dog": 1})
    shades = numpy.tile(numpy.array([0, 300, 32768, 65535], numpy.uint16), (4, 1))
    Image.fromarray(shades).save(tmp_path / "cat" / "x.png")
    images = load_dataset(f"folder:{tmp_path}", Path(), side=4).test.images
    assert images[0, 0, :, 0].tolist() == [0, 1, 128, 255]


def test_folders_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    make_images(tmp_path / "train", {"cat": 3, "dog": 2})
    make_images(tmp_path / "val", {"cat": 1, "dog": 1}, shade=9)
    data = load_dataset(f"folder:{tmp_path}", Path())
    assert (len(data.train), len(data.test)) == (5, 2)
    assert sorted(image[0, 0].tolist() for image in data.test.images) == [[9, 0, 7], [59, 0, 7]]
    make_images(tmp_path / "other" / "train", {"cat": 1, "dog": 1})
    make_images(tmp_path / "other" / "test", {"cat": 1, "elk": 1})
    with pytest.raises(InputError, match=r"its classes \(cat, elk\) are not those of .*train \(cat, dog\)"):
        load_dataset(f"folder:{tmp_path / 'other'}", Path())


def test_mean_and_standard_deviation_can_be_set() -> None:
    data = load_dataset("digits", Path(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    white = data.normalize(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(white.flatten(), torch.tensor([2.0, 1.0, 0.5]))


@pytest.mark.parametrize(
    "how",
    [
        *({"std": (value, 1.0, 1.0)} for value in (0.0, -1.0, 1e-320, 1e-40, 1e308, float("nan"))),
        *({"mean": (value, 1.0, 1.0)} for value in (1e308, 3e38, float("nan"))),
        {"mean": (1e308, 1.0, 1.0), "std": (1e37, 1.0, 1.0)},
    ],
    ids=str,
)
def test_images_are_not_normalized_beyond_float32(how: dict[str, Channels]) -> None:
    with pytest.raises(InputError, match=r"`mean` .* and `std` .*: images normalized by these contain NaN or Inf"):
        load_dataset("digits", Path(), **how)


def test_cifar100_that_is_not_there_says_where_to_put_it(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(
        InputError, match=r"CIFAR100 in .*cifar-100-python is damaged or incomplete; remove that folder"
    ):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("asked", ["cifar10", "cifar100"])
@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-100-python", "a folder of one's own"])
def test_a_data_set_named_in_place_of_its_parent_is_refused(
    asked: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda _: pytest.fail("must not be called"))
    inside = tmp_path / folder
    inside.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]:
        (inside / name).touch()
    monkeypatch.chdir(inside)
    for data_dir in (inside, Path()):
        with pytest.raises(InputError, match=f"use its parent: `data_dir` {tmp_path}$"):
            load_dataset(asked, data_dir)
    with pytest.raises(InputError, match="is a file; use the folder"):
        load_dataset(asked, inside / "test_batch")


@pytest.mark.parametrize("existed", [True, False])
def test_a_download_that_fails_leaves_no_empty_folder(
    existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(dataset: Any) -> None:
        Path(dataset.root).mkdir(parents=True, exist_ok=True)
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    if existed:
        (tmp_path / "new" / "data").mkdir(parents=True)
    with pytest.raises(InputError, match="no route"):
        load_dataset("cifar10", tmp_path / "new" / "data")
    assert (tmp_path / "new" / "data").exists() == existed
    assert (tmp_path / "new").exists() == existed


@pytest.mark.parametrize("training", ["train", "training", "Train"])
@pytest.mark.parametrize("testing", ["val", "valid", "validation", "test", "testing", "Validation"])
def test_splits_are_known_by_their_usual_names(training: str, testing: str, tmp_path: Path) -> None:
    make_images(tmp_path / training, {"cat": 3, "dog": 2})
    make_images(tmp_path / testing, {"cat": 1, "dog": 1}, shade=9)
    data = load_dataset(f"folder:{tmp_path}", Path(), side=4)
    assert (len(data.train), len(data.test), data.class_names) == (5, 2, ("cat", "dog"))
    assert data.images_of_classes() == {"cat": {"train": 3, "test": 1}, "dog": {"train": 2, "test": 1}}


def test_hidden_folders_and_files_are_ignored(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "train", tmp_path / "val"):
        make_images(folder, {".ipynb_checkpoints": 2, "__MACOSX": 1})
    make_images(tmp_path / "train", {"cat": 2, "dog": 2})
    make_images(tmp_path / "val", {"cat": 1, "dog": 1})
    make_images(tmp_path / "train" / "cat", {".ipynb_checkpoints": 2})
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not an image")
    data = load_dataset(f"folder:{tmp_path}", Path(), side=4)
    assert (len(data.train), len(data.test), data.class_names) == (4, 2, ("cat", "dog"))


def test_files_and_classes_are_in_the_order_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    from convsim_cli.inputs.datasets import find_splits

    make_images(tmp_path / "train", {"dog": 3, "Cat": 11, "elk/2019": 2, "elk/2020": 1})
    make_images(tmp_path / "val", {"dog": 1, "Cat": 1, "elk": 1})
    found, _, theirs = *find_splits(tmp_path)[:2], ImageFolder(str(tmp_path / "train"))
    assert (found, find_splits(tmp_path)[1]) == (theirs.classes, theirs.samples)


LAYOUTS: dict[str, tuple[list[str], str]] = {
    "nested splits": (
        ["data/train/cat", "data/train/dog", "data/val/cat", "data/val/dog"],
        "{}: data would be a class, but contains the splits train, val; use folder:{}/data",
    ),
    "deeply nested splits": (
        ["a/b/training/cat", "a/b/training/dog", "a/b/testing/cat", "a/b/testing/dog"],
        "{}: the folder a would be the only class; expected a folder of images for each of several classes: "
        "use folder:{}/a/b",
    ),
    "nested classes": (["images/cat", "images/dog"], "{}: the folder images would be the only class; expected a folder "
        "of images for each of several classes: use folder:{}/images"),
    "one class": (["cat"], "{}: the folder cat would be the only class; expected a folder of images for each of "
        "several classes"),
    "one class in splits": (["train/cat", "val/cat"], "{}/train: the folder cat would be the only class; expected a "
        "folder of images for each of several classes"),
    "splits without one for training": (["val/cat", "val/dog", "test/cat", "test/dog"], "{}: test, val would be a "
        "class, but is named like a split, and there is no train or training beside it; add that, use "
        "folder:{}/test for these images alone, or rename it"),
    "splits in classes": (["cat/train", "cat/test", "dog/train", "dog/test"], "{}: cat would be a class, but contains "
        "the splits test, train; put the class folders into the split folders"),
    "splits in a split": (["train/train/cat", "train/train/dog", "train/val/cat", "train/val/dog"], "{}/train: "
        "contains splits instead of classes; use folder:{}/train"),
    "nothing": ([], "{}: expected a folder of images for each class (found no folders)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_folder_of_another_layout_is_refused_with_the_path_to_use(kind: str, tmp_path: Path) -> None:
    folders, said = LAYOUTS[kind]
    make_images(tmp_path, dict.fromkeys(folders, 2))
    for look in (lambda path: load_dataset(f"folder:{path}", Path(), side=4), folder_digest):
        with pytest.raises(InputError) as caught:
            look(tmp_path)
        assert str(caught.value) == said.format(tmp_path, tmp_path)


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    make_images(tmp_path, {"cat": 2, "dog": 0})
    with pytest.raises(InputError, match=r"expected a folder of images for each class \(no images in dog\)"):
        load_dataset(f"folder:{tmp_path}", Path())


def test_a_dataset_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)$"):
        load_dataset("cifar10", tmp_path)


def test_a_process_waits_for_another_that_downloads(tmp_path: Path) -> None:
    steps: list[str] = []
    with _locked(tmp_path / "data", to_write=True):
        other = threading.Thread(target=lambda: enter(tmp_path / "data", steps))
        other.start()
        time.sleep(0.1)
        steps.append("downloaded")
    other.join()
    assert steps == ["downloaded", "entered"]


def test_waiting_for_a_download_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convsim_cli.errors.PATIENCE", 0.05)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [held]).start()
    with pytest.warns(ConvsimWarning, match="waiting for another process that downloads to"), _locked(tmp_path, False):
        pass


def enter(folder: Path, steps: list[str]) -> None:
    with _locked(folder, to_write=False):
        steps.append("entered")


def test_images_beyond_the_limits_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path, {"cat": 10, "dog": 10})
    whole = load_dataset(f"folder:{tmp_path}", Path(), 8)
    decoded = []
    monkeypatch.setattr(
        "convsim_cli.inputs.datasets.decode_image", lambda *how: (decoded.append(how), decode_image(*how))[1]
    )
    few = load_dataset(f"folder:{tmp_path}", Path(), 8, limit_train=3, limit_test=1)
    assert len(decoded) == 4
    assert torch.equal(few.train.images, whole.train.images[:3])
    assert torch.equal(few.test.labels, whole.test.labels[:1])


@pytest.mark.parametrize("kind", [2, 4, 6])  # colors, gray with alpha, colors with alpha
def test_twelve_bit_images_are_refused_in_color_too(kind: int, tmp_path: Path) -> None:
    for most, fits in ((4000, False), (65535, True)):
        values = numpy.full((8, 8, {2: 3, 4: 2, 6: 4}[kind]), most, ">u2")
        parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0))]
        parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))), (b"IEND", b"")]
        chunks = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts]
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        with nullcontext() if fits else pytest.raises(InputError, match="12-bit or all dark"):
            assert decode_image(tmp_path / "x.png", 8).max() == 255
