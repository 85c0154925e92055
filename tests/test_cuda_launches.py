"""What CUDA would have to do, by fake tensors: every device matches, launches are few, and nothing waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from fake_cuda import CUDA, Trace, fake_cuda, needs_a_driver, real_network
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from convsim_cli import minimize as descent
from convsim_cli.errors import ConvsimWarning
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.kernels import Kernel, module_kernels, weight_of
from convsim_cli.measurement.feature_maps import LayerMaps
from convsim_cli.measurement.synthetic import LayerProbe
from convsim_cli.minimize import Minimization, Stack, descend_, group_by_shape, make_iteration, minimize_
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.precision import full_precision
from convsim_cli.rotation import TurnMonitor
from convsim_cli.training.config import Arguments
from convsim_cli.training.trainer import Trainer

pytestmark = pytest.mark.skipif(needs_a_driver(), reason="this torch asks the CUDA driver even for fake tensors")
RAW, HELD = 7, 20  # launches of an iteration over one stack: two of them are the optimizer's


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def stack(*shape: int, count: int = 1) -> Stack:
    kernels = [Kernel(str(number), shape) for number in range(count)]
    return Stack(kernels, [torch.randn(shape, device=CUDA) for _ in kernels])


def traced(step: Callable[[], object]) -> Trace:
    """Trace a step once all that is made only once has been made."""
    with Trace():
        step()
    with Trace() as trace:
        step()
    return trace


def iteration(stacks: list[Stack], how: Minimization) -> Trace:
    with torch.no_grad(), full_precision(CUDA):
        return traced(make_iteration(stacks, how))


@pytest.mark.parametrize(
    "shape", [(64, 64, 3, 3), (512, 512, 3, 3), (64, 3, 7, 7), (96, 1, 7, 7), (2048, 64, 3, 3)], ids=str
)
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_an_iteration_is_a_few_launches_and_no_wait(shape: tuple[int, ...], preserve_norm: bool) -> None:
    trace = iteration([stack(*shape)], Minimization(preserve_norm=preserve_norm))
    assert not trace.waits
    assert trace.launches.total() <= (HELD if preserve_norm else RAW), trace.launches
    assert "cumsum" not in trace.launches  # a chain of dependent steps, as long as there are filters


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_no_objective_waits(objective: str, preserve_norm: bool, optimizer: str) -> None:
    how = Minimization(preserve_norm=preserve_norm, objective=objective, optimizer=optimizer)
    assert not iteration([stack(64, 16, 3, 3), stack(96, 1, 31, 31)], how).waits


@pytest.mark.slow
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_an_iteration_launches_per_shape_not_per_layer(preserve_norm: bool) -> None:
    model, how = real_network("resnet18").to(CUDA), Minimization(preserve_norm=preserve_norm)
    layers = [(kernel, weight_of(model, kernel).detach()) for kernel in how.select(module_kernels(model)).kernels]
    stacks = [Stack(*zip(*group, strict=True)) for group in group_by_shape(layers)]
    assert len(stacks) < len(layers)
    trace = iteration(stacks, how)
    assert not trace.waits
    assert trace.launches.total() <= ((HELD if preserve_norm else RAW) - 2) * len(stacks) + 2, trace.launches


@pytest.mark.slow
def test_an_iteration_of_resnet50_takes_72_launches_and_of_1x1_kernels_3() -> None:
    model, how = real_network("torchvision:resnet50").to(CUDA), Minimization()
    layers = [(kernel, weight_of(model, kernel).detach()) for kernel in how.select(module_kernels(model)).kernels]
    stacks = [Stack(*zip(*group, strict=True)) for group in group_by_shape(layers)]
    assert iteration(stacks, how).launches.total() - 2 <= 72  # two are the optimizer's
    assert iteration([stack(256, 64, 1, 1, count=3)], how).launches.total() - 2 <= 3


@pytest.mark.slow
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_a_minimization_waits_only_to_read_its_losses(preserve_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "LOOK_EVERY", 8)
    waits = []
    for iterations in (4, 8, 24):
        with Trace() as trace:
            descend_([stack(16, 8, 3, 3, count=2)], Minimization(iterations, preserve_norm=preserve_norm))
        waits.append(trace.waits.total())
    assert waits[0] == waits[1]
    assert waits[2] == 3 * waits[0]
    assert waits[0] <= 3  # one copy, of which two losses are read


@pytest.mark.slow
def test_figures_before_and_after_wait_together_however_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[torch.Size] = []  # each is one wait, however many values it has
    monkeypatch.setattr(
        FakeTensor, "tolist", lambda self: tables.append(self.shape) or [[1.0] * self.shape[1]] * self.shape[0]
    )
    for name in ("cnn1", "resnet18"):
        model = real_network(name).to(CUDA)
        tables.clear()
        with Trace() as trace, pytest.warns(ConvsimWarning) if name == "resnet18" else nullcontext():  # of 1×1 layers
            layers = len(minimize_(model, 0, preserve_norm=True))
        assert tables == [(2 * layers, 4)]
        assert trace.waits.total() == 2, trace.waits  # are they finite, before and after


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_penaltys_gradient_takes_five_launches_a_layer_and_no_wait(layout: torch.memory_format) -> None:
    model = real_network("resnet18").to(CUDA, memory_format=layout)
    penalty = ConvSimPenalty(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trace = traced(lambda: penalty.add_gradient_(1e-3))
    assert not trace.waits
    assert trace.launches.total() <= 5 * len(module_kernels(model).kernels) + 1, trace.launches
    beta = torch.full((), 1e-3, device=CUDA)
    assert not traced(lambda: penalty.add_gradient_(beta)).waits


def test_one_gradient_of_another_layout_costs_one_launch_more() -> None:
    model = real_network("cnn1").to(CUDA)
    penalty = ConvSimPenalty(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    alike = traced(lambda: penalty.add_gradient_(1e-3)).launches
    weight = max(model.parameters(), key=torch.Tensor.numel)
    weight.grad = torch.zeros_like(weight, memory_format=torch.channels_last)
    assert traced(lambda: penalty.add_gradient_(1e-3)).launches.total() == alike.total() + 1


def trainer(count: int, mode: str, **more: object) -> Trainer:
    images, labels = torch.zeros(count, 32, 32, 3, dtype=torch.uint8), torch.zeros(count, dtype=torch.long)
    data = Dataset("zeros", Split(images, labels), Split(images, labels), 10, (0.5,) * 3, (0.3,) * 3)
    arguments = Arguments(mode=mode, batch_size=32, device="cuda", **more)  # type: ignore[arg-type]
    return Trainer(real_network("cnn1"), data, arguments, CUDA)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["baseline", "reg"])
@pytest.mark.parametrize(
    "more", [{}, {"precision": "tf32"}, {"precision": "bf16", "momentum": 0.9}, {"beta_schedule": "loss"}], ids=str
)
def test_training_waits_once_an_epoch_however_many_steps_that_has(
    mode: str, more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convsim_cli.training.trainer.SAMPLED_STEPS", 1)  # of both, the turn of the first step alone
    if mode == "baseline" and "beta_schedule" in more:
        pytest.skip("a schedule of reg alone")
    waits, launches = [], []
    for steps in (2, 6):
        once = trainer(32 * steps, mode, **more)
        trace = traced(lambda once=once: once.train_batches(None))
        waits.append(trace.waits)
        launches.append(trace.launches.total())
    assert waits[0] == waits[1]
    assert waits[0].total() <= 6, waits  # numbers: loss, correct predictions, and each layer's first turn
    assert (launches[1] - launches[0]) / 4 <= 90


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["precise", "running", "batch"])
def test_evaluation_waits_once_however_many_images_it_has(statistics: str) -> None:
    waits = []
    for count in (1024, 4096):
        once = trainer(count, "baseline", bn_statistics=statistics)
        once.model.train()
        waits.append(traced(once.evaluate).waits)
    assert waits[0] == waits[1]
    assert waits[0].total() <= 4, waits


def test_feature_map_statistics_wait_no_more_for_more_inputs() -> None:
    kernel, weight = Kernel("a", (64, 16, 3, 3)), torch.randn(64, 16, 3, 3, device=CUDA)
    waits = []
    for inputs in (16, 256):
        probe = LayerProbe("natural", inputs)
        waits.append(traced(lambda probe=probe: probe.look(kernel, weight)).waits)
    assert waits[0] == waits[1]
    with Trace():
        seen = LayerMaps(kernel, weight)
    maps = torch.randn(8, 64, 34, 34, device=CUDA)
    assert not traced(lambda: seen.update(maps)).waits


@pytest.mark.parametrize(
    ("precision", "layout"),
    [("fp32", torch.contiguous_format), ("tf32", torch.channels_last), ("bf16", torch.channels_last)],
)
def test_on_cuda_tensor_cores_get_channels_last_and_plain_float32_does_not(
    precision: str, layout: torch.memory_format
) -> None:
    once = trainer(4, "baseline", precision=precision)
    images = once.dataset.normalize(once.dataset.train.images)
    assert images.is_contiguous(memory_format=layout)
    kernels = next(parameter for parameter in once.model.parameters() if parameter.shape[1:2] == (64,))
    assert kernels.is_contiguous(memory_format=layout)


def test_the_trace_sees_a_wait_a_launch_and_a_mixture_of_devices() -> None:
    a, here = torch.randn(4, 4, device=CUDA), torch.randn(4, 4)
    with Trace() as trace:
        (a @ a).view(16)[0].item()
        (a + a).cpu()
        (a > 0).tolist()
    assert trace.launches == {"mm": 1, "add": 1, "gt": 1}
    assert trace.waits["_local_scalar_dense"] >= 1
    assert trace.waits["_to_copy"] >= 1
    with pytest.raises(Exception, match="device"):
        nn.functional.linear(a, here)


def test_a_monitor_follows_a_model_that_moves() -> None:
    with unset_fake_temporarily():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
        turned = TurnMonitor(model)
    model.to(CUDA)
    with Trace():
        turned()
        assert len(turned.rows()) == 2
