"""What only a real GPU can show, skipped where there is none.

python -m pytest tests/test_gpu.py -n 0 -p no:benchmark -p no:cacheprovider -W default
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convsim_cli.checkpoint_init import init_checkpoint
from convsim_cli.checkpoint_measure import measure_checkpoint
from convsim_cli.closed_forms import decorrelate_, orthogonalize_
from convsim_cli.device import WARM_UP, repeated
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.kernels import Kernel
from convsim_cli.measurement.network import measure
from convsim_cli.minimize import (
    Minimization,
    Stack,
    descend_,
    make_iteration,
    minimize_,
    minimize_kernels,
    minimize_weight_,
)
from convsim_cli.networks.architectures import build_network
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.precision import full_precision
from convsim_cli.similarity import convolutional_similarity
from convsim_cli.training import trainer as once_an_epoch
from convsim_cli.training.config import Arguments
from convsim_cli.training.trainer import Trainer, choose_algorithms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # drivers, compilers and prototypes of torch warn of what is no fault here
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPES = [(64, 64, 3, 3), (64, 3, 7, 7), (96, 1, 31, 31), (32, 16, 1, 1), (300, 8, 3, 3), (16, 8, 5), (8, 4, 3, 3, 3)]
second = pytest.param(
    "cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
)
DEVICES = ["cuda:0", second]


def kernels(*shape: int) -> Tensor:
    """Kernels as they are before training, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 10


@contextmanager
def no_wait() -> Iterator[None]:
    """Raise for an operation that waits for the device.

    The first call of torch's setter warns, after it has set the mode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_those_of_the_cpu(shape: tuple[int, ...], device: str) -> None:
    expected, found = kernels(*shape).requires_grad_(), kernels(*shape).to(device).requires_grad_()
    values = convolutional_similarity(expected), convolutional_similarity(found)
    for value in values:
        value.backward()
    close(values[1].detach(), values[0].detach())
    assert found.grad is not None
    assert expected.grad is not None
    close(found.grad, expected.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_penalties_are_those_of_the_cpu(objective: str) -> None:
    gradients = []
    for device in (CPU, CUDA):
        model = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 8, 3)).to(device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(kernels(*parameter.shape))
        penalty = ConvSimPenalty(model, objective)
        penalty().backward()
        penalty.add_gradient_(0.5)
        gradients.append(model[1].weight.grad)
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_minimization_is_that_of_the_cpu(preserve_norm: bool, device: str) -> None:
    found = []
    for place in ("cpu", device):
        weight = minimize_weight_(kernels(32, 16, 3, 3).to(place), iterations=120, preserve_norm=preserve_norm)
        found.append(convolutional_similarity(weight).item())
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).to(device)
    assert all(record["after"]["cs"] < record["before"]["cs"] for record in minimize_(model, 120))


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (64, 3, 7, 7), (96, 1, 31, 31)], ids=str)
def test_graphs_come_to_the_same_as_iterations_without(
    shape: tuple[int, ...], preserve_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("CONVSIM_CUDA_GRAPHS", switch)
        how = Minimization(120, preserve_norm=preserve_norm)
        ((found, _),) = minimize_kernels([(Kernel("a", shape), kernels(*shape).to(CUDA))], how)
        results.append(found)
    torch.testing.assert_close(*results)


def test_closed_forms_are_those_of_the_cpu() -> None:
    weights = []
    for device in (CPU, CUDA):
        model = build_network("cnn:16").to(device)
        orthogonalize_(model)
        decorrelate_(model, kernels(32, 3, 32, 32).to(device))
        weights.append([kernel.detach() for kernel in model.parameters() if kernel.ndim == 4])
    for found, expected in zip(weights[1], weights[0], strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    keys = (
        "cs",
        "ncs",
        "kernel_cos",
        "norm",
        "fm_corr",
        "fm_cos",
        "fm_rank",
        "fm_inner2",
        "fm_corr_random",
        "dead",
        "redundant",
    )
    return {f"{record['name']} {key}": record[key] for record in records for key in keys}


def test_figures_are_those_of_the_cpu(tmp_path: Path) -> None:
    found = []
    for device in (CPU, CUDA):
        model = build_network("cnn:16").to(device)
        found.append(figures(measure(model, kernels(8, 3, 32, 32).to(device))))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    path = tmp_path / "model.pt"
    torch.save({"a.weight": kernels(16, 8, 3, 3), "b.weight": kernels(8, 16, 7, 7)}, path)
    reports = [figures(measure_checkpoint(path, input="natural", device=device).layers) for device in ("cpu", "cuda")]
    assert reports[1] == pytest.approx(reports[0], rel=1e-3)


def test_a_checkpoint_is_minimized_as_on_the_cpu(tmp_path: Path) -> None:
    after = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.pt"
        torch.save({"a.weight": kernels(16, 8, 3, 3), "b.weight": kernels(8, 16, 7, 7)}, path)
        done = init_checkpoint(path, iterations=100, device=device)
        after.append([layer["after"]["cs"] for layer in done.layers])
    assert after[1] == pytest.approx(after[0], rel=1e-3)


def test_the_iterations_of_a_minimization_do_not_wait() -> None:
    stack = Stack([Kernel("a", (64, 64, 3, 3))], [kernels(64, 64, 3, 3).to(CUDA)])
    with torch.no_grad(), full_precision(CUDA):
        iterate = repeated(make_iteration([stack], Minimization(preserve_norm=True)), CUDA)
        for _ in range(WARM_UP + 2):
            iterate()
        with no_wait():
            for _ in range(20):
                iterate()
    descend_([stack], Minimization(60))


def trainer(**arguments: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, 32, 32, 3), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(10, (256,), generator=generator))
    data = Dataset("noise", split, split, 10, (0.5,) * 3, (0.3,) * 3)
    return Trainer(build_network("cnn:16"), data, Arguments(batch_size=64, device="cuda", **arguments), CUDA)


@pytest.mark.parametrize("arguments", [{}, {"precision": "tf32"}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("mode", ["baseline", "reg"])
def test_a_training_step_does_not_wait(mode: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    once = trainer(mode=mode, **arguments)
    once.run_epoch()  # what is created once
    order = torch.arange(256, device=CUDA)
    monkeypatch.setattr(once_an_epoch, "permutation", lambda *_: order)
    monkeypatch.setattr(once_an_epoch, "synchronize", lambda _: torch.cuda.set_sync_debug_mode("default"))
    with no_wait():
        once.train_batches(None)


@pytest.mark.parametrize(
    "arguments", [{}, {"precision": "tf32"}, {"precision": "bf16"}, {"precision": "bf16", "compile": True}], ids=str
)
def test_training_learns_what_it_learns_in_float32_on_the_cpu(arguments: dict[str, Any]) -> None:
    expected = Trainer(build_network("cnn:16"), trainer().dataset.to(CPU), Arguments(batch_size=64), CPU).run_epoch()
    assert trainer(**arguments).run_epoch()["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-2)


def deterministic_rows(mode: str) -> list[dict[str, float]]:
    """The rows of two trainings that should be equal."""
    choose_algorithms(deterministic=True)
    return [{**trainer(mode=mode, deterministic=True).run_epoch(), "seconds": 0} for _ in range(2)]


@pytest.mark.parametrize("mode", ["baseline", "reg"])
def test_deterministic_training_gives_the_same_bits_twice(mode: str) -> None:
    """In a process of its own: cuBLAS reads its setting once, at its first product."""
    check = f"import test_gpu; first, second = test_gpu.deterministic_rows({mode!r}); assert first == second"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    settings = {**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([sys.executable, "-c", check], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
