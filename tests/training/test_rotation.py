from __future__ import annotations

import csv
import json
import math
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from convsim_cli import TurnMonitor
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.kernels import Kernel, module_kernels, weight_of
from convsim_cli.networks.architectures import build_network
from convsim_cli.rotation import filter_angles
from convsim_cli.training.config import Arguments, make_arguments
from convsim_cli.training.launch import create_run
from convsim_cli.training.prepare import build_with_weights, prepare_
from convsim_cli.training.run import LAYER_COLUMNS, Run, open_run, read_layers, train_run
from convsim_cli.training.trainer import Trainer, make_optimizer

SMALL = Arguments(arch="cnn:4", dataset="digits", epochs=3, batch_size=20, iterations=10, limit_train=60, limit_test=30)
CPU = torch.device("cpu")


def literal_angle(a: Tensor, b: Tensor) -> float:
    """The angle in degrees by the arc cosine in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    return math.degrees(math.acos(min(1.0, max(-1.0, (a @ b / (a.norm() * b.norm())).item()))))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_angles_are_those_of_the_arc_cosine_in_float64(groups: int, transposed: bool) -> None:
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, groups=groups)
    kernel = module_kernels(nn.Sequential(layer)).kernels[0]
    weight, former = torch.randn(2, *kernel.shape)
    found = filter_angles(kernel, weight, former)
    ours, theirs = (kernel.to_filters(each).flatten(0, 1) for each in (weight, former))
    assert found.tolist() == pytest.approx([literal_angle(a, b) for a, b in zip(ours, theirs, strict=True)], rel=1e-5)


@pytest.mark.parametrize("degrees", [1e-4, 1e-2, 90.0, 180.0])
def test_small_angles_keep_their_digits_in_float32(degrees: float) -> None:
    turn = math.radians(degrees)
    former, weight = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[math.cos(turn), math.sin(turn)]]])
    found = filter_angles(Kernel("weight", (1, 1, 2)), weight, former).item()
    assert found == pytest.approx(degrees, rel=1e-4)


@pytest.mark.parametrize("scales", [(1e-30, 1e-30), (1e-23, 1e-23), (1e19, 1e19), (1e30, 1e30), (1, 1e-24)])
def test_angles_do_not_depend_on_scale(scales: tuple[float, float]) -> None:
    kernel, (weight, former) = Kernel("weight", (6, 4, 3, 3)), torch.randn(2, 6, 4, 3, 3)
    found = filter_angles(kernel, weight * scales[0], former * scales[1])
    assert found.tolist() == pytest.approx(filter_angles(kernel, weight, former).tolist(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-24, 1e19])
def test_norms_of_very_small_and_large_filters_are_known(scale: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    norms = model[0].weight.detach().double().flatten(1).norm(dim=1)
    assert TurnMonitor(model).rows()[0]["norm"] == pytest.approx(norms.mean().item(), rel=1e-5, abs=0)


def at_degrees(*angles: float) -> Tensor:
    """Filters of one tap and two channels, `[S, 2, 1]`, at these angles from the first axis."""
    turns = torch.tensor(angles).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], dim=1).unsqueeze(-1)


def test_scale_turns_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    turned = TurnMonitor(model)
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([2.0, 3, 0.5]).view(3, 1, 1, 1))
    turned()
    (row,) = turned.rows()
    assert (row["turn_per_step"], row["turned"]) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-4))


def test_a_filter_that_is_dead_at_the_start_counts_nowhere() -> None:
    model, size = nn.Sequential(nn.Conv1d(2, 4, 1)), torch.tensor([1.0, 1e-9, 2.0, 3.0]).view(4, 1, 1)
    with torch.no_grad():
        model[0].weight.copy_(size * at_degrees(0, 0, 0, 0))
        turned = TurnMonitor(model)
        model[0].weight.copy_(size * at_degrees(10, 0, 20, 30))
    turned()
    (row,) = turned.rows()
    assert (row["turn_per_step"], row["turned"]) == (pytest.approx(20, rel=1e-4), pytest.approx(20, rel=1e-4))
    assert row["norm"] == pytest.approx(2)


def test_the_first_step_after_rows_is_looked_at() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(at_degrees(0, 0))
    turned = TurnMonitor(model, every=3)
    for degrees in (5, 12):
        with torch.no_grad():
            model[0].weight.copy_(at_degrees(degrees, degrees))
        turned()
        (row,) = turned.rows()
    assert (row["turn_per_step"], row["turned"]) == (pytest.approx(7, rel=1e-4), pytest.approx(12, rel=1e-4))


def test_every_kth_step_is_looked_at_from_the_first_on() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(at_degrees(0, 0))
    turned, angle = TurnMonitor(model, every=3), 0
    for degrees in (2, 40, 40, 5, 40, 40, 9):  # every third step is seen: the median of 2, 5 and 9
        angle += degrees
        with torch.no_grad():
            model[0].weight.copy_(at_degrees(angle, angle))
        turned()
    (row,) = turned.rows()
    assert row["turn_per_step"] == pytest.approx(5, rel=1e-4)
    assert row["turned"] == pytest.approx(176, rel=1e-4)


def test_medians_are_those_of_literal_angles_in_float64() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 2), nn.Conv1d(3, 5, 1))
    kernels = module_kernels(model).kernels
    turned, history = TurnMonitor(model), [[layer.weight.detach().clone() for layer in model]]
    for _ in range(3):
        with torch.no_grad():
            for layer in model:
                layer.weight.add_(0.1 * torch.randn_like(layer.weight))
        turned()
        history.append([layer.weight.detach().clone() for layer in model])
    for place, (kernel, row) in enumerate(zip(kernels, turned.rows(), strict=True)):
        filters = [kernel.to_filters(weights[place]).flatten(0, 1) for weights in history]
        per_step = [literal_angle(a, b) for now, then in pairwise(filters) for a, b in zip(now, then, strict=True)]
        since_start = [literal_angle(a, b) for a, b in zip(filters[0], filters[-1], strict=True)]
        assert row["turn_per_step"] == pytest.approx(median_low(per_step), rel=1e-5)
        assert row["turned"] == pytest.approx(median_low(since_start), rel=1e-5)
        norms = [one.double().norm().item() for one in filters[-1]]
        assert row["norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_reading_the_rows_waits_for_the_device_once() -> None:
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    turned = TurnMonitor(model)
    with Waits() as waits:
        turned()
        turned.rows()
    assert waits.count == 0  # `tolist` of all figures together is no such read


def test_a_parametrized_layer_counts_with_the_weight_that_it_computes() -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)))
    turned = TurnMonitor(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)  # the norms alone
    turned()
    assert turned.rows()[0]["turned"] == pytest.approx(0, abs=1e-3)


def test_a_number_of_steps_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="`every` is 0; expected a number of steps, 1 or more"):
        TurnMonitor(nn.Sequential(nn.Conv2d(3, 4, 3)), every=0)


def small_network() -> nn.Sequential:
    layers = (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rescaling_is_the_same_training_as_another_rate_of_the_kernels(momentum: float) -> None:
    """Kernels scaled by f at the rate η, and kernels as they are at η/f²: equal in float64, with ε scaled by f²."""
    factor, lr = 0.07, 0.01
    scaled, plain = small_network().double(), small_network().double()
    plain.load_state_dict(scaled.state_dict())
    for layer in scaled:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(factor)
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps *= factor**2
    optimizers = [
        make_optimizer(scaled, Arguments(lr=lr, momentum=momentum)),
        make_optimizer(plain, Arguments(lr=lr, momentum=momentum, kernel_lr=lr / factor**2)),
    ]
    turned = [TurnMonitor(scaled), TurnMonitor(plain)]
    for _ in range(12):
        images, labels = torch.randn(8, 3, 8, 8).double(), torch.randint(3, (8,))
        losses = []
        for model, optimizer, monitor in zip((scaled, plain), optimizers, turned, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            monitor()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        expected = factor * theirs if theirs.ndim == 4 else theirs
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(turned[0].rows(), turned[1].rows(), strict=True):
        assert ours["turned"] == pytest.approx(theirs["turned"], rel=1e-5)


def groups_of(arguments: Arguments) -> list[dict[str, Any]]:
    return make_optimizer(small_network(), arguments).param_groups


def test_weight_decay_leaves_biases_and_batch_norm_alone() -> None:
    decays = {
        parameter.ndim > 1: group["weight_decay"]
        for group in groups_of(Arguments(weight_decay=0.1))
        for parameter in group["params"]
    }
    assert decays == {True: 0.1, False: 0.0}
    (everything,) = groups_of(Arguments(weight_decay=0.1, decay="all"))
    assert everything["weight_decay"] == 0.1
    assert len(groups_of(Arguments(kernel_lr=0.5, weight_decay=0.1, decay="all"))) == 2


def test_kernels_keep_their_share_of_a_scheduled_rate() -> None:
    data = load_dataset("digits", Path()).limited(60, 30)
    arguments = replace(SMALL, schedule="cosine", lr=0.001, kernel_lr=0.004, epochs=1)
    trainer = Trainer(build_network("cnn:4"), data, arguments, CPU)
    seen: list[tuple[float, ...]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(tuple(group["lr"] for group in optimizer.param_groups))
    )
    trainer.run_epoch()
    assert len(seen) == 3
    assert all(kernels == pytest.approx(4 * others) for kernels, others in seen)
    assert seen[0][1] > seen[2][1]


def test_arguments_without_decay_mean_all_and_differ_only_with_decay() -> None:
    old = {name: value for name, value in asdict(replace(SMALL, weight_decay=0.1)).items() if name != "decay"}
    read = make_arguments(old, Path("args.json"))
    assert read.decay == "all"
    assert read.identity() != replace(SMALL, weight_decay=0.1).identity()
    without = make_arguments({**old, "weight_decay": 0.0}, Path("args.json"))
    assert without.identity() == SMALL.identity()


def test_a_run_keeps_how_far_its_filters_turned(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, mode="init", preserve_norm=True), tmp_path, "one")
    train_run(run)
    with (run.folder / "layers.csv").open() as file:
        assert next(csv.reader(file)) == list(LAYER_COLUMNS) == ["epoch", "layer", "norm", "turn_per_step", "turned"]
    rows = read_layers(run.folder)
    assert [(row["epoch"], row["layer"]) for row in rows] == [
        (epoch, f"{layer}.weight") for epoch in (1, 2, 3) for layer in (0, 4, 8, 12)
    ]
    model = build_with_weights(run.arguments, 10)
    torch.manual_seed(run.arguments.seed)
    with torch.no_grad():
        prepare_(model, run.arguments, lambda: torch.empty(0), lambda _: None)
    last = load_file(run.folder / "last.safetensors")
    for kernel, row in zip(module_kernels(model).kernels, rows[-4:], strict=True):
        angles = filter_angles(kernel, last[kernel.name], weight_of(model, kernel).detach())
        assert row["turned"] == pytest.approx(angles.nanmedian().item(), rel=1e-4)
        assert 0 < row["turn_per_step"] < row["turned"]
        norms = last[kernel.name].flatten(1).norm(dim=1)
        assert row["norm"] == pytest.approx(norms.mean().item(), rel=1e-5)


def test_a_turn_per_step_is_taken_over_four_steps_of_an_epoch() -> None:
    data = load_dataset("digits", Path()).limited(240, 10)
    trainer = Trainer(build_network("cnn:4"), data, replace(SMALL, lr=0.1, momentum=0.9), CPU)
    (kernel, *_) = module_kernels(trainer.model).kernels
    weights = [weight_of(trainer.model, kernel).detach().clone()]
    trainer.optimizer.register_step_post_hook(
        lambda *_: weights.append(weight_of(trainer.model, kernel).detach().clone())
    )
    trainer.train_batches(None)
    assert len(weights) == 13
    turns = torch.cat([filter_angles(kernel, weights[step + 1], weights[step]) for step in (0, 3, 6, 9)])
    assert trainer.turned.rows()[0]["turn_per_step"] == pytest.approx(turns.median().item(), rel=1e-5)


def test_a_resumed_run_has_the_same_layers_and_drops_rows_beyond_it(tmp_path: Path) -> None:
    whole = create_run(SMALL, tmp_path, "whole")
    train_run(whole)
    part = create_run(replace(SMALL, epochs=2), tmp_path, "part")
    train_run(part)
    with (part.folder / "layers.csv").open("a") as file:
        file.write("3,0.weight,1.0,1.0,1.0\n")  # as a crash between two files leaves it
    train_run(open_run(part.folder, epochs=3))
    assert (part.folder / "layers.csv").read_bytes() == (whole.folder / "layers.csv").read_bytes()


def test_a_state_of_before_resumes_with_turns_but_no_total(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, epochs=1), tmp_path, "old")
    train_run(run)
    state = torch.load(run.folder / "state.pt", weights_only=True)
    del state["trainer"]["kernels_at_start"], state["progress"]["layers"]
    torch.save(state, run.folder / "state.pt")
    (run.folder / "layers.csv").unlink()
    train_run(open_run(run.folder, epochs=2))
    rows = read_layers(run.folder)
    assert [row["epoch"] for row in rows] == [2] * 4
    assert all(row["turned"] is None and row["turn_per_step"] > 0 for row in rows)


def test_a_first_step_that_throws_the_filters_out_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(ConvsimWarning, match="the first step turned .* use `warmup` or a lower `lr`, or no `factor`$"):
        train_run(create_run(replace(SMALL, mode="rescale", factor=0.03, epochs=1), tmp_path, "one"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvsimWarning)
        train_run(create_run(replace(SMALL, epochs=1, lr=1e-3), tmp_path, "two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("baseline", (11, 31, 38, 39)),
        ("init-norm", (9, 30, 37, 36)),
        ("init", (35, 81, 82, 85)),
        ("rescale", (35, 80, 83, 84)),
    ],
)
def test_the_filters_of_cnn1_turned_as_far_as_is_known(
    name: str, degrees: tuple[float, ...], checkpoint_dir: Path
) -> None:
    folder = checkpoint_dir.parent / "runs" / f"cnn1-{name}-s0"
    if not folder.exists():
        pytest.skip(f"{folder} is missing")
    arguments = make_arguments(json.loads((folder / "args.json").read_text()), folder / "args.json")
    model = build_with_weights(arguments, 10)
    prepare_(model, arguments, lambda: torch.empty(0), lambda _: None)
    last = load_file(folder / "last.safetensors")
    found = [
        filter_angles(kernel, last[kernel.name], weight_of(model, kernel).detach()).nanmedian().item()
        for kernel in module_kernels(model).kernels
    ]
    assert found == pytest.approx(degrees, abs=1)


def test_layers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, SMALL)
    assert read_layers(run.folder) == []
    (tmp_path / "layers.csv").write_text("epoch,layer\n1,a\n")
    with pytest.raises(InputError, match=r"layers\.csv: cannot be read \(its first line is not"):
        read_layers(run.folder)
