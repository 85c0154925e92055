from __future__ import annotations

import copy
import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convsim_cli.closed_forms import decorrelate_, orthogonalize_
from convsim_cli.errors import ConvsimError, DivergedError, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.minimize import minimize_
from convsim_cli.networks.architectures import build_network
from convsim_cli.penalty import ConvSimPenalty
from convsim_cli.training.config import MODES, Arguments
from convsim_cli.training.prepare import count_steps, first_images
from convsim_cli.training.prepare import prepare_ as prepare_network_
from convsim_cli.training.trainer import Trainer, choose_algorithms, compile_network, permutation

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")  # at rates that make a short run learn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", Path()).limited(50, 20)


def prepare_(model: nn.Module, arguments: Arguments) -> list[int]:
    """Do to a network what its mode does before training, and return what it reports on the way."""
    told: list[int] = []
    if MODES[arguments.mode].initializes or MODES[arguments.mode].scales:
        prepare_network_(model, arguments, images, told.append)
    return told


def images() -> Tensor:
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("objective", ["cs", "orthoreg"])
def test_beta_auto_is_one_percent_of_the_gradients_ratio(data: Dataset, objective: str) -> None:
    arguments = Arguments(mode="reg", beta="auto", objective=objective, batch_size=20)
    automatic = Trainer(build_network("cnn:4"), data, arguments, CPU)
    assert automatic.state()["beta"] is None
    first = automatic.run_epoch()
    model = build_network("cnn:4").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    indices = permutation(50, 0, 0)[:20]
    nn.functional.cross_entropy(
        model(data.normalize(data.train.images[indices])), data.train.labels[indices]
    ).backward()
    kernels = [weight for weight in model.parameters() if weight.ndim == 4]
    task = torch.cat([weight.grad.flatten() for weight in kernels]).norm()  # type: ignore[union-attr]
    gradients = torch.autograd.grad(ConvSimPenalty(model, objective)(), kernels)
    expected = 0.01 * task / torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert automatic.state()["beta"] == pytest.approx(expected.item(), rel=1e-4)
    given = replace(arguments, beta=automatic.state()["beta"])
    fixed = Trainer(build_network("cnn:4"), data, given, CPU).run_epoch()
    assert {**fixed, "seconds": 0} == {**first, "seconds": 0}


def test_beta_auto_without_a_gradient_to_compare_is_an_error(data: Dataset) -> None:
    model = build_network("cnn:4")
    for weight in model.parameters():
        weight.data.zero_()
    with pytest.raises(DivergedError, match=r"`beta` auto: .* is nan times .*; give `beta` as a number"):
        Trainer(model, data, Arguments(mode="reg", beta="auto"), CPU).run_epoch()


def test_every_image_is_drawn_once_an_epoch_in_an_order_of_its_own() -> None:
    orders = [permutation(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], permutation(50, 0, 0))


def test_rescale_has_the_norms_of_init_and_the_old_directions() -> None:
    fresh, initialized, rescaled, reference = (build_network("cnn:8") for _ in range(4))
    minimize_(reference, 50)
    prepare_(initialized, Arguments(mode="init", iterations=50))
    prepare_(rescaled, Arguments(mode="rescale", iterations=50))
    assert all(torch.equal(a, b) for a, b in zip(initialized.parameters(), reference.parameters(), strict=True))
    torch.testing.assert_close(norms(rescaled), norms(reference))
    torch.testing.assert_close(directions(rescaled), directions(fresh))
    assert not torch.allclose(directions(initialized), directions(fresh), atol=1e-3)


@pytest.mark.parametrize("mode", ["init", "init+reg"])
def test_init_minimizes_its_method_whatever_is_penalized(mode: str) -> None:
    initialized, reference = (build_network("cnn:8") for _ in range(2))
    minimize_(reference, 50, objective="kernel")
    prepare_(initialized, Arguments(mode=mode, iterations=50, method="kernel"))
    assert all(torch.equal(a, b) for a, b in zip(initialized.parameters(), reference.parameters(), strict=True))


def test_a_method_that_keeps_norms_can_be_rescaled_to_those_of_raw_cs() -> None:
    kept, rescaled, raw = (build_network("cnn:8") for _ in range(3))
    how = {"mode": "init", "iterations": 50, "method": "kernel", "preserve_norm": True}
    prepare_(kept, Arguments(**how))  # type: ignore[arg-type]
    prepare_(rescaled, Arguments(**how, rescale=True))  # type: ignore[arg-type]
    minimize_(raw, 50)
    torch.testing.assert_close(norms(rescaled), norms(raw))
    torch.testing.assert_close(directions(rescaled), directions(kept))


def test_norm_preserved_directions_can_be_brought_to_the_norms_of_raw_init() -> None:
    preserved, both, raw = (build_network("cnn:8") for _ in range(3))
    prepare_(preserved, Arguments(mode="init", preserve_norm=True, iterations=50))
    prepare_(both, Arguments(mode="init", preserve_norm=True, rescale=True, iterations=50))
    minimize_(raw, 50)
    torch.testing.assert_close(norms(preserved), norms(build_network("cnn:8")))
    torch.testing.assert_close(norms(both), norms(raw))
    torch.testing.assert_close(directions(both), directions(preserved))


def test_rescale_by_a_factor_scales_every_filter_and_minimizes_nothing() -> None:
    fresh, scaled = build_network("cnn:8"), build_network("cnn:8")
    assert prepare_(scaled, Arguments(mode="rescale", factor=0.25)) == []
    for before, after in zip(fresh.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(after, before / 4 if before.ndim == 4 else before)


@pytest.mark.parametrize("factor", [1e-320, 1e-40, 1e39, 1e300])
def test_a_factor_beyond_the_range_of_the_weights_is_refused(factor: float) -> None:
    model, fresh = build_network("cnn:8"), build_network("cnn:8")
    torch.nn.init.zeros_(model[0].weight)  # zero by itself, which no factor changes
    torch.nn.init.zeros_(fresh[0].weight)
    with pytest.raises(InputError, match=rf"`factor` {re.escape(str(factor))}: .* weights .*float32"):
        prepare_(model, Arguments(mode="rescale", factor=factor))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("method", ["orthogonal", "decorrelate"])
def test_a_closed_form_before_training_is_that_of_the_library(method: str) -> None:
    fresh, prepared, reference = (build_network("cnn:8") for _ in range(3))
    closed_forms = {"orthogonal": orthogonalize_, "decorrelate": lambda model: decorrelate_(model, images())}
    closed_forms[method](reference)
    prepare_(prepared, Arguments(mode="init", method=method))
    assert all(torch.equal(a, b) for a, b in zip(prepared.parameters(), reference.parameters(), strict=True))
    torch.testing.assert_close(norms(prepared), norms(fresh))


@pytest.mark.parametrize("method", ["orthogonal", "decorrelate"])
def test_a_closed_form_can_be_brought_to_the_norms_of_raw_init(method: str) -> None:
    plain, both, raw = (build_network("cnn:8") for _ in range(3))
    prepare_(plain, Arguments(mode="init", method=method))
    prepare_(both, Arguments(mode="init", method=method, rescale=True, iterations=50))
    minimize_(raw, 50)
    torch.testing.assert_close(norms(both), norms(raw))
    torch.testing.assert_close(directions(both), directions(plain), rtol=0, atol=1e-3)  # batch norm's eps sees scale


def test_maps_are_uncorrelated_at_other_norms_without_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3))
    prepare_(model, Arguments(mode="init", method="decorrelate", rescale=True, iterations=50))
    maps = model(images()).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(maps.corrcoef(), torch.eye(8).double(), rtol=0, atol=1e-5)


def test_a_preparation_that_fails_leaves_the_network_as_it_was() -> None:
    fresh, model = build_network("cnn:8"), build_network("cnn:8")
    arguments = Arguments(mode="init", method="decorrelate", rescale=True, iterations=2)
    with pytest.raises(InputError, match="NaN or Inf"):
        prepare_network_(model, arguments, lambda: torch.full((4, 3, 32, 32), torch.nan), lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_decorrelate_sees_the_first_training_images_normalized(data: Dataset) -> None:
    found = first_images(data, CPU)
    assert torch.equal(found, data.normalize(data.train.images))
    many = replace(data, train=Split(data.train.images[:1].repeat(1030, 1, 1, 1), torch.zeros(1030)))
    assert len(first_images(many, CPU)) == 1024


def test_init_and_reg_can_be_combined(data: Dataset) -> None:
    arguments = Arguments(mode="init+reg", iterations=5, beta=0.5, batch_size=50)
    initialized, combined = build_network("cnn:4"), build_network("cnn:4")
    prepare_(initialized, replace(arguments, mode="init"))
    prepare_(combined, arguments)
    assert all(torch.equal(a, b) for a, b in zip(combined.parameters(), initialized.parameters(), strict=True))
    Trainer(initialized, data, replace(arguments, mode="reg"), CPU).run_epoch()
    Trainer(combined, data, arguments, CPU).run_epoch()
    assert all(torch.equal(a, b) for a, b in zip(combined.parameters(), initialized.parameters(), strict=True))


def test_reg_with_preserve_norm_has_no_part_along_the_filters(data: Dataset) -> None:
    plain, raw, projected = (
        Trainer(build_network("cnn:4"), data, Arguments(batch_size=50, **more), CPU)  # type: ignore[arg-type]
        for more in ({}, {"mode": "reg", "beta": 0.5}, {"mode": "reg", "beta": 0.5, "preserve_norm": True})
    )
    fresh = [weight.detach().clone() for weight in plain.model.parameters()]
    for trainer in (plain, raw, projected):
        trainer.run_epoch()
    for before, none, whole, part in zip(fresh, *(t.model.parameters() for t in (plain, raw, projected)), strict=True):
        if before.ndim == 4:
            filters, radial = before.flatten(1).double(), (whole - none).detach().double().flatten(1)
            along = (radial * filters).sum(1, keepdim=True) / filters.square().sum(1, keepdim=True) * filters
            expected = radial - along
            torch.testing.assert_close((part - none).detach().double().flatten(1), expected, rtol=1e-3, atol=1e-7)
            assert along.norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("options", "minimizations"),
    [({"mode": "init"}, 1), ({"mode": "rescale"}, 1)]
    + [({"mode": "init", "preserve_norm": True, "rescale": rescale}, 1 + rescale) for rescale in (False, True)],
)
def test_progress_is_told_of_every_step_of_the_preparation(options: dict[str, object], minimizations: int) -> None:
    model, arguments = build_network("cnn:4"), Arguments(**options, iterations=10)  # type: ignore[arg-type]
    values = sum(weight.numel() for weight in model.parameters() if weight.ndim == 4)
    steps = 10 * values * minimizations
    assert count_steps(model, arguments) == steps
    assert sum(prepare_(model, arguments)) == steps


@pytest.mark.parametrize("method", ["orthogonal", "decorrelate"])
def test_a_closed_form_takes_a_step_per_layer(method: str) -> None:
    arguments = Arguments(mode="init", method=method)
    assert count_steps(build_network("cnn:4"), arguments) == sum(prepare_(build_network("cnn:4"), arguments)) == 4


def test_a_loss_that_is_no_longer_finite_stops_the_run(data: Dataset) -> None:
    trainer = Trainer(build_network("cnn:4"), data, Arguments(lr=1e30, batch_size=10), CPU)
    with pytest.raises(DivergedError, match=r"epoch 1: the loss is .* lower `lr`"):
        trainer.run_epoch()
    assert trainer.epoch == 0


def test_a_loss_that_diverges_is_named_also_where_it_schedules_beta(data: Dataset) -> None:
    how = Arguments(mode="reg", beta_schedule="loss", lr=1e30, batch_size=20)
    with pytest.raises(DivergedError, match=r"^epoch 1: the loss is nan in training; lower `lr` or `beta`$"):
        Trainer(build_network("cnn:4"), data, how, CPU).run_epoch()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_state_continues_bit_identically_including_dropout(data: Dataset, precision: str) -> None:
    def trainer(seed: int) -> Trainer:
        model = nn.Sequential(build_network("cnn:4", seed=seed), nn.Dropout(0.3))
        return Trainer(model, data, arguments, CPU)

    how = {"beta": "auto", "beta_schedule": "loss", "momentum": 0.9}
    arguments = Arguments(mode="reg", batch_size=20, precision=precision, **how)  # type: ignore[arg-type]
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
def test_cudnn_times_its_algorithms_unless_deterministic(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    choose_algorithms(deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic


@pytest.mark.parametrize(("kind", "mode"), [("cpu", None), ("cuda", "reduce-overhead")])
def test_a_compiled_network_is_replayed_as_a_graph_on_cuda(
    kind: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda _, mode, dynamic: (mode, dynamic))
    assert compile_network(nn.Identity(), torch.device(kind)) == (mode, False)  # each size of batch by itself


def test_a_data_set_too_large_for_the_device_is_one_line(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nSee documentation …")

    monkeypatch.setattr(Dataset, "to", refuse)
    with pytest.raises(ConvsimError, match=r"^the 70 images of digits .* do not fit .* lower `limit_train`") as caught:
        Trainer(build_network("cnn:4"), data, Arguments(), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist")  # torch 2.6's own
def test_compiled_training_gives_the_same_loss(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without C++, in seconds
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    plain, compiled = (
        Trainer(copy.deepcopy(model), data, Arguments(compile=compile_, batch_size=25), CPU).run_epoch()
        for compile_ in (False, True)
    )
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist")  # torch 2.6's own
def test_training_and_evaluation_are_compiled_once_for_all_seeds(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    monkeypatch.setattr("convsim_cli.inputs.images.BATCH_PIXELS", 8 * 32 * 32)  # 7, 7 and 6 of 20 images
    data = replace(data, validation=Split(data.train.images[:10], data.train.labels[:10]))
    for seed in range(2):
        model = build_network("cnn:4", seed=seed)
        plain, fast = (
            Trainer(copy.deepcopy(model), data, Arguments(compile=compile_, batch_size=20, seed=seed), CPU)
            for compile_ in (False, True)
        )
        for _ in range(2):
            expected, found = plain.run_epoch(), fast.run_epoch()
            assert {**found, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-5)
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(fast.model.state_dict()[name], value)
    assert len(compiled) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "`epochs` 0: expected a whole number above 0"),
        ({"lr": -1.0}, "`lr` -1.0: expected a number above 0"),
        ({"beta": -0.1}, "`beta` -0.1: expected auto or a number from 0 to 3.4e.38"),
        ({"mode": "reg", "beta": "atuo"}, "`beta` atuo: expected auto or a number from 0 to 3.4e.38"),
        ({"mode": "reg", "beta": 1e300}, "`beta` 1e.300: expected auto or a number from 0 to 3.4e.38"),
        ({"beta": "auto"}, "`beta` auto requires `mode` reg, init.reg, got `mode` baseline"),
        ({"rescale": True}, "`rescale` requires `mode` init, init.reg, got `mode` baseline"),
        ({"mode": "init", "rescale": True}, "`rescale` has no effect after raw `method` cs; add `preserve_norm`"),
        ({"preserve_norm": True}, "`preserve_norm` requires `mode` init, reg, init.reg, got `mode` baseline"),
        ({"objective": "kernel"}, "`objective` requires `mode` reg, init.reg, got `mode` baseline"),
        ({"mode": "init", "objective": "kernel"}, "got `mode` init; init takes `method`"),
        ({"method": "kernel"}, "`method` requires `mode` init, init.reg, got `mode` baseline"),
        ({"mode": "reg", "method": "orthogonal"}, "`method` requires `mode` init, init.reg, got `mode` reg"),
        ({"mode": "init", "method": "orthogonal", "preserve_norm": True}, "already keeps every filter's norm; remove"),
        ({"mode": "orthogonal"}, "`mode` orthogonal was replaced by `mode` init with `method` orthogonal"),
        ({"mode": "reg", "objective": "orthogonal"}, "`objective` orthogonal: expected cs, .* did you mean 'ortho"),
        ({"mode": "init", "factor": 0.5}, "`factor` requires `mode` rescale, got `mode` init"),
        ({"mode": "rescale", "factor": 0.0}, "`factor` 0.0: expected a number above 0"),
        ({"mode": "reg", "objective": "neighbors"}, "`objective` neighbors: .*; did you mean 'neighbours'"),
        ({"beta_schedule": "loss"}, "`beta_schedule` requires `mode` reg, init.reg"),
    ],
)
def test_options_that_a_mode_would_ignore_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(Arguments(), **wrong).check()  # type: ignore[arg-type]


def test_a_network_with_kernels_of_three_axes_is_trained(data: Dataset) -> None:
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels, self.classes = nn.Conv3d(1, 4, 3, padding=1), nn.Linear(4, 10)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.classes(self.kernels(images.unsqueeze(1)).mean((2, 3, 4)))
            return found

    assert Trainer(Volumes(), data, Arguments(batch_size=25), CPU).run_epoch()["train_loss"] > 0


def test_networks_are_compiled_whatever_was_compiled_before(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for width in range(2, 8):
        Trainer(build_network(f"cnn:{width}"), data, Arguments(compile=True, batch_size=25), CPU).run_epoch()
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 8


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_choice_of_algorithms_ends_with_its_run(deterministic: bool) -> None:
    def state() -> tuple[bool, bool]:
        return torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()

    before = state()
    restore = choose_algorithms(deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic
    restore()
    assert state() == before
