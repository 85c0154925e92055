"""Every arm of Table 5 runs to its end on real images, and resumes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction.published import ARMS
from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import create_run
from convsim_cli.training.run import Run, open_run, read_results, train_run

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")  # at rates that make a short run learn


@cache
def first_images(data_dir: Path) -> Dataset:
    """The first images of the real CIFAR-10, read once."""
    return load_dataset("cifar10", data_dir).limited(64, 16)


def results(run: Run) -> list[dict[str, Any]]:
    return [{**row, "seconds": 0} for row in read_results(run.folder)]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_every_arm_runs_to_its_end_on_real_images_and_resumes(arm: Any, data_dir: Path, tmp_path: Path) -> None:
    data = first_images(data_dir)
    base = Arguments(arch="cnn:4", epochs=2, batch_size=32, iterations=2)
    arguments = replace(base, **arm.settings)
    whole = create_run(arguments, tmp_path, "whole")
    summary = train_run(whole, dataset=data)
    assert summary["epochs"] == 2
    assert (summary["beta"] is not None) == ("reg" in arm.name)
    if "reg" not in arm.name and arm.name not in ("baseline", "init"):
        return  # what prepares a network is done before the first epoch, from which both go on
    part = create_run(replace(arguments, epochs=1), tmp_path, "part")
    train_run(part, dataset=data)
    torch.manual_seed(99)
    resumed = train_run(open_run(part.folder, epochs=2), dataset=data)
    assert results(part) == results(whole)
    assert resumed["beta"] == summary["beta"]
    names = ("last.safetensors", "best.safetensors")
    assert all((part.folder / name).read_bytes() == (whole.folder / name).read_bytes() for name in names)


def test_no_two_arms_are_the_same_run() -> None:
    settings = [replace(Arguments(), **arm.settings) for arm in ARMS.values()]
    assert all(one != other for number, one in enumerate(settings) for other in settings[:number])
    for one in settings:
        one.check()
