"""What a modern recipe needs: optimizers, schedules, augmentation, label smoothing, validation images, TensorBoard."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from errno import ENOSPC
from math import cos, pi
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file
from torch import Tensor, nn

from convsim_cli.errors import InputError, WriteError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.networks.architectures import build_network
from convsim_cli.settings import declarations
from convsim_cli.training.config import Arguments, make_arguments
from convsim_cli.training.launch import create_run, find_or_create_run, find_run, open_to_resume
from convsim_cli.training.run import COLUMNS, RunCallbacks, best_row, open_run, read_results, train_run
from convsim_cli.training.trainer import VALIDATION_COLUMNS, FlipCrop, Trainer, learning_rate, permutation

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")  # at rates that make a short run learn

CPU = torch.device("cpu")
SMALL = Arguments(arch="cnn:4", dataset="digits", epochs=3, batch_size=20, limit_train=60, limit_test=30)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", Path()).limited(60, 30)


def literal_flip_crop(image: Tensor, mirrored: bool, top: int, left: int) -> Tensor:
    """One image [height, width, 3]: padded by 4 black pixels, cropped, then mirrored."""
    height, width, _ = image.shape
    padded = torch.zeros(height + 8, width + 8, 3, dtype=image.dtype)
    padded[4 : 4 + height, 4 : 4 + width] = image
    crop = padded[top : top + height, left : left + width]
    return crop.flip(1) if mirrored else crop


def test_rates_follow_the_formula_of_warm_up_and_cosine() -> None:
    arguments = Arguments(epochs=4, lr=0.2, schedule="cosine", warmup=1)
    found = [learning_rate(arguments, step, steps=3) for step in range(12)]
    rising = [0.2 * step / 3 for step in (1, 2, 3)]
    falling = [0.1 * (1 + cos(pi * step / 9)) for step in range(9)]
    assert found == pytest.approx(rising + falling)
    constant = replace(arguments, schedule="constant")
    assert [learning_rate(constant, step, 3) for step in range(12)] == pytest.approx(rising + 9 * [0.2])
    all_warm = replace(arguments, warmup=4)
    assert [learning_rate(all_warm, step, 3) for step in range(12)] == pytest.approx([n / 60 for n in range(1, 13)])


def test_every_step_is_taken_at_its_rate(data: Dataset) -> None:
    arguments = replace(SMALL, lr=0.2, schedule="cosine", warmup=1)
    trainer = Trainer(build_network("cnn:4"), data, arguments, CPU)
    taken: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: taken.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        trainer.run_epoch()
    falling = [0.1 * (1 + cos(pi * step / 6)) for step in range(6)]
    assert taken == pytest.approx([0.2 / 3, 0.4 / 3, 0.2, *falling])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_modern_epoch_matches_a_plain_loop_written_by_hand(data: Dataset, optimizer: str) -> None:
    recipe: dict[str, Any] = {"adamw": {"optimizer": "adamw"}, "sgd": {"momentum": 0.9, "nesterov": True}}[optimizer]
    arguments = replace(
        SMALL,
        **recipe,
        lr=0.01,
        weight_decay=0.1,
        label_smoothing=0.2,
        augment="flip-crop",
        schedule="cosine",
        warmup=1,
    )
    trainer = Trainer(build_network("cnn:4"), data, arguments, CPU)
    model = build_network("cnn:4").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]  # biases and batch norm
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    by_hand: torch.optim.Optimizer = torch.optim.AdamW(groups)
    if optimizer == "sgd":
        by_hand = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    crops = FlipCrop.draw(60, 0, 0, CPU)
    losses = []
    for step, indices in enumerate(permutation(60, 0, 0).split(20), 1):
        images = torch.stack(
            [
                literal_flip_crop(data.train.images[i], bool(crops.mirrored[i]), *crops.corners[i].tolist())
                for i in indices.tolist()
            ]
        )
        shares = 0.8 * nn.functional.one_hot(data.train.labels[indices], 10) + 0.02
        loss = -(shares * model(data.normalize(images)).log_softmax(1)).sum(1).mean()
        for group in by_hand.param_groups:
            group["lr"] = 0.01 * step / 3
        by_hand.zero_grad()
        loss.backward()
        by_hand.step()
        losses.append(loss.item())
    assert trainer.run_epoch()["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    for (name, found), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        if name.endswith("weight"):  # a bias before batch normalization has a gradient of rounding errors only
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_crops_and_flips_are_those_of_each_image_alone() -> None:
    images = torch.randint(0, 256, (40, 7, 5, 3), dtype=torch.uint8)
    crops = FlipCrop.draw(40, 3, 2, CPU)
    indices = torch.randperm(40)
    found = crops.apply(images[indices], indices)
    for place, index in enumerate(indices.tolist()):
        expected = literal_flip_crop(images[index], bool(crops.mirrored[index]), *crops.corners[index].tolist())
        assert torch.equal(found[place], expected)
        assert torch.equal(crops.apply(images[[index]], torch.tensor([index]))[0], expected)  # whatever its batch


def test_seed_and_epoch_alone_decide_the_crops_which_are_uniform() -> None:
    torch.manual_seed(5)
    first = FlipCrop.draw(9000, 3, 2, CPU)
    torch.manual_seed(6)
    again = FlipCrop.draw(9000, 3, 2, CPU)
    assert torch.equal(first.mirrored, again.mirrored)
    assert torch.equal(first.corners, again.corners)
    for seed, epoch in ((3, 3), (4, 2)):
        assert not torch.equal(first.corners, FlipCrop.draw(9000, seed, epoch, CPU).corners)
    assert first.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)
    for axis in range(2):
        counts = first.corners[:, axis].bincount()
        assert len(counts) == 9
        assert counts.min() > 850


def test_test_images_and_statistics_are_not_augmented(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(build_network("cnn:4"), data, replace(SMALL, augment="flip-crop"), CPU)
    augmented: list[Tensor] = []

    def noted(_: FlipCrop, images: Tensor, indices: Tensor) -> Tensor:
        augmented.append(indices)
        return images

    monkeypatch.setattr(FlipCrop, "apply", noted)
    trainer.run_epoch()
    assert torch.equal(torch.cat(augmented), permutation(60, SMALL.seed, 0))


def test_a_validation_image_is_never_trained_on(data: Dataset) -> None:
    arguments = replace(SMALL, validation=15, augment="flip-crop", epochs=2)
    rows, weights = [], []
    for shade in (None, 255):
        images, labels = data.train.images.clone(), data.train.labels.clone()
        if shade is not None:
            images[45:], labels[45:] = shade, 0
        trainer = Trainer(
            build_network("cnn:4"), replace(data, train=Split(images, labels)).hold_out(15), arguments, CPU
        )
        assert (len(trainer.dataset.train), trainer.steps) == (45, 3)
        rows.append([trainer.run_epoch() for _ in range(2)])
        weights.append(trainer.model.state_dict())  # with the statistics of batch normalization
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [row["test_loss"] for row in rows[0]] == [row["test_loss"] for row in rows[1]]
    assert [row["validation_loss"] for row in rows[0]] != [row["validation_loss"] for row in rows[1]]


def test_the_last_training_images_are_held_out_and_must_leave_some(data: Dataset) -> None:
    held = data.hold_out(15)
    assert held.validation is not None
    assert torch.equal(held.train.images, data.train.images[:45])
    assert torch.equal(held.validation.labels, data.train.labels[45:])
    assert data.hold_out(None) is data
    with pytest.raises(InputError, match="`validation` 60: expected fewer than the 60 training images"):
        data.hold_out(60)


def test_the_best_epoch_is_chosen_on_validation_images(tmp_path: Path) -> None:
    rows = [{"validation_accuracy": v, "test_accuracy": t} for v, t in ((50, 70), (60, 40), (60, 90))]
    assert best_row(rows) is rows[1]
    run = create_run(replace(SMALL, validation=15, lr=0.3, epochs=4), tmp_path, "run")
    summary = train_run(run)
    found = read_results(run.folder)
    assert tuple(found[0]) == COLUMNS + VALIDATION_COLUMNS
    best = max(found, key=lambda row: row["validation_accuracy"])
    assert summary["best_epoch"] == best["epoch"]
    assert summary["best_validation_accuracy"] == best["validation_accuracy"]
    assert summary["best_test_accuracy"] == best["test_accuracy"]
    model = build_network("cnn:4")
    model.load_state_dict(load_file(run.folder / "best.safetensors"))
    held = load_dataset("digits", Path()).limited(60, 30).hold_out(15)
    from convsim_cli.inputs.images import evaluation_totals

    assert held.validation is not None
    correct = evaluation_totals(model, held, held.validation, CPU)[1].item()
    assert 100 * correct / 15 == pytest.approx(best["validation_accuracy"])


def test_a_run_without_an_epoch_has_the_header_of_its_results(tmp_path: Path) -> None:
    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    run = create_run(replace(SMALL, validation=15), tmp_path, "run")
    with pytest.raises(KeyboardInterrupt):
        train_run(run, RunCallbacks(progress=stop))
    assert (run.folder / "results.csv").read_text() == ",".join(COLUMNS + VALIDATION_COLUMNS) + "\n"


def test_with_a_cosine_schedule_the_number_of_epochs_belongs_to_the_run(tmp_path: Path) -> None:
    cosine = replace(SMALL, schedule="cosine")
    run = create_run(cosine, tmp_path, "run")
    train_run(run)
    with pytest.raises(InputError, match=r"`epochs` 5: the run .*run has 3, .* depend on their number"):
        open_to_resume(run.folder, {"epochs": 5})
    assert open_to_resume(run.folder, {"epochs": 3}).arguments == cosine
    with pytest.raises(InputError, match=r"belongs to a run with epochs = 3, args\.json says 5"):
        train_run(open_run(run.folder, epochs=5))
    assert find_run(replace(cosine, epochs=2), tmp_path) is None
    assert find_run(replace(cosine, epochs=5), tmp_path) is None
    assert find_or_create_run(cosine, tmp_path, "new").folder == run.folder
    assert find_or_create_run(replace(cosine, epochs=5), tmp_path, "new").folder == tmp_path / "new"
    assert find_run(SMALL, tmp_path) is None


def test_arguments_of_before_mean_the_defaults(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "old")
    new = {"optimizer", "nesterov", "schedule", "warmup", "augment", "label_smoothing", "validation", "tensorboard"}
    old = {name: value for name, value in asdict(SMALL).items() if name not in new}
    (run.folder / "args.json").write_text(json.dumps(old))
    assert make_arguments(old, run.folder) == SMALL
    assert train_run(open_run(run.folder))["epochs"] == 3
    assert find_run(SMALL, tmp_path) is not None
    assert new <= declarations(Arguments).keys()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nesterov": True}, "`nesterov` requires a `momentum` above 0"),
        ({"optimizer": "adamw", "momentum": 0.9}, "`momentum` requires `optimizer` sgd, got `optimizer` adamw"),
        ({"optimizer": "adamw", "nesterov": True}, "`nesterov` requires `optimizer` sgd, got `optimizer` adamw"),
        ({"warmup": 4}, "`warmup` 4: expected no more than the run's `epochs` 3"),
        ({"label_smoothing": 1.5}, "`label_smoothing` 1.5: expected a number from 0 to 1"),
        ({"validation": 0}, "`validation` 0: expected a whole number above 0"),
        ({"optimizer": "adam"}, "`optimizer` adam: expected sgd or adamw"),
    ],
)
def test_contradictions_in_a_recipe_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(SMALL, **wrong).check()


def test_too_many_validation_images_are_refused_before_a_folder_is_created(tmp_path: Path, convsim: Convsim) -> None:
    small = ("--dataset", "digits", "--limit-train", 20, "--validation", 20)
    outcome = convsim("train", *small, "--run-dir", tmp_path / "runs")
    assert (outcome.code, "--validation 20: expected fewer than the 20 training images" in outcome.error) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_a_cosine_run_from_the_command_line_keeps_its_length(tmp_path: Path, convsim: Convsim) -> None:
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 60, "--limit-test", 30, "--epochs", 2)
    recipe = ("--optimizer", "adamw", "--schedule", "cosine", "--warmup", 1, "--augment", "flip-crop")
    targets = ("--label-smoothing", 0.1, "--validation", 10)
    outcome = convsim("train", *small, *recipe, *targets, "--run-dir", tmp_path, "--name", "x", "--json")
    assert outcome.code == 0, outcome.err
    assert "best_validation_accuracy" in outcome.document["runs"][0]
    assert sum("validation" in line for line in outcome.err.splitlines() if line.startswith("epoch")) == 2
    refused = convsim("train", "--resume", tmp_path / "x", "--epochs", 3)
    assert (refused.code, "--epochs 3: the run" in refused.error) == (2, True)
    assert "(--schedule cosine); start a new run" in refused.error
    assert convsim("compare", tmp_path / "x").rows[0]["epochs"] == "2"


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")

    def full(*_: object, **__: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    module.SummaryWriter = full  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = create_run(replace(SMALL, tensorboard=True), tmp_path, "run")
    with pytest.raises(WriteError, match=r"run/tensorboard: cannot be written \(No space left on device\)"):
        train_run(run)
    writer = SimpleNamespace(add_scalar=full, flush=lambda: None, close=full)  # the disk fills up later
    module.SummaryWriter = lambda *_, **__: writer  # type: ignore[attr-defined]
    with pytest.raises(WriteError, match=r"run/tensorboard: cannot be written \(No space left on device\)"):
        train_run(run)


def test_without_tensorboard_a_line_names_the_extra(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = convsim("train", "--dataset", "digits", "--tensorboard", "--run-dir", tmp_path / "runs")
    assert outcome.code == 2
    assert "--tensorboard requires the package tensorboard" in outcome.error
    assert "pip install 'convsim[tensorboard]'" in outcome.error
    assert not (tmp_path / "runs").exists()
    run = create_run(replace(SMALL, tensorboard=True), tmp_path, "run")
    with pytest.raises(InputError, match="`tensorboard` requires"):
        train_run(run)


def test_tensorboard_gets_every_figure_and_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = create_run(replace(SMALL, tensorboard=True, validation=15, epochs=2), tmp_path, "run")
    train_run(run)
    train_run(open_run(run.folder, epochs=3))
    folder = str(run.folder / "tensorboard")
    assert opened == [(folder, 1), (folder, 3)]
    rows = read_results(run.folder)
    assert written == [(name, row[name], row["epoch"]) for row in rows for name in row if name != "epoch"]
    assert find_run(replace(SMALL, validation=15, epochs=3), tmp_path) is not None
