from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convsim_cli import ConvSimPenalty, minimize_
from convsim_cli.errors import ConvsimError, DivergedError, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset
from convsim_cli.networks.names import build_network
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.batches import permutation
from convsim_cli.training.modes import MODES
from convsim_cli.training.trainer import Trainer, _compiled, choose_algorithms

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", Path()).limited(50, 20)


def prepare_(model: nn.Module, arguments: Arguments) -> list[int]:
    """Do to a network what its mode does before training, and return what it reports on the way."""
    told: list[int] = []
    if preparation := MODES[arguments.mode].preparation:
        preparation.apply_(model, arguments, told.append)
    return told


def norms(model: nn.Module) -> Tensor:
    return torch.cat([weight.flatten(1).norm(dim=1) for name, weight in model.named_parameters() if weight.ndim == 4])


def directions(model: nn.Module) -> Tensor:
    units = [nn.functional.normalize(w.detach().flatten(1)).flatten() for w in model.parameters() if w.ndim == 4]
    return torch.cat(units)


@pytest.mark.parametrize("mode", ["baseline", "reg"])
@pytest.mark.parametrize("schedule", ["constant", "loss"])
def test_an_epoch_matches_a_plain_loop_written_by_hand(data: Dataset, mode: str, schedule: str) -> None:
    if (mode, schedule) == ("baseline", "loss"):
        schedule = "constant"
    arguments = Arguments(mode=mode, batch_size=20, lr=0.05, beta=0.01, beta_schedule=schedule)  # type: ignore[arg-type]
    trainer = Trainer(build_network("cnn:4"), data, arguments, CPU)
    row = trainer.run_epoch()
    model = build_network("cnn:4").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    penalty = ConvSimPenalty(model)
    total, first = 0.0, None
    for indices in permutation(50, 0, 0).split(20):
        loss = nn.functional.cross_entropy(
            model(data.normalize(data.train.images[indices])), data.train.labels[indices]
        )
        first = first or loss.item()
        beta = 0.01 * (loss.item() / first if schedule == "loss" else 1) if mode == "reg" else 0
        optimizer.zero_grad()
        (loss + beta * penalty()).backward()
        optimizer.step()
        total += loss.item() * len(indices)
    assert row["train_loss"] == pytest.approx(total / 50, rel=1e-5)
    for found, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert row["cs"] == pytest.approx(penalty().item(), rel=1e-4)
    assert tuple(row) == ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "cs", "seconds")


def test_every_image_is_drawn_once_an_epoch_in_an_order_of_its_own() -> None:
    orders = [permutation(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], permutation(50, 0, 0))


def test_init_is_algorithm_1_and_rescale_has_its_norms_with_the_old_directions() -> None:
    fresh, initialized, rescaled, reference = (build_network("cnn:8") for _ in range(4))
    minimize_(reference, 50)
    prepare_(initialized, Arguments(mode="init", iterations=50))
    prepare_(rescaled, Arguments(mode="rescale", iterations=50))
    assert all(torch.equal(a, b) for a, b in zip(initialized.parameters(), reference.parameters(), strict=True))
    torch.testing.assert_close(norms(rescaled), norms(reference))
    torch.testing.assert_close(directions(rescaled), directions(fresh))
    assert not torch.allclose(directions(initialized), directions(fresh), atol=1e-3)


def test_init_and_rescale_follow_the_objective() -> None:
    initialized, rescaled, reference = (build_network("cnn:8") for _ in range(3))
    minimize_(reference, 50, objective="kernel")
    prepare_(initialized, Arguments(mode="init", iterations=50, objective="kernel"))
    prepare_(rescaled, Arguments(mode="rescale", iterations=50, objective="kernel"))
    assert all(torch.equal(a, b) for a, b in zip(initialized.parameters(), reference.parameters(), strict=True))
    torch.testing.assert_close(norms(rescaled), norms(reference))


def test_norm_preserved_directions_can_be_brought_to_the_norms_of_raw_init() -> None:
    preserved, both, raw = (build_network("cnn:8") for _ in range(3))
    prepare_(preserved, Arguments(mode="init", preserve_norm=True, iterations=50))
    prepare_(both, Arguments(mode="init", preserve_norm=True, rescale=True, iterations=50))
    minimize_(raw, 50)
    torch.testing.assert_close(norms(preserved), norms(build_network("cnn:8")))
    torch.testing.assert_close(norms(both), norms(raw))
    torch.testing.assert_close(directions(both), directions(preserved))


@pytest.mark.parametrize(
    ("options", "minimizations"),
    [({"mode": "init"}, 1), ({"mode": "rescale"}, 1)]
    + [({"mode": "init", "preserve_norm": True, "rescale": rescale}, 1 + rescale) for rescale in (False, True)],
)
def test_progress_is_told_of_every_step_of_the_preparation(options: dict[str, object], minimizations: int) -> None:
    model, arguments = build_network("cnn:4"), Arguments(**options, iterations=10)  # type: ignore[arg-type]
    values = sum(weight.numel() for weight in model.parameters() if weight.ndim == 4)
    steps = 10 * values * minimizations
    preparation = MODES[arguments.mode].preparation
    assert preparation is not None
    assert preparation.steps(model, arguments) == steps
    assert sum(prepare_(model, arguments)) == steps


def test_a_loss_that_is_no_longer_finite_stops_the_run(data: Dataset) -> None:
    trainer = Trainer(build_network("cnn:4"), data, Arguments(lr=1e30, batch_size=10), CPU)
    with pytest.raises(DivergedError, match=r"epoch 1: the loss is .* lower `lr`"):
        trainer.run_epoch()
    assert trainer.epoch == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_state_continues_bit_identically_including_dropout(data: Dataset, precision: str) -> None:
    def trainer(seed: int) -> Trainer:
        model = nn.Sequential(build_network("cnn:4", seed=seed), nn.Dropout(0.3))
        return Trainer(model, data, arguments, CPU)

    arguments = Arguments(mode="reg", beta_schedule="loss", momentum=0.9, batch_size=20, precision=precision)  # type: ignore[arg-type]
    whole = trainer(seed=0)
    whole.run_epoch()
    stored = io.BytesIO()
    torch.save(whole.state(), stored)
    expected = whole.run_epoch()
    resumed = trainer(seed=9)
    stored.seek(0)
    resumed.load_state(torch.load(stored, weights_only=True))
    found = resumed.run_epoch()
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_on_the_cpu_tf32_is_float32_to_the_bit(data: Dataset) -> None:
    rows = [
        Trainer(
            build_network("cnn:4"), data, Arguments(mode="reg", batch_size=20, precision=precision), CPU
        ).run_epoch()
        for precision in ("fp32", "tf32")
    ]
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_chooses_its_algorithms_by_time_unless_they_are_to_be_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    choose_algorithms(deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic


@pytest.mark.parametrize(("kind", "mode"), [("cpu", None), ("cuda", "reduce-overhead")])
def test_a_compiled_network_is_replayed_as_a_graph_on_cuda(
    kind: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda _, mode: mode)
    assert _compiled(nn.Identity(), torch.device(kind)) == mode


def test_a_data_set_that_does_not_fit_on_the_device_says_what_to_do_in_one_line(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nSee documentation …")

    monkeypatch.setattr(Dataset, "to", refuse)
    with pytest.raises(ConvsimError, match=r"^the 70 images of digits .* do not fit .* lower `limit_train`") as caught:
        Trainer(build_network("cnn:4"), data, Arguments(), CPU)
    assert "\n" not in str(caught.value)


def test_compiled_training_gives_the_same_loss(data: Dataset) -> None:
    plain, compiled = (
        Trainer(build_network("cnn:4"), data, Arguments(compile=compile_, batch_size=25), CPU).run_epoch()
        for compile_ in (False, True)
    )
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "`epochs` 0: expected a number above 0"),
        ({"lr": -1.0}, "`lr` -1.0: expected a number above 0"),
        ({"beta": -0.1}, "`beta` -0.1: expected a number of 0 or above"),
        ({"rescale": True}, "`rescale` goes with `mode` init and `preserve_norm`"),
        ({"preserve_norm": True}, "`preserve_norm` goes with `mode` init, got `mode` baseline"),
        ({"objective": "kernel"}, "`objective` goes with `mode` init, reg, rescale, got `mode` baseline"),
        ({"mode": "reg", "objective": "neighbors"}, "unknown `objective` 'neighbors'; did you mean 'neighbours'"),
        ({"beta_schedule": "loss"}, "`beta_schedule` goes with `mode` reg"),
    ],
)
def test_options_that_a_mode_would_ignore_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(Arguments(), **wrong).check()  # type: ignore[arg-type]
