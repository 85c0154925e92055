from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import same_bits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsim_cli.batch_norm import batch_norm_layers, batch_norms_before, batch_statistics, reestimate_statistics
from convsim_cli.kernels import natural_order


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.BatchNorm1d(6, affine=False),
    )


@pytest.fixture
def model() -> nn.Sequential:
    found = network()
    images = 3 * torch.randn(8, 3, 6, 6) + 1
    found(images)  # statistics of a training that has begun
    found.train()
    return found


@pytest.fixture
def batches() -> list[Tensor]:
    return list((2 * torch.randn(24, 3, 6, 6) - 1).split(8))


def stopped_after(batches: list[Tensor]) -> Iterator[Tensor]:
    yield from batches
    raise KeyboardInterrupt


def test_statistics_are_the_plain_averages_over_batches(model: nn.Sequential, batches: list[Tensor]) -> None:
    inputs: dict[int, list[Tensor]] = {1: [], 5: [], 8: []}
    handles = [model[i].register_forward_hook(lambda _, x, __, i=i: inputs[i].append(x[0].double())) for i in inputs]
    reestimate_statistics(model, batches)
    for handle in handles:
        handle.remove()
    for i, seen in inputs.items():
        axes = [axis for axis in range(seen[0].ndim) if axis != 1]
        for buffer, statistic in (("running_mean", torch.mean), ("running_var", torch.var)):
            expected = torch.stack([statistic(batch, axes) for batch in seen]).mean(0)
            torch.testing.assert_close(model[i].get_buffer(buffer).double(), expected, rtol=1e-5, atol=1e-6)


def test_batches_count_by_their_number_of_values() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(60, 3, 6, 6)
    images[-1] *= 5
    with torch.no_grad():
        maps = model[0](images).double()
    for sizes in ([60], [59, 1], [20, 39, 1]):
        reestimate_statistics(model, images.split(sizes))
        parts = [part.transpose(0, 1).flatten(1) for part in maps.split(sizes)]
        variance = sum(part.var(1) * size for part, size in zip(parts, sizes, strict=True)) / 60
        torch.testing.assert_close(model[1].running_mean.double(), maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-4, atol=1e-6)


def test_without_dropout_they_are_those_of_torchs_update_bn(batches: list[Tensor]) -> None:
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    theirs = nn.Sequential(*(type(layer)(*arguments) for layer, arguments in zip(ours, _ARGUMENTS, strict=True)))
    theirs.load_state_dict(ours.state_dict())
    reestimate_statistics(ours, batches)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for mine, other in zip(batch_norm_layers(ours), batch_norm_layers(theirs), strict=True):
        torch.testing.assert_close(mine.running_mean, other.running_mean)
        torch.testing.assert_close(mine.running_var, other.running_var)


_ARGUMENTS: tuple[tuple[int, ...], ...] = ((3, 4, 3), (4,), (), (4, 4, 3), (4,))


def test_nothing_else_changes_and_no_random_number_is_drawn(model: nn.Sequential, batches: list[Tensor]) -> None:
    model[4].eval()  # a part of the network that its owner keeps in evaluation mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    reestimate_statistics(model, batches)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [layer.momentum for layer in batch_norm_layers(model)] == [0.1, None, 0.1]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{i}.running_{what}" for i in (1, 5, 8) for what in ("mean", "var")}
    assert not any(layer._forward_pre_hooks for layer in model)


def test_an_exception_leaves_the_network_as_it_was(model: nn.Sequential, batches: list[Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        reestimate_statistics(model, stopped_after(batches))
    assert same_bits(dict(model.state_dict()), before)
    assert all(module.training for module in model.modules())
    assert [layer.momentum for layer in batch_norm_layers(model)] == [0.1, None, 0.1]
    assert not any(layer._forward_pre_hooks for layer in model)


def test_layers_without_running_statistics_are_left_alone(batches: list[Tensor]) -> None:
    off = nn.BatchNorm2d(4)
    off.track_running_stats = False  # its buffers stay, and evaluation takes them
    off.get_buffer("running_mean").fill_(7)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), off)
    assert batch_norm_layers(model) == []
    reestimate_statistics(model, batches)
    assert off.get_buffer("running_mean").eq(7).all()


def test_a_network_without_batch_norm_does_no_work(batches: list[Tensor]) -> None:
    given = iter(batches)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    reestimate_statistics(model, given)
    assert next(given) is batches[0]


def test_only_the_named_layers_are_re_estimated(model: nn.Sequential, batches: list[Tensor]) -> None:
    first, second, _ = batch_norm_layers(model)
    kept = second.get_buffer("running_mean").clone()
    reestimate_statistics(model, batches, [first])
    assert torch.equal(second.get_buffer("running_mean"), kept)


def test_a_layer_with_one_value_per_channel_keeps_its_statistics(model: nn.Sequential) -> None:
    kept = model[8].running_mean.clone()
    reestimate_statistics(model, torch.randn(2, 3, 6, 6).split(1))
    assert torch.equal(model[8].running_mean, kept)
    assert model[1].running_mean.abs().max() < 2


def test_statistics_that_are_not_finite_are_replaced(model: nn.Sequential, batches: list[Tensor]) -> None:
    model[1].running_mean.fill_(torch.nan)
    model[1].running_var.fill_(torch.inf)
    reestimate_statistics(model, batches)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_compiled_network_is_re_estimated_as_well(batches: list[Tensor]) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    compiled = torch.compile(plain, backend="eager")
    with torch.no_grad():
        compiled.eval()(batches[0])  # type: ignore[attr-defined]  # this code knows nothing of later hooks
    reestimate_statistics(compiled, batches)  # type: ignore[arg-type]
    found = plain[1].get_buffer("running_mean").clone()
    reestimate_statistics(plain, batches)
    assert torch.equal(plain[1].get_buffer("running_mean"), found)


def test_batch_statistics_leave_the_running_ones(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with batch_statistics(model), torch.no_grad():
        found = model(batches[0])
    assert same_bits(dict(model.state_dict()), before)
    model[:3].train()
    torch.testing.assert_close(found, model(batches[0]))
    with pytest.raises(KeyboardInterrupt), batch_statistics(model):
        raise KeyboardInterrupt
    assert isinstance(model[1], _BatchNorm)
    assert model[1].running_mean is not None


RESNET = {
    "conv1.weight": (16, 3, 3, 3),
    "bn1": 16,
    "layer1.0.conv1.weight": (16, 16, 3, 3),
    "layer1.0.bn1": 16,
    "layer1.0.conv2.weight": (32, 16, 3, 3),
    "layer1.0.bn2": 32,
    "layer1.0.downsample.0.weight": (32, 16, 1, 1),
    "layer1.0.downsample.1": 32,
    "layer2.0.conv1.weight": (8, 32, 3, 3),
    "layer10.0.conv1.weight": (8, 8, 3, 3),
}


@pytest.mark.parametrize("order", [None, str, natural_order])
def test_a_files_batch_norm_before_a_layer_is_found_in_any_order(order: Callable[[str], Any] | None) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in RESNET.items():
        if isinstance(shape, tuple):
            shapes[name] = shape
        else:
            shapes |= {f"{name}.{part}": (shape,) for part in ("weight", "bias", "running_mean", "running_var")}
    channels = {name: shape[1] for name, shape in shapes.items() if len(shape) == 4}
    shapes = {name: shapes[name] for name in sorted(shapes, key=order)} if order else shapes
    assert batch_norms_before(shapes, channels) == {
        "layer1.0.conv1.weight": "bn1",
        "layer1.0.conv2.weight": "layer1.0.bn1",
        "layer2.0.conv1.weight": "layer1.0.downsample.1",
    }  # none for the downsampling layer, whose input has 16 channels: the batch norm before it has 32
