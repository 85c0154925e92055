"""Where a run's data lies is no part of the run's identity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Convsim

from convsim_cli.errors import InputError
from convsim_cli.inputs.datasets import folder_digest
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import create_run, find_or_create_run, find_run, open_to_resume
from convsim_cli.training.run import open_run, read_results, train_run

SMALL = Arguments(arch="cnn:4", epochs=1, batch_size=4, image_size=32, lr=0.1)


def make_images(folder: Path, shade: int = 0) -> Path:
    from PIL import Image

    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (16 + index, 16), (shade, 30 * index, 7)).save(folder / name / f"{index}.bmp")
    return folder


def test_a_digest_is_of_relative_names_and_sizes(tmp_path: Path) -> None:
    one, other = (make_images(tmp_path / name, shade) for name, shade in (("a", 0), ("b", 99)))
    assert folder_digest(one) == folder_digest(other)
    (other / "cat" / "0.bmp").rename(other / "cat" / "00.bmp")
    assert folder_digest(one) != folder_digest(other)
    (other / "cat" / "00.bmp").rename(other / "cat" / "0.bmp")
    with (other / "cat" / "0.bmp").open("ab") as file:
        file.write(b"x")
    assert folder_digest(one) != folder_digest(other)


def test_a_run_is_resumed_where_its_folder_of_images_lies_now(tmp_path: Path) -> None:
    before = make_images(tmp_path / "before")
    whole, part = (
        create_run(replace(SMALL, dataset=f"folder:{before}", epochs=epochs), tmp_path / "runs", name)
        for name, epochs in (("whole", 2), ("part", 1))
    )
    train_run(whole)
    train_run(part)
    after = before.rename(tmp_path / "after")
    run = open_to_resume(part.folder, {"dataset": f"folder:{after}", "epochs": 2})
    train_run(run)
    assert [row["test_loss"] for row in read_results(part.folder)] == [
        row["test_loss"] for row in read_results(whole.folder)
    ]
    assert json.loads((part.folder / "args.json").read_text())["dataset"] == f"folder:{after}"


def test_a_folder_with_other_images_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, dataset=f"folder:{make_images(tmp_path / 'a')}"), tmp_path, "run")
    train_run(run)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    other = make_images(tmp_path / "b")
    (other / "dog" / "3.bmp").unlink()
    with pytest.raises(InputError, match="differ from those that the run began with"):
        train_run(open_to_resume(run.folder, {"dataset": f"folder:{other}", "epochs": 2}))
    with pytest.raises(InputError, match="`dataset` digits: the run"):
        open_to_resume(run.folder, {"dataset": "digits"})
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_run_is_reused_wherever_its_images_lie(tmp_path: Path) -> None:
    one, other = (replace(SMALL, dataset=f"folder:{make_images(tmp_path / name)}") for name in ("a", "b"))
    run = create_run(one, tmp_path / "runs", "run")
    found = find_or_create_run(other, tmp_path / "runs", "new")
    assert found.folder == run.folder
    assert found.arguments.dataset == other.dataset
    (tmp_path / "b" / "cat" / "0.bmp").unlink()
    assert find_run(other, tmp_path / "runs") is None


def test_a_run_without_a_digest_keeps_its_folder(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, dataset=f"folder:{make_images(tmp_path / 'a')}"), tmp_path, "old")
    values = json.loads((run.folder / "args.json").read_text())
    del values["folder_digest"]  # which version 0.1 did not have
    (run.folder / "args.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"`dataset` folder:.*: the run .* has folder:"):
        open_to_resume(run.folder, {"dataset": f"folder:{make_images(tmp_path / 'b')}"})
    assert train_run(open_run(run.folder))["epochs"] == 1


def test_resume_takes_another_data_dir(tmp_path: Path, convsim: Convsim) -> None:
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 20, "--limit-test", 10, "--epochs", 1)
    assert convsim("train", *small, "--data-dir", "here", "--run-dir", tmp_path, "--name", "x", "-q").code == 0
    resumed = convsim("train", "--resume", tmp_path / "x", "--data-dir", tmp_path / "there", "--epochs", 2, "-q")
    assert resumed.code == 0, resumed.err
    assert json.loads((tmp_path / "x" / "args.json").read_text())["data_dir"] == str(tmp_path / "there")
    refused = convsim("train", "--resume", tmp_path / "x", "--name", "y")
    assert "--name cannot be combined with --resume" in refused.error


def test_a_runs_classes_are_shown_and_kept_in_its_summary(tmp_path: Path, convsim: Convsim) -> None:
    images = make_images(tmp_path / "images")
    how = ("--dataset", f"folder:{images}", "--epochs", 1, "--batch-size", 4, "--run-dir", tmp_path, "--name", "a")
    outcome = convsim("train", "--arch", "cnn:4", *how)
    said = outcome.err.splitlines()
    classes = next(
        number for number, line in enumerate(said) if line == "2 classes (cat, dog), 8 training and 2 test images"
    )
    assert classes < next(number for number, line in enumerate(said) if line.startswith("epoch 1/1"))
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["classes"] == {"cat": {"train": 4, "test": 1}, "dog": {"train": 4, "test": 1}}
    assert convsim("train", "--resume", tmp_path / "a", "--epochs", 2).code == 0
