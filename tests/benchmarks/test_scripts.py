"""The scripts for a CPU, on tiny networks: what they call is the library of today."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import controls
import growth
import iteration
import methods
import probes
import pytest
import torch
import training
import zoo
from safetensors.torch import save_file

from convsim_cli import measure
from convsim_cli.networks.architectures import build_network

CPU, IMAGES = torch.device("cpu"), (4, 3, 32, 32)


def probe_files(folder: Path) -> list[float]:
    model, file = probes.network(normalized=True)[:4], folder / "model.safetensors"
    save_file(dict(model.state_dict()), file)
    found = [
        probes.figures(measure(model, torch.randn(IMAGES))),
        *(probes.probed(file, each) for each in probes.PROBES),
    ]
    assert len({tuple(each) for each in found}) == 1  # the same layers
    return [probes.spearman(*([corr for corr, _ in each.values()] for each in found[:2]))]


def change_layers(_: Path) -> list[Any]:
    found = []
    for name, change in controls.controls():
        if "norm-preserving" not in name:  # these take 500 iterations
            model = build_network("cnn:8")
            change(model, controls.SECOND, torch.randn(IMAGES))
            found += controls.measure(model, controls.SECOND, torch.randn(IMAGES)).values()
    return found


def run_methods(_: Path) -> list[float]:
    weights = [torch.randn(4, 3, 3, 3)]
    for run in (*methods.methods(weights).values(), methods.by_autograd(weights, methods.literal)):
        run()
    return [growth.exponent([1, 2, 4], [3, 6, 12])]


def run_iterations(_: Path) -> list[float]:
    for step in iteration.steps("cnn:8", CPU).values():
        step()
    return []


def train(_: Path) -> list[float]:
    data = training.noise(32)
    training.trained("cnn:8", "reg", 16, data, CPU)()
    training.bare("cnn:8", 16, data, CPU)()
    return []


def guess(_: Path) -> list[float]:
    pytest.importorskip("timm")
    name, infos, truth = next(zoo.networks(1, "torchvision:resnet18"))
    assert name == "torchvision:resnet18"
    return [float(len(infos)), float(len(truth))]


@pytest.mark.parametrize("run", [probe_files, change_layers, run_methods, run_iterations, train, guess])
def test_a_script_runs_with_the_library_as_it_is(run: Callable[[Path], list[float]], tmp_path: Path) -> None:
    assert all(map(isfinite, run(tmp_path)))
