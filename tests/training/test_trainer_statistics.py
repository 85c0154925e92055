"""`bn_statistics`: what batch normalization uses when a network in training is evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.networks.architectures import build_network
from convsim_cli.training.config import Arguments, make_arguments
from convsim_cli.training.launch import create_run, find_run
from convsim_cli.training.prepare import check_network, prepare_
from convsim_cli.training.run import open_run, read_results, train_run
from convsim_cli.training.trainer import Trainer, permutation, statistics_batches

CPU = torch.device("cpu")
SMALL = Arguments(arch="cnn:4", dataset="digits", epochs=3, batch_size=20, limit_train=60, limit_test=30, lr=0.1)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", Path()).limited(60, 30)


def network() -> nn.Module:
    return nn.Sequential(build_network("cnn:4"), nn.Dropout(0.3))


def trained(data: Dataset, how: Any, epochs: int = 2, model: nn.Module | None = None) -> tuple[Trainer, list[float]]:
    torch.manual_seed(1)  # of the dropout
    trainer = Trainer(model or network(), data, replace(SMALL, bn_statistics=how), CPU)
    return trainer, [trainer.run_epoch()["test_loss"] for _ in range(epochs)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def by_hand(model: nn.Module, data: Dataset) -> Iterator[tuple[str, Tensor]]:
    """The statistics of each layer's inputs over the first images of epoch 0, with those of the layers before it."""
    images = data.normalize(data.train.images[permutation(60, 0, 0)])
    for layer in model.eval()[0]:  # type: ignore[index]
        if isinstance(layer, nn.BatchNorm2d):
            mean, variance = images.mean((0, 2, 3)), images.var((0, 2, 3))
            yield from (("mean", mean), ("var", variance))
            images = nn.functional.batch_norm(images, mean, variance, layer.weight, layer.bias)
        else:
            images = layer(images)


def test_precise_leaves_the_statistics_of_the_training_images_in_the_model(data: Dataset) -> None:
    trainer, _ = trained(data, "precise")
    with torch.no_grad():
        expected = list(by_hand(trainer.model, data))
    found = list(statistics(trainer.model).values())
    for statistic, (_, value) in zip(found, expected, strict=True):
        torch.testing.assert_close(statistic, value, rtol=1e-3, atol=1e-4)


def test_training_is_the_same_to_the_bit_whatever_evaluation_uses(data: Dataset) -> None:
    precise, running, batch = (trained(data, how)[0].model for how in ("precise", "running", "batch"))
    for other in (precise, batch):
        differing = {
            name
            for (name, tensor), value in zip(running.state_dict().items(), other.state_dict().values(), strict=True)
            if not torch.equal(tensor, value)
        }
        assert differing == (set(statistics(other)) if other is precise else set())


def test_batch_evaluates_each_batch_by_its_own_statistics(data: Dataset) -> None:
    trainer, losses = trained(data, "batch")
    model = trainer.model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    logits = model(data.normalize(data.test.images))
    assert nn.functional.cross_entropy(logits, data.test.labels).item() == pytest.approx(losses[-1], rel=1e-4)


class Frozen(nn.Sequential):
    """A network whose owner keeps its first batch normalization in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[0][1].eval()
        return self


def test_a_layer_kept_in_evaluation_mode_keeps_its_statistics(data: Dataset) -> None:
    trainer, _ = trained(data, "precise", model=Frozen(build_network("cnn:4")))
    first, second, *_ = (name for name in statistics(trainer.model) if name.endswith("mean"))
    assert not statistics(trainer.model)[first].any()
    assert statistics(trainer.model)[second].any()


@pytest.mark.parametrize(
    ("images", "side", "processes", "sizes"),
    [
        (50_000, 32, 1, 8 * [512]),
        (50_000, 32, 4, 8 * [512]),
        (50_000, 32, 3, 9 * [455]),  # the last image is left out
        (5_000, 224, 1, 64 * [64]),
        (60, 32, 1, [60]),
        (60, 32, 2, 2 * [30]),
        (1_000, 32, 1, 2 * [500]),
        (1_021, 32, 1, 2 * [510]),  # a prime number of images: the last one is left out
        (3, 4096, 2, 2 * [1]),
        (1, 32, 1, [1]),
    ],
)
def test_statistics_are_taken_over_4096_images_in_equal_batches(
    images: int, side: int, processes: int, sizes: list[int]
) -> None:
    split = Split(torch.empty(images, 1, 1, 3).expand(images, side, side, 3), torch.empty(images))
    batches = statistics_batches(split, 3, processes)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), permutation(images, 3, 0)[: sum(sizes)])


def test_each_process_takes_all_images_if_there_are_fewer_than_processes() -> None:
    split = Split(torch.empty(2, 4, 4, 3), torch.empty(2))
    assert [sorted(batch.tolist()) for batch in statistics_batches(split, 0, processes=3)] == 3 * [[0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["precise", "running", "batch"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, how: Any) -> None:
    arguments = replace(SMALL, bn_statistics=how)
    whole, part = (create_run(replace(arguments, epochs=n), tmp_path, f"run{n}") for n in (3, 1))
    train_run(whole)
    train_run(part)
    train_run(open_run(part.folder, epochs=3))
    one, two = ([{**row, "seconds": 0} for row in read_results(run.folder)] for run in (whole, part))
    assert one == two
    first, second = (load_file(run.folder / "last.safetensors") for run in (whole, part))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_an_earlier_versions_run_resumes_with_running_statistics(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, bn_statistics="running", epochs=1), tmp_path, "old")
    train_run(run)
    _make_old(run.folder)
    assert open_run(run.folder).arguments.bn_statistics == "running"
    assert find_run(replace(SMALL, epochs=1), tmp_path) is None
    found = find_run(replace(SMALL, epochs=1, bn_statistics="running"), tmp_path)
    assert found is not None
    assert found.folder == run.folder
    whole = create_run(replace(SMALL, bn_statistics="running"), tmp_path, "whole")
    train_run(whole)
    train_run(open_run(run.folder, epochs=3))
    assert [row["test_loss"] for row in read_results(run.folder)] == [
        row["test_loss"] for row in read_results(whole.folder)
    ]


def _make_old(folder: Path) -> None:
    """Write a run's arguments as version 0.1 wrote them."""

    def old(arguments: dict[str, Any]) -> dict[str, Any]:
        assert (arguments.pop("objective"), arguments.pop("method")) == ("cs", "cs")
        for new in ("bn_statistics", "folder_digest"):
            del arguments[new]
        return arguments | {"pairs": "all"}

    (folder / "args.json").write_text(json.dumps(old(json.loads((folder / "args.json").read_text()))))
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save(state | {"arguments": old(state["arguments"])}, folder / "state.pt")


def test_an_args_json_without_bn_statistics_means_running(tmp_path: Path) -> None:
    values = asdict(SMALL)
    del values["bn_statistics"]
    assert make_arguments(values, tmp_path).bn_statistics == "running"
    assert Arguments().bn_statistics == "precise"


def test_a_test_set_of_one_image_cannot_be_evaluated_by_its_own_statistics(data: Dataset) -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.LazyLinear(10), nn.BatchNorm1d(10))
    flat(data.normalize(data.train.images[:2]))
    one = replace(SMALL, limit_test=1)
    check_network(flat, one, data)
    with pytest.raises(InputError, match="`bn_statistics` batch: the test set of 1 images leaves one image"):
        check_network(flat, replace(one, bn_statistics="batch"), data)


def test_checking_a_network_leaves_no_trace(data: Dataset) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(3600, 10))
    model[1].eval()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    check_network(model, replace(SMALL, limit_train=21, batch_size=20), data)  # runs on a batch of one in training mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("settings", [{"mode": "init"}, {"mode": "rescale"}, {"mode": "init+reg", "method": "dct"}])
def test_a_mode_that_can_write_to_no_kernel_is_refused(settings: dict[str, Any], data: Dataset) -> None:
    normalized = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, stride=4))
    model = nn.Sequential(normalized, nn.Flatten(), nn.Linear(256, 10))
    check_network(model, SMALL, data)
    message = rf"`mode` {re.escape(settings['mode'])} can write to no convolution kernels .*0\.weight \(parametrized"
    with pytest.raises(InputError, match=message):
        check_network(model, replace(SMALL, **settings), data)


def test_layers_that_a_mode_cannot_write_to_are_named() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    with pytest.warns(ConvsimWarning, match=r"skips 0\.weight \(parametrized"):
        prepare_(model, replace(SMALL, mode="init"), lambda: torch.empty(0), lambda _: None)
