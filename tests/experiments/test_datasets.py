from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from convsim_cli.errors import InputError
from convsim_cli.experiments.datasets import load_dataset


def test_cifar10_is_whole_and_its_channels_are_normalised(data_dir: Path) -> None:
    data = load_dataset("cifar10", data_dir)
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.labels.bincount(), torch.full((10,), 5_000))
    batch = data.normalise(data.train.images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)


def test_digits_need_no_files_and_split_the_same_way_every_time(tmp_path: Path) -> None:
    data, again = (load_dataset("digits", tmp_path) for _ in range(2))
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape[1:] == (32, 32, 3)
    assert torch.equal(data.test.images, again.test.images)
    batch = data.normalise(data.train.images)
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
    for said in ("cifar-10-python.tar.gz", str(tmp_path / "cifar-10-batches-py"), "--dataset digits", "no route"):
        assert said in str(caught.value)


def test_a_damaged_copy_is_never_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cut short")
    with pytest.raises(InputError, match="damaged or incomplete"):
        load_dataset("cifar10", tmp_path)


def test_an_unknown_name_gets_a_suggestion_and_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10", Path())
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match="pip install scikit-learn"):
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
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4  # the first and the sixth are for testing
    assert data.train.images[-1, 0, 0].tolist() == [50, 3, 7]


def test_folders_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    make_images(tmp_path / "train", {"cat": 3, "dog": 2})
    make_images(tmp_path / "val", {"cat": 1, "dog": 1}, shade=9)
    data = load_dataset(f"folder:{tmp_path}", Path())
    assert (len(data.train), len(data.test)) == (5, 2)
    assert data.test.images[0, 0, 0].tolist() == [9, 0, 7]
    make_images(tmp_path / "other" / "train", {"cat": 1, "dog": 1})
    make_images(tmp_path / "other" / "test", {"cat": 1, "elk": 1})
    with pytest.raises(InputError, match=r"its classes \(cat, elk, …\) are not those"):
        load_dataset(f"folder:{tmp_path / 'other'}", Path())


def test_mean_and_standard_deviation_can_be_set() -> None:
    data = load_dataset("digits", Path(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    white = data.normalise(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(white.flatten(), torch.tensor([2.0, 1.0, 0.5]))


def test_cifar100_that_is_not_there_says_where_to_put_it(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(InputError, match=r"CIFAR100 in .*cifar-100-python is damaged or incomplete; put the unpacked"):
        load_dataset("cifar100", tmp_path)
