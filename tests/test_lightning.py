"""The callback for Lightning's Trainer, in real trainings of a few steps with either package."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsim_cli.lightning
from convsim_cli import ConvSimPenalty, measure
from convsim_cli.errors import InputError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of Lightning itself; its import takes seconds
IMAGES = torch.randn(12, 1, 8, 8)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param, exc_type=ImportError)


def network(package: Any, lr: float = 0.1, task: float = 1.0) -> Any:
    """A module of Lightning's whose loss is `task` times the mean square of its maps, optimized by plain SGD."""

    class Network(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))

        def forward(self, images: Tensor) -> Tensor:
            return self.layers(images)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return task * self(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=lr)

    return Network()


def train(package: Any, module: Any, callback: Any, folder: Path, **options: Any) -> Any:
    """Train on the images in batches of 4, three steps an epoch, and return the trainer."""
    logger = import_module(f"{package.__name__}.loggers").CSVLogger(folder, name="", version="")
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False} | options
    resume = options.pop("ckpt_path", None)
    loader = options.pop("loader", torch.utils.data.DataLoader(IMAGES, batch_size=4))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = package.Trainer(callbacks=[callback], logger=logger, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def logged(folder: Path) -> list[dict[str, float]]:
    """A row of figures per epoch."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value and "/" in key} for row in rows]


def make(**options: Any) -> Any:
    return convsim_cli.lightning.ConvSimCallback(**options)


@pytest.mark.parametrize("preserve_norm", [False, True])
def test_the_penalty_s_gradient_is_added_to_each_step(package: Any, preserve_norm: bool, tmp_path: Path) -> None:
    module = network(package, lr=1, task=0.0)
    chosen: dict[str, Any] = {"objective": "kernel", "include": ["layers.2.*"]}
    expected = pickle.loads(pickle.dumps(module.layers))
    penalty = ConvSimPenalty(expected, "kernel", include=["2.*"])
    callback = make(beta=1e-2, preserve_norm=preserve_norm, measure_every=0, **chosen)
    train(package, module, callback, tmp_path, max_steps=2, accumulate_grad_batches=2)
    for _ in range(2):
        expected.zero_grad()
        penalty.add_gradient_(1e-2, preserve_norm)
        with torch.no_grad():
            expected[2].weight.sub_(expected[2].weight.grad)
    torch.testing.assert_close(module.layers[2].weight, expected[2].weight)
    torch.testing.assert_close(module.layers[0].weight, expected[0].weight)


def test_figures_of_each_epoch_reach_the_trainer_s_logger(package: Any, tmp_path: Path) -> None:
    module = network(package)
    trainer = train(package, module, make(), tmp_path)
    first, last = logged(tmp_path)
    keys = ("fm_corr", "fm_rank", "ncs", "norm", "turn_per_step", "turned")
    assert first.keys() == last.keys() == {f"{key}/layers.{layer}.weight" for key in keys for layer in (0, 2)}
    for record in measure(module, IMAGES[:4]):
        for key in keys[:4]:
            assert last[f"{key}/{record['name']}"] == pytest.approx(record[key], rel=1e-5)
    assert 0 < first["turned/layers.0.weight"] < last["turned/layers.0.weight"]
    assert trainer.callback_metrics["fm_rank/layers.2.weight"] == pytest.approx(last["fm_rank/layers.2.weight"])


def test_images_of_your_own_are_measured_every_few_epochs(package: Any, tmp_path: Path) -> None:
    module = network(package)
    train(package, module, make(images=IMAGES, measure_every=2, exclude=["layers.0.*"]), tmp_path, max_epochs=3)
    first, second, third = logged(tmp_path)
    assert "fm_corr/layers.2.weight" not in second
    assert "fm_corr/layers.0.weight" not in first
    (record,) = measure(module, IMAGES, include=["layers.2.*"])
    assert third["fm_corr/layers.2.weight"] == pytest.approx(record["fm_corr"], rel=1e-5)


def test_turns_are_taken_of_steps_and_not_of_batches(package: Any, tmp_path: Path) -> None:
    callback = make(measure_every=0, turn_every=1)
    train(package, network(package), callback, tmp_path / "a", max_epochs=1)
    train(package, network(package), make(measure_every=0, turn_every=1), tmp_path / "b", accumulate_grad_batches=3)
    row = logged(tmp_path / "b")[0]  # one step an epoch: the turn of a step is all that a filter turned
    assert row["turn_per_step/layers.0.weight"] == pytest.approx(row["turned/layers.0.weight"], rel=1e-4)


def test_a_resumed_training_counts_turns_from_its_start(package: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network(package)
    start = pickle.loads(pickle.dumps(module.layers.state_dict()))
    trainer = train(package, module, make(), tmp_path / "whole")
    again = network(package)
    again.layers.load_state_dict(start)
    trainer = train(package, again, make(), tmp_path / "part", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    train(package, network(package), make(), tmp_path / "rest", ckpt_path=tmp_path / "part.ckpt")
    assert logged(tmp_path / "rest")[-1] == pytest.approx(logged(tmp_path / "whole")[-1], rel=1e-3)


def test_a_training_that_is_resumed_within_an_epoch_is_measured(package: Any, tmp_path: Path) -> None:
    module = network(package)
    type(module).on_train_batch_end = lambda self, *_: self.trainer.save_checkpoint(tmp_path / "a.ckpt")
    train(package, module, make(), tmp_path / "a", max_steps=2)
    train(package, network(package), make(), tmp_path / "b", ckpt_path=tmp_path / "a.ckpt")
    assert len(rows := logged(tmp_path / "b")) == 2
    assert all("fm_corr/layers.2.weight" in row for row in rows)


def test_a_training_after_a_resumed_one_counts_turns_from_its_own_start(package: Any, tmp_path: Path) -> None:
    callback = make(measure_every=0)
    trainer = train(package, network(package), callback, tmp_path / "a", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    train(package, network(package), callback, tmp_path / "b", ckpt_path=tmp_path / "a.ckpt")
    train(package, network(package, lr=1e-9), callback, tmp_path / "c")
    assert logged(tmp_path / "c")[-1]["turned/layers.2.weight"] < 1


def test_a_module_without_forward_is_named_with_what_to_do(package: Any, tmp_path: Path) -> None:
    module = network(package)
    type(module).forward = package.LightningModule.forward
    type(module).training_step = lambda self, batch, _: self.layers(batch).square().mean()
    with pytest.raises(InputError, match=r"Network cannot be measured without a `forward` .* `measure_every` to 0"):
        train(package, module, make(), tmp_path)


def test_layers_that_are_left_out_have_no_turns_either(package: Any, tmp_path: Path) -> None:
    train(package, network(package), make(measure_every=0, include=["layers.2.*"]), tmp_path)
    assert all(row.keys() == {"turn_per_step/layers.2.weight", "turned/layers.2.weight"} for row in logged(tmp_path))


def test_a_resumed_training_may_leave_out_more_layers(package: Any, tmp_path: Path) -> None:
    trainer = train(package, network(package), make(), tmp_path / "a", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fewer = make(include=["layers.2.*"])
    train(package, network(package), fewer, tmp_path / "b", ckpt_path=tmp_path / "a.ckpt")
    assert "turned/layers.2.weight" in logged(tmp_path / "b")[-1]


def test_batches_that_cannot_be_measured_are_refused_at_the_first(package: Any, tmp_path: Path) -> None:
    module, steps = network(package), []
    type(module).training_step = lambda self, batch, _: steps.append(batch) or self(batch["x"]).square().mean()
    loader = torch.utils.data.DataLoader([{"x": image} for image in IMAGES], batch_size=4)
    said = (
        "^ConvSimCallback: batch 1: a dictionary with x; expected 'pixel_values'; pass `images=`, or set "
        "`measure_every` to 0$"
    )
    with pytest.raises(InputError, match=said):
        train(package, module, make(), tmp_path / "a", loader=loader)
    assert not steps
    train(package, module, make(images=IMAGES), tmp_path / "b", loader=loader)
    assert "fm_corr/layers.2.weight" in logged(tmp_path / "b")[-1]


@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_is_as_large_with_scaled_gradients(fused: bool, package: Any, tmp_path: Path) -> None:
    moved = []
    for plugins in ([], [scaled_precision(package)]):
        torch.manual_seed(0)
        module = network(package, lr=1.0, task=1e-9)
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=1.0, fused=fused)
        before = module.layers[0].weight.detach().clone()
        train(package, module, make(beta=1e-2, measure_every=0), tmp_path, max_steps=1, plugins=plugins)
        moved.append(module.layers[0].weight.detach() - before)
    torch.testing.assert_close(*moved, rtol=2e-2, atol=1e-6)


def scaled_precision(package: Any) -> Any:
    plugins = import_module(f"{package.__name__}.plugins.precision")
    return plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))


def test_images_of_your_own_are_tried_before_the_first_step(package: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is an iterator"):
        make(images=iter([IMAGES]))
    module = network(package)
    start = module.layers[0].weight.detach().clone()
    with pytest.raises(InputError, match="ConvSimCallback"):
        train(package, module, make(images=[torch.randn(2, 5, 8, 8)]), tmp_path)
    assert torch.equal(module.layers[0].weight, start)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measure_every": -1}, "`measure_every` is -1; expected a whole number ≥ 0"),
        ({"measure_every": 1.5}, "`measure_every` is 1.5; expected a whole number ≥ 0"),
        ({"turn_every": 0}, "`turn_every` is 0; expected a whole number ≥ 1"),
        ({"turn_every": "5"}, "`turn_every` is '5'; expected a whole number ≥ 1"),
        ({"beta": "auto"}, "`beta` 'auto': expected a number .*; `ConvSimPenalty.gradient_ratio` helps to choose it"),
        ({"beta": -1.0}, r"`beta` is -1\.0; expected a finite number ≥ 0"),
        ({"objective": "CS"}, "unknown `objective` 'CS'; did you mean 'cs'"),
        ({"objective": None}, "`objective` is None; expected a name or a function"),
        ({"include": "layers.0.*"}, "`include` is the string"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(options: dict[str, Any], said: str) -> None:
    pytest.importorskip("lightning")
    with pytest.raises(InputError, match=f"^{said}"):
        make(**options)


def test_the_callback_can_be_pickled_for_processes_that_are_spawned() -> None:
    pytest.importorskip("lightning")
    assert type(pickle.loads(pickle.dumps(make(beta=1.0)))) is convsim_cli.lightning.ConvSimCallback


def test_importing_the_module_loads_neither_lightning_nor_torch() -> None:
    said = (
        "import sys, convsim_cli.lightning; print(*{'torch', 'lightning', 'pytorch_lightning'} & sys.modules.keys()); "
        "sys.modules.update({'lightning': None, 'pytorch_lightning': None})\n"
        "try: from convsim_cli.lightning import ConvSimCallback\n"
        "except ValueError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[0] == ""
    assert found[1].startswith(
        "ConvSimCallback needs Lightning, which is not installed: pip install 'convsim[lightning]'"
    )


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Callback'"):
        convsim_cli.lightning.Callback  # noqa: B018
