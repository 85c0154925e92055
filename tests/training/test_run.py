from __future__ import annotations

import io
import json
import math
import random
import resource
import shlex
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from forks import call_in_fork
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convsim_cli.cli import run as run_command
from convsim_cli.errors import BusyError, DivergedError, InputError
from convsim_cli.networks.architectures import build_network
from convsim_cli.training import run as run_module
from convsim_cli.training.config import MODES, Arguments
from convsim_cli.training.launch import create_run, find_or_create_run, is_finished, start_runs
from convsim_cli.training.run import COLUMNS, Run, RunCallbacks, open_run, read_layers, read_results, train_run
from convsim_cli.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")  # at rates that make a short run learn

SMALL = Arguments(arch="cnn:4", dataset="digits", epochs=3, batch_size=20, iterations=10, limit_train=60, limit_test=30)


def stopping(step: int) -> RunCallbacks:
    """Stop a run inside an epoch, as Ctrl-C would: after so many steps of it and of its preparation."""
    left = step

    def advance(steps: int) -> None:
        nonlocal left
        left -= steps
        if left < 0:
            raise KeyboardInterrupt

    return RunCallbacks(progress=lambda phase, steps: nullcontext(advance))


def results(run: Run) -> list[dict[str, Any]]:
    return [{**row, "seconds": None} for row in read_results(run.folder)]


def test_a_run_writes_every_file_of_the_design(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    summary = train_run(run)
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "args.json",
        "results.csv",
        "layers.csv",
        "best.safetensors",
        "last.safetensors",
        "state.pt",
        "summary.json",
    }
    assert json.loads((run.folder / "args.json").read_text()) == asdict(SMALL)
    assert (run.folder / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = read_results(run.folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert summary == json.loads((run.folder / "summary.json").read_text())
    assert summary["best_test_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert summary["last_test_accuracy"] == rows[-1]["test_accuracy"]
    assert set(summary["fm_corr"]["start"]) == set(summary["fm_corr"]["end"]) == {f"{i}.weight" for i in (0, 4, 8, 12)}


def test_best_and_last_hold_the_weights_of_their_epochs(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, lr=0.3), tmp_path, "one")
    summary = train_run(run)
    for name, accuracy in (("best", summary["best_test_accuracy"]), ("last", summary["last_test_accuracy"])):
        model = build_network("cnn:4")
        model.load_state_dict(load_file(run.folder / f"{name}.safetensors"))
        from convsim_cli.inputs.datasets import load_dataset

        data = load_dataset("digits", Path()).limited(60, 30)
        trainer = Trainer(model, data, SMALL, torch.device("cpu"))
        from convsim_cli.inputs.images import evaluation_totals

        correct = evaluation_totals(trainer.model, data, data.test, torch.device("cpu"))[1].item()
        assert 100 * correct / 30 == pytest.approx(accuracy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "moment"),
    [*((mode, "inside an epoch") for mode in MODES), ("init+reg", "between epochs"), ("init+reg", "after the end")],
)
def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path: Path, mode: str, moment: str) -> None:
    arguments = replace(SMALL, mode=mode, momentum=0.9)
    whole = create_run(arguments, tmp_path, "whole")
    train_run(whole)
    if moment == "after the end":
        part = create_run(replace(arguments, epochs=1), tmp_path, "part")
        train_run(part)
    else:
        part = create_run(arguments, tmp_path, "part")
        preparation = 40 if MODES[mode].initializes or MODES[mode].scales else 0
        with pytest.raises(KeyboardInterrupt):
            train_run(part, stopping(preparation + (4 if moment == "inside an epoch" else 3)))
    torch.manual_seed(123)  # whatever else the process did
    train_run(open_run(part.folder, epochs=3))
    assert results(part) == results(whole)
    for name in ("last.safetensors", "best.safetensors"):
        assert (part.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert json.loads((part.folder / "args.json").read_text()) == asdict(arguments)


@pytest.mark.parametrize(("epoch", "saved"), [(30, [*range(11)]), (5, [0, 5, 10])])
def test_a_save_of_one_second_adds_less_than_5_percent_and_is_counted(
    epoch: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, saves = 0.0, []

    def lasting(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*given: Any) -> Any:
            nonlocal clock
            clock += seconds
            return function(*given)

        return slow

    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(Trainer, "run_epoch", lasting(epoch, Trainer.run_epoch))
    save = lasting(1, run_module.save_state)
    monkeypatch.setattr(run_module, "save_state", lambda *given: (saves.append(given[1].epoch), save(*given)))
    run = create_run(replace(SMALL, epochs=10), tmp_path, "one")
    summary = train_run(run)
    assert saves == saved
    assert len(saves) - 2 < 0.05 * 10 * epoch  # the first and the last are there in any case
    assert summary["seconds"] == 10 * epoch + len(saves)
    assert summary["images_per_second"] == pytest.approx(10 * 60 / summary["seconds"])
    assert sum(row["seconds"] for row in read_results(run.folder)) == summary["seconds"] - 1  # but for the last save


def test_epochs_that_were_not_saved_are_repeated_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = replace(SMALL, epochs=4, lr=0.3, momentum=0.9)
    whole, part = (create_run(arguments, tmp_path, name) for name in ("whole", "part"))
    monkeypatch.setattr(run_module, "SAVING", math.inf)
    best = train_run(whole)["best_epoch"]
    assert best < 4  # so that its weights are not those of the last epoch
    monkeypatch.setattr(run_module, "SAVING", 0.0)  # only at the start and at the end
    with pytest.raises(KeyboardInterrupt):
        train_run(part, stopping(7))
    assert [row["epoch"] for row in read_results(part.folder)] == [1, 2]
    assert torch.load(part.folder / "state.pt", weights_only=True)["trainer"]["epoch"] == 0
    with pytest.raises(KeyboardInterrupt):
        train_run(open_run(part.folder), stopping(0))
    assert not read_results(part.folder)  # rows beyond the state are dropped
    assert read_layers(part.folder) == []
    train_run(open_run(part.folder))
    assert results(part) == results(whole)
    for name in ("last.safetensors", "best.safetensors"):
        assert (part.folder / name).read_bytes() == (whole.folder / name).read_bytes()


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "cosine": {"schedule": "cosine", "warmup": 1},
    "warmup": {"warmup": 2},
    "augment": {"augment": "flip-crop"},
    "smoothing": {"label_smoothing": 0.1},
    "validation": {"validation": 15, "lr": 0.3},
}
RECIPES["all"] = {name: value for recipe in RECIPES.values() for name, value in recipe.items()}
RECIPES["all"] |= {"optimizer": "sgd", "mode": "reg"}


@pytest.mark.parametrize("recipe", ["adamw", "all"])  # if "all" fails, the others tell which part does
def test_resuming_is_exact_with_every_part_of_a_recipe(tmp_path: Path, recipe: str) -> None:
    arguments = replace(SMALL, bn_statistics="batch", **RECIPES[recipe])
    whole, part = (create_run(arguments, tmp_path, name) for name in ("whole", "part"))
    train_run(whole)
    for step in (4, 1, 3):  # in the second epoch, in its repetition, and between two epochs
        with pytest.raises(KeyboardInterrupt):
            train_run(open_run(part.folder), stopping(step))
        torch.manual_seed(123)
    train_run(open_run(part.folder))
    assert results(part) == results(whole)
    for name in ("last.safetensors", "best.safetensors"):
        assert (part.folder / name).read_bytes() == (whole.folder / name).read_bytes()


class Drawing(nn.Module):
    """A network that draws from every global generator, when it is built and in each forward call."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
        self.scale = random.random() + float(numpy.random.rand())

    def forward(self, images: Tensor) -> Tensor:
        noise = random.gauss(0, 1) + float(numpy.random.randn()) + torch.rand(()).item()
        logits: Tensor = self.layers(images) * (self.scale + 0.1 * noise)
        return logits


def test_networks_that_draw_from_any_generator_are_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("drawing_networks")
    module.build = lambda num_classes: Drawing(num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "drawing_networks", module)
    how = replace(SMALL, arch="drawing_networks:build")
    whole, again, parts, other = (
        create_run(replace(how, seed=seed), tmp_path, name) for name, seed in (("a", 0), ("b", 0), ("c", 0), ("d", 1))
    )
    states = random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    build_network(how.arch, 10, seed=4)
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist())  # type: ignore[index]
    train_run(whole)
    for run in (again, other):
        random.seed(7)
        numpy.random.seed(7)
        train_run(run)
    with pytest.raises(KeyboardInterrupt):
        train_run(parts, stopping(4))
    random.seed(8)
    numpy.random.seed(8)
    train_run(open_run(parts.folder))
    assert results(whole) == results(again) == results(parts) != results(other)


def test_a_run_stopped_in_its_preparation_starts_over(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, mode="init"), tmp_path, "one")
    with pytest.raises(KeyboardInterrupt):
        train_run(run, stopping(15))
    assert len(train_run(open_run(run.folder, epochs=4))["fm_corr"]["start"]) == 4
    assert open_run(run.folder).arguments.epochs == 4


def test_a_run_starts_from_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    first = create_run(SMALL, tmp_path, "first")
    train_run(first)
    weights = str(first.folder / "last.safetensors")
    second = create_run(replace(SMALL, weights=weights, lr=1e-12, epochs=1), tmp_path, "second")
    train_run(second)
    before, after = load_file(weights), load_file(second.folder / "last.safetensors")
    torch.testing.assert_close(before["0.weight"], after["0.weight"])


def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(replace(SMALL, epochs=1), tmp_path, "one")
    train_run(run)
    good = (run.folder / "last.safetensors").read_bytes()
    monkeypatch.setattr(Trainer, "train_batches", lambda *_: (math.inf, 10.0))
    with pytest.raises(DivergedError, match="epoch 2"):
        train_run(open_run(run.folder, epochs=2))
    assert (run.folder / "last.safetensors").read_bytes() == good


def test_a_damaged_or_foreign_state_is_refused_and_the_folder_is_unchanged(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    other = create_run(replace(SMALL, seed=5), tmp_path, "other")
    train_run(other)
    whole = (run.folder / "state.pt").read_bytes()
    (run.folder / "state.pt").write_bytes(whole[:1000])
    with pytest.raises(InputError, match=r"state\.pt: damaged"):
        train_run(open_run(run.folder))
    (run.folder / "state.pt").write_bytes((other.folder / "state.pt").read_bytes())
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(InputError, match=r"seed = 5, args.json says 0"):
        train_run(open_run(run.folder, epochs=9))
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_run_must_be_resumed_with_its_number_of_processes(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, processes=2), tmp_path, "two")
    with pytest.raises(
        InputError, match="was started with 2 processes, but this launch has 1; use torchrun --nproc-per-node 2"
    ):
        train_run(run)


def test_a_state_of_an_earlier_version_can_be_resumed(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    state = torch.load(run.folder / "state.pt", weights_only=True)
    del state["arguments"]["processes"]  # which had no such argument
    torch.save(state, run.folder / "state.pt")
    assert train_run(open_run(run.folder, epochs=4))["epochs"] == 4


def test_only_a_finished_run_has_a_summary(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    with pytest.raises(KeyboardInterrupt):
        train_run(open_run(run.folder, epochs=5), stopping(4))
    assert not (run.folder / "summary.json").exists()
    assert not is_finished(open_run(run.folder), 5)
    assert train_run(open_run(run.folder))["epochs"] == 5


@pytest.mark.parametrize("harm", ["a row cut short", "other columns", "nothing", "no number"])
def test_a_damaged_results_file_is_one_error_line(harm: str, tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    head = ",".join(COLUMNS)
    torn = {
        "a row cut short": f"{head}\n1,2.0,3",
        "other columns": "epoch,train_loss\n1,2.0\n",
        "nothing": "",
        "no number": f"{head}\n1,x,3,4,5,6,7\n",
    }
    (run.folder / "results.csv").write_text(torn[harm])
    with pytest.raises(InputError, match=r"results\.csv: cannot be read"):
        read_results(run.folder)


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    with pytest.raises(InputError, match="has done 3 epochs, more than `epochs` 2"):
        train_run(open_run(run.folder, epochs=2))
    (run.folder / "args.json").write_text(json.dumps(asdict(SMALL) | {"color": 1}))
    with pytest.raises(InputError, match="unknown argument color"):
        open_run(run.folder)
    with pytest.raises(InputError, match="not a run's folder"):
        open_run(tmp_path)


def test_folders_are_never_shared(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: create_run(SMALL, tmp_path, None), range(40)))
    assert len({run.folder for run in runs}) == 40
    create_run(SMALL, tmp_path, "mine")
    with pytest.raises(
        InputError,
        match=r"mine already exists; resume it with: convsim train --resume .*mine, or choose another `name`",
    ):
        create_run(SMALL, tmp_path, "mine")
    with pytest.raises(InputError, match="plain folder name"):
        create_run(SMALL, tmp_path, "../mine")


def test_concurrent_requests_for_one_run_get_one_folder(tmp_path: Path) -> None:
    for seed in range(5):
        wanted = replace(SMALL, seed=seed)
        with ThreadPoolExecutor(8) as pool:
            runs = list(pool.map(find_or_create_run, 8 * [wanted], 8 * [tmp_path], 8 * ["run"]))
        assert len({run.folder for run in runs}) == 1
        assert all(run.arguments == wanted for run in runs)
    assert len(list(tmp_path.iterdir())) == 5


def test_one_run_is_worked_on_by_one_process(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")

    def intrude(*_: object) -> None:
        with pytest.raises(InputError, match="another process"):
            train_run(run)

    train_run(run, RunCallbacks(begin=intrude, epoch=intrude))


def train_until_the_disk_is_full(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Train once, then again where a file may have half the size of a state; return how that ends and what it says."""
    assert run_command([*arguments, "--name", "one"]) == 0
    size = (folder / "one" / "state.pt").stat().st_size
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    with redirect_stderr(io.StringIO()) as said:
        return run_command([*arguments, "--name", "two"]), said.getvalue()


def test_a_disk_that_is_full_when_the_state_is_saved_is_one_line(tmp_path: Path) -> None:
    how = ["train", "--arch", "cnn:4", "--dataset", "digits", "--limit-train", "40", "--limit-test", "20"]
    how += ["--epochs", "1", "--run-dir", str(tmp_path), "-q"]
    how += ["--momentum", "0.9"]  # its state is larger than any other file
    code, said = call_in_fork(train_until_the_disk_is_full, tmp_path, how)
    assert code == 1
    (line,) = (line for line in said.splitlines() if "error" in line)
    assert line.startswith(f"convsim: error: {tmp_path / 'two'}")
    assert "cannot be written (File too large" in line


def small(*more: object) -> list[str]:
    how = (
        "--arch",
        "cnn:4",
        "--dataset",
        "digits",
        "--epochs",
        1,
        "--limit-train",
        60,
        "--limit-test",
        30,
        "-q",
        *more,
    )
    return ["train", *map(str, how)]


def test_a_run_that_fails_before_its_first_save_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fails = small("--mode", "init", "--iterations", 20, "--init-lr", 1e30)
    assert run_command(fails) == 1
    assert not (tmp_path / "runs").exists()
    assert run_command(small("--name", "good")) == 0
    assert run_command([*fails, "--name", "bad"]) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["good"]
    monkeypatch.setattr("convsim_cli.training.launch.write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert run_command(small("--name", "full")) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["good"]


@pytest.mark.parametrize("kind", ["moved", "replaced"])
def test_a_failed_run_deletes_no_folder_but_its_own(kind: str, tmp_path: Path) -> None:
    def harm(_: dict[str, Any]) -> None:
        (tmp_path / "a").rename(tmp_path / "b")
        if kind == "replaced":
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "args.json").write_text("{}")

    with pytest.raises(InputError, match="a: moved, removed or replaced during training"):
        start_runs(SMALL, tmp_path, "a", None, RunCallbacks(epoch=harm))
    assert (tmp_path / "b" / "state.pt").exists()
    assert (tmp_path / "a" / "args.json").exists() == (kind == "replaced")


def test_an_empty_folder_becomes_a_run_s(tmp_path: Path) -> None:
    for name in ("a", "b-s0", "b-s1"):
        (tmp_path / name).mkdir()
    assert run_command(small("--run-dir", str(tmp_path), "--name", "a")) == 0
    assert run_command(small("--run-dir", str(tmp_path), "--name", "b", "--seeds", 2)) == 0
    assert all(read_results(tmp_path / name) for name in ("a", "b-s0", "b-s1"))


def test_a_folder_that_is_no_run_s_is_not_to_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("text")
    (tmp_path / "b").write_text("text")
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b", "c"):
        with pytest.raises(InputError, match=rf"{name} already exists; choose another `name`$"):
            create_run(SMALL, tmp_path, name)
    create_run(SMALL, tmp_path, "d")
    with pytest.raises(InputError, match=r"d already exists; resume it with: convsim train --resume .*/d, or choose"):
        create_run(SMALL, tmp_path, "d")


def test_a_run_that_is_interrupted_before_its_first_save_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("convsim_cli.training.run.Trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_command(small("--name", "a")) == 130
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["args.json"]
    assert run_command(["train", "--resume", "runs/a", "-q"]) == 0


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("lost", "left"),
    [
        ([], r"results\.csv with 3 epochs, last\.safetensors, best\.safetensors, summary\.json"),
        (["last.safetensors", "best.safetensors", "summary.json"], r"results\.csv with 3 epochs;"),
        (["results.csv", "best.safetensors", "summary.json"], r"overwrite last\.safetensors;"),
        (["results.csv", "last.safetensors", "summary.json"], r"overwrite best\.safetensors;"),
        (["results.csv", "last.safetensors", "best.safetensors"], r"overwrite summary\.json;"),
    ],
)
def test_a_run_that_has_lost_its_state_is_not_overwritten(lost: list[str], left: str, tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    for name in ("state.pt", *lost):
        (run.folder / name).unlink()
    before = files(run.folder)
    for change in ({}, {"epochs": 5}, {"dataset": "folder:nowhere"}):  # refused before data is read
        with pytest.raises(InputError, match=rf"state\.pt: missing, so the run cannot be resumed, .*{left}"):
            train_run(open_run(run.folder, **change))
    assert files(run.folder) == before


def test_a_lost_state_is_named_also_where_the_results_are_damaged(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    (run.folder / "state.pt").unlink()
    results = run.folder / "results.csv"
    results.write_text(results.read_text()[:-9])
    with pytest.raises(InputError, match=r"state\.pt: missing, so the run .* would overwrite results\.csv, "):
        train_run(open_run(run.folder))


def test_a_save_that_is_killed_loses_no_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "best_row", lambda history: history[2 if len(history) == 3 else 0])
    run = create_run(replace(SMALL, epochs=2), tmp_path, "one")
    train_run(run)
    best = (run.folder / "best.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "write_pickle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_run(open_run(run.folder, epochs=3))
    assert (run.folder / "best.safetensors").read_bytes() != best  # the state knows nothing of epoch 3
    train_run(open_run(run.folder, epochs=2))
    assert (run.folder / "best.safetensors").read_bytes() == best
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".")]


def test_weights_of_which_a_byte_has_changed_are_written_again(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    train_run(run)
    last = run.folder / "last.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9] + bytes(9))
    train_run(open_run(run.folder))
    assert last.read_bytes() == whole


def test_seeds_whose_names_are_taken_meanwhile_get_others(tmp_path: Path) -> None:
    def begin(run: Run, _: object) -> None:
        if run.arguments.seed == 0:
            create_run(replace(SMALL, seed=1, lr=0.5), tmp_path, None)  # as another process would

    started = start_runs(replace(SMALL, epochs=1), tmp_path, None, 3, RunCallbacks(begin=begin))
    assert [run.name for run, _ in started] == [f"cnn4-baseline-s{end}" for end in ("0", "1-2", "2")]
    with pytest.raises(InputError, match=r"mine-s1 already exists"):
        begin = lambda run, _: create_run(SMALL, tmp_path, "mine-s1")  # noqa: E731
        start_runs(replace(SMALL, epochs=1), tmp_path, "mine", 2, RunCallbacks(begin=begin))


def test_a_run_that_another_process_has_taken_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(run: Run, *_: object) -> dict[str, Any]:
        raise BusyError(f"{run.folder}: another process is working on this run")

    monkeypatch.setattr("convsim_cli.training.launch.train_run", taken)
    with pytest.raises(BusyError):
        start_runs(SMALL, tmp_path, "one", None, RunCallbacks())
    assert (tmp_path / "one" / "args.json").exists()


def test_what_a_kill_leaves_of_a_new_folder_blocks_no_name(tmp_path: Path) -> None:
    (tmp_path / "one" / ".convsim-0123456789abcdef.tmp").mkdir(parents=True)
    train_run(create_run(replace(SMALL, epochs=1), tmp_path, "one"))
    (tmp_path / "two" / ".convsim-notes.tmp").mkdir(parents=True)
    with pytest.raises(InputError, match="two already exists"):
        create_run(SMALL, tmp_path, "two")


def test_a_run_with_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    (tmp_path / "other").mkdir()
    (run.folder / "tensorboard").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match=r"one/tensorboard: is a link to .*/other; replace the link with a copy"):
        train_run(run)


def test_what_to_do_about_a_lost_state_can_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(small("--run-dir", "my runs", "--name", "a")) == 0
    Path("my runs/a/state.pt").unlink()
    capsys.readouterr()
    assert run_command(["train", "--resume", "my runs/a", "--epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert "move my runs/a away, or start another run: convsim train" in error
    program, *command = shlex.split(error.rpartition("start another run: ")[2])
    assert (program, command[-2:]) == ("convsim", ["--name", "NEW"])
    assert run_command([*command, "-q"]) == 0
    assert read_results(Path("runs/NEW"))


@pytest.mark.parametrize("harm", ["no record", "damaged"])
def test_weights_of_an_unknown_epoch_are_not_overwritten(harm: str, tmp_path: Path) -> None:
    run = create_run(SMALL, tmp_path, "one")
    weights = run.folder / "last.safetensors"
    save_file({"a": torch.ones(2)}, weights) if harm == "no record" else weights.write_bytes(b"torn")
    before = files(run.folder)
    with pytest.raises(InputError, match=r"starting over would overwrite last\.safetensors"):
        train_run(run)
    assert files(run.folder) == before


def test_a_run_killed_in_its_first_save_starts_over(tmp_path: Path) -> None:
    whole, part = (create_run(replace(SMALL, epochs=1), tmp_path, name) for name in ("whole", "part"))
    train_run(whole)
    with pytest.raises(KeyboardInterrupt):
        train_run(part, stopping(0))
    assert {"last.safetensors", "results.csv", "state.pt"} <= files(part.folder).keys()
    (part.folder / "state.pt").unlink()  # which is written last
    train_run(open_run(part.folder))
    assert results(part) == results(whole)


def test_a_new_run_never_takes_the_folder_of_another(tmp_path: Path) -> None:
    how = ["--run-dir", str(tmp_path)]
    assert run_command(small(*how, "--name", "a-s0")) == 0
    before = files(tmp_path / "a-s0")
    assert run_command(small(*how, "--name", "a-s0")) == 2
    assert run_command(small(*how, "--name", "a", "--seeds", 2)) == 2
    (tmp_path / "link").symlink_to(tmp_path / "a-s0")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("link", "broken"):
        assert run_command(small(*how, "--name", name)) == 2
    assert files(tmp_path / "a-s0") == before
    assert {path.name for path in tmp_path.iterdir()} == {"a-s0", "link", "broken"}


def test_resuming_a_finished_run_changes_none_of_its_files(tmp_path: Path) -> None:
    run = create_run(replace(SMALL, epochs=1), tmp_path, "a")
    train_run(run)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    train_run(run)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
