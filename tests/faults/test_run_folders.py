"""Folders of runs in any condition: states of another structure, pipes among their files, hostile names and tables."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import NAMES, SMALL
from conftest import Convsim
from torch import Tensor, nn

from convsim_cli.errors import InputError
from convsim_cli.training.comparison import read_runs
from convsim_cli.training.launch import find_run, start_runs
from convsim_cli.training.run import (
    SILENT,
    Run,
    RunCallbacks,
    open_run,
    read_layers,
    read_results,
    train_run,
    write_results,
)

pytestmark = pytest.mark.filterwarnings("ignore:the first step turned")


def test_a_state_that_cannot_be_opened_is_not_to_be_thrown_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("convsim_cli.training.run.open_regular", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Too many open files\), so the run cannot be resumed$"):
        train_run(run)


def test_a_hostile_state_names_what_it_would_run(run: Run) -> None:
    torch.save({"trainer": os.system}, run.folder / "state.pt")
    with pytest.raises(InputError, match=r"state\.pt: damaged \(loading it would run posix\.system") as caught:
        train_run(run)
    assert "weights_only" not in str(caught.value)


def test_a_run_of_links_to_another_leaves_that_one_as_it_is(run: Run, tmp_path: Path) -> None:
    linked, before = tmp_path / "linked", {name: (run.folder / name).read_bytes() for name in NAMES}
    linked.mkdir()
    for name in NAMES:
        (linked / name).symlink_to(run.folder / name)
    with pytest.raises(InputError, match=r"linked/.*: is a link to .*/one/.*; replace the link with a copy"):
        train_run(open_run(linked, epochs=3))
    assert {name: (run.folder / name).read_bytes() for name in NAMES} == before


def test_arguments_that_vanish_during_training_are_back_at_its_end(run: Run) -> None:
    longer = open_run(run.folder, epochs=4)
    train_run(
        longer, RunCallbacks(epoch=lambda row: (run.folder / "args.json").unlink() if row["epoch"] == 3 else None)
    )
    assert open_run(run.folder) == longer


@pytest.mark.parametrize("kind", ["moved", "removed", "replaced by another run"])
def test_a_run_never_writes_into_another_folder_than_its_own(kind: str, run: Run) -> None:
    moved, other = run.folder.with_name("moved"), run.folder.with_name("other")
    shutil.copytree(run.folder, other)
    before = {name: (other / name).read_bytes() for name in NAMES}

    def harm(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            shutil.rmtree(run.folder) if kind == "removed" else run.folder.rename(moved)
            if kind == "replaced by another run":
                other.rename(run.folder)

    with pytest.raises(InputError, match=r"one: moved, removed or replaced during training; resume it where it is now"):
        train_run(open_run(run.folder, epochs=5), RunCallbacks(epoch=harm))
    left = run.folder if kind == "replaced by another run" else other
    assert {name: (left / name).read_bytes() for name in NAMES} == before
    if moved.exists():
        assert train_run(open_run(moved))["epochs"] == 5


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_has_the_name_of_the_summary_is_left_alone(make: Callable[[Path], None], run: Run) -> None:
    path = run.folder / "summary.json"
    path.unlink()
    make(path)
    with pytest.raises(InputError, match=r"summary\.json: is a (folder|pipe)"):
        train_run(open_run(run.folder, epochs=3))
    assert path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.pt", "args.json", "results.csv", "layers.csv"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_a_pipe_among_a_runs_files_is_never_waited_for(name: str, kind: str, run: Run, convsim: Convsim) -> None:
    (run.folder / name).unlink()
    made = {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a device": lambda path: path.symlink_to("/dev/zero")}
    made[kind](run.folder / name)
    outcomes = [convsim("train", "--resume", run.folder, "--epochs", 3)] if name != "layers.csv" else []
    outcomes += [convsim("compare", run.folder)] if name in ("args.json", "results.csv") else []
    drawn = convsim("plot", run.folder, "-o", run.folder / "a.png")
    assert drawn.code == (0 if name in ("state.pt", "layers.csv") else 2)
    assert ("warning: rotation is omitted: " in drawn.err) == (name == "layers.csv")
    for outcome in outcomes:
        assert outcome.code == 2, outcome.err
        assert outcome.error


TABLES = {
    "empty": "",
    "of NUL": "\0" * 5000,
    "without columns": "epoch,cs\n1,2\n",
    "of a cut number": "{head}\n1,1.0,2.0,3.0,4.0,5.0,6",
    "of a cut row": "{head}\n1,1.0,2.0\n",
    "of a long row": "{head}\n1,1.0,2.0,3.0,4.0,5.0,6.0,7.0\n",
    "with NUL in it": "{head}\n1,1.0,2.0,\0,4.0,5.0,6.0\n",
    "of nan": "{head}\n1,nan,2.0,3.0,4.0,5.0,6.0\n",
    "of inf": "{head}\n1,1.0,2.0,3.0,4.0,inf,6.0\n",
    "of epoch 7": "{head}\n7,1.0,2.0,3.0,4.0,5.0,6.0\n",
    "of no text": "{head}\n1,1.0,2.0,3.0,4.0,5.0,\udcff\n",
    "of one long field": '{head}\n"' + "1" * 200_000,
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_table_is_one_short_line(kind: str, run: Run, convsim: Convsim) -> None:
    for name, read in (("results.csv", read_results), ("layers.csv", lambda folder: read_layers(folder))):
        path = run.folder / name
        head = path.read_text().splitlines()[0]
        text = TABLES[kind].replace("{head}", head)
        path.write_bytes(text.encode(errors="surrogateescape"))
        if kind == "of epoch 7" and name == "layers.csv":
            continue
        with pytest.raises(InputError) as caught:
            read(run.folder)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
    for command in (["compare", run.folder], ["plot", run.folder, "-o", run.folder / "x.png"]):
        assert (outcome := convsim(*command)).code == 2
        assert outcome.error


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"seed": 1e999}', '{"lr": NaN}', "{", "\udcff", "9" * 10_000, "null"]
)
def test_hostile_arguments_are_one_line(content: str, run: Run, convsim: Convsim) -> None:
    path = run.folder / "args.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    for command in (["train", "--resume", run.folder], ["train", "--config", path], ["compare", run.folder]):
        outcome = convsim(*command)
        assert outcome.code == 2
        assert outcome.error
    assert find_run(SMALL, run.folder.parent) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"lr": -1}', r"lr -1: expected a number above 0"),
        ('{"lr": true}', r"lr True: expected a number above 0"),
        ('{"seed": ' + "9" * 5000 + "}", r"a number with thousands of digits"),
        ("\udcff", r"it is not UTF-8 text"),
        ('{"seed": 1, "lr": 0.1, "seed": 2}', "'seed' appears twice"),
        (json.dumps({"lr": "x" * 100_000}), "x … x"),
    ],
)
def test_hostile_arguments_name_their_file_and_their_fault(content: str, said: str, run: Run, convsim: Convsim) -> None:
    path = run.folder / "args.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    resume, config = ["train", "--resume", run.folder], ["train", "--config", path]
    for command in (resume, config, ["compare", run.folder], ["plot", run.folder]):
        error = convsim(*command).error
        assert str(run.folder) in error
        assert "args.json" in error
        assert re.search(said, error)
        assert len(error) < 3000


def test_files_that_cannot_be_read_say_why_without_their_path(run: Run) -> None:
    for name, read in (("results.csv", read_results), ("layers.csv", read_layers), ("args.json", open_run)):
        (run.folder / name).unlink()
        (run.folder / name).mkdir()
        with pytest.raises(InputError, match=r"not a regular file[;)]") as caught:
            read(run.folder)
        assert str(caught.value).count(str(run.folder)) == 1
    (run.folder / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"damaged \(File is not a zip file\)"):
        train_run(run)


def test_huge_tables_and_arguments_are_never_read_into_memory(run: Run, convsim: Convsim) -> None:
    commands = {
        "args.json": [["train", "--resume", run.folder], ["train", "--config", run.folder / "args.json"]],
        "results.csv": [["compare", run.folder]],
    }
    for name, read in (("args.json", open_run), ("results.csv", read_results), ("layers.csv", read_layers)):
        whole = (run.folder / name).read_bytes()
        os.truncate(run.folder / name, 100_000_001)
        with pytest.raises(InputError, match=rf"{name}: .*100,000,001 bytes; expected at most 100,000,000"):
            read(run.folder)
        for command in commands.get(name, []):
            assert "expected at most 100,000,000" in convsim(*command).error
        (run.folder / name).write_bytes(whole)


def test_a_table_that_an_editor_saved_with_a_byte_order_mark_is_read(run: Run) -> None:
    rows, layers = read_results(run.folder), read_layers(run.folder)
    for name in ("results.csv", "layers.csv"):
        (run.folder / name).write_bytes(b"\xef\xbb\xbf" + (run.folder / name).read_bytes().replace(b"\n", b"\r\n"))
    assert (read_results(run.folder), read_layers(run.folder)) == (rows, layers)


def test_a_hidden_run_is_compared_with_the_others(run: Run) -> None:
    (run.folder.parent / ".cache").mkdir()
    run.folder.rename(run.folder.with_name(".hidden"))
    assert [found.name for found in read_runs([run.folder.parent])] == [".hidden"]


@pytest.mark.parametrize("accuracy", [-5.0, 200.0])
def test_accuracies_beyond_per_cents_are_refused(accuracy: float, run: Run) -> None:
    rows = read_results(run.folder)
    rows[1]["test_accuracy"] = accuracy
    write_results(run.folder, rows)
    with pytest.raises(InputError, match=rf"test_accuracy = {accuracy}, expected 0 to 100 per cent"):
        read_results(run.folder)


@pytest.mark.parametrize("angle", ["1e308", "-1e308", "180.1", "-0.1"])
@pytest.mark.parametrize("column", ["turn_per_step", "turned"])
def test_angles_beyond_half_a_turn_are_refused(column: str, angle: str, run: Run) -> None:
    row = {"epoch": "1", "layer": "a", "norm": "1e308", "turn_per_step": "0", "turned": "180"} | {column: angle}
    (run.folder / "layers.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(InputError, match=rf"{column} = {re.escape(str(float(angle)))}, expected 0 to 180 degrees"):
        read_layers(run.folder)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "é" * 150, "a/b", "..", "a\0b"])
def test_a_name_that_no_folder_can_have_is_refused(name: str, tmp_path: Path, convsim: Convsim) -> None:
    for more in ([], ["--seeds", 2]):
        how = ["--dataset", "digits", "--arch", "cnn:2", "--epochs", 1, "--run-dir", tmp_path / "runs", "--name", name]
        outcome = convsim("train", *how, *more)
        assert (outcome.code, "--name" in outcome.error) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["x" * 300, "x" * 5000, "f/" * 3000, "f/" * 1900, "file/inside", "file"])
def test_a_path_that_cannot_be_opened_is_bad_input(
    path: str, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    small = ["--dataset", "digits", "--arch", "cnn:2", "--limit-train", 60]
    commands: list[list[Any]] = [
        ["train", "--resume", path],
        ["train", "--config", path],
        ["train", *small, "--run-dir", path],
        ["train", "--arch", "cnn:2", "--dataset", f"folder:{path}"],
        ["train", "--arch", "cnn:2", "--dataset", "cifar10", "--data-dir", path],
        ["train", *small, "--weights", path],
        ["compare", path],
        ["plot", path],
        ["plot", tmp_path, "-o", f"{path}/a.png"],
        ["plot", tmp_path, "-o", f"{path}.png"],
        ["measure", path],
        ["init", path],
        ["init", "--arch", "cnn:2", "--iterations", 0, "-o", f"{path}/a.pt"],
        ["measure", "--arch", "cnn:2", "--input", path],
    ]
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda _: (_ for _ in ()).throw(OSError("no network")))
    for command in commands:
        outcome = convsim(*command)
        assert outcome.code == 2, (command[0], outcome.err[:500])
        assert outcome.error
    assert {file.name for file in tmp_path.iterdir()} == {"file"}


HUGE = str(1 << 70)


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["train", "--dataset", "digits", f"--{name}", HUGE]
            for name in ("batch-size", "epochs", "iterations", "warmup")
        ),
        *(
            ["train", "--dataset", "digits", f"--{n}", HUGE]
            for n in ("limit-train", "limit-test", "validation", "seeds")
        ),
        ["train", "--dataset", "folder:.", "--image-size", HUGE],
        ["train", "--dataset", "digits", "--seed", "4294967295", "--seeds", "2"],
        ["train", "--dataset", "digits", "--seeds", "1000000000"],
        ["train", "--dataset", "digits", "--arch", "cnn:" + "9" * 5000],
        ["reproduce", "table5", "--seeds", "1000000000"],
        ["train", "--dataset", "digits", "--mode", "rescale", "--factor", "inf"],
        *(
            ["train", "--dataset", "digits", f"--{n}", v]
            for n in ("lr", "momentum", "weight-decay")
            for v in ("nan", "inf")
        ),
        *(["init", "--arch", "cnn1", f"--{name}", HUGE, "-o", "a.pt"] for name in ("iterations", "num-classes")),
        *(
            ["measure", "--arch", "cnn1", f"--{name}", HUGE]
            for name in ("samples", "input-size", "input-channels", "top")
        ),
    ],
    ids=lambda arguments: " ".join(arguments)[:80],
)
def test_numbers_beyond_64_bits_or_without_a_value_are_bad_usage(
    arguments: list[str], tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = convsim(*arguments)
    assert (outcome.code, outcome.error.count("\n")) == (2, 0)
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_of_a_run_is_refused_before_it_trains(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == run.folder and mode & os.W_OK))
    with pytest.raises(InputError, match="one: is read-only; allow writing there"):
        train_run(open_run(run.folder, epochs=3))


class Odd(nn.Module):
    """Networks that fit a dataset in evaluation alone."""

    def __init__(self, kind: str, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
        self.kind = kind
        if kind == "frozen":
            self.requires_grad_(False)
        if kind == "meta":
            self.layers[0].to("meta")

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return super().state_dict(*arguments, **options) | ({"extra": {}} if self.kind == "extra" else {})

    def forward(self, images: Tensor) -> Any:
        if self.kind == "exits":
            sys.exit(3)
        if self.kind == "asserts":
            raise AssertionError
        if self.kind == "prints":
            print("here")
        logits = self.layers(images)
        if not self.training or self.kind in ("frozen", "prints"):
            return logits
        if self.kind == "fails":
            raise TypeError("targets\nare missing")
        return {"tuple": (logits, logits), "mean": logits.mean(0, keepdim=True), "detached": logits.detach()}[self.kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("tuple", r"returns a tuple for 2 images in training, expected \[2, 10\] logits"),
        ("mean", r"returns \[1, 10\] for 2 images in training"),
        ("fails", r"does not run in training on images \[2, 3, 32, 32\] of digits \(targets are missing\)"),
        ("detached", "its logits depend on no trainable parameter"),
        ("frozen", "its logits depend on no trainable parameter"),
        ("meta", "has parameters on the device meta, without values"),
        ("extra", "its state_dict holds a dict, extra; expected only tensors"),
        ("exits", r"does not run on images \[1, 3, 32, 32\] of digits \(SystemExit: 3\)"),
        ("asserts", r"does not run on images \[1, 3, 32, 32\] of digits \(AssertionError\)"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_first(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("odd_networks")
    module.build = lambda num_classes: Odd(kind, num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_networks", module)
    with pytest.raises(InputError, match=said):
        start_runs(replace(SMALL, arch="odd_networks:build"), tmp_path / "runs", None, None, SILENT)
    assert not (tmp_path / "runs").exists()


def test_what_a_network_prints_never_enters_the_data_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convsim: Convsim
) -> None:
    module = ModuleType("odd_networks")
    module.build = lambda num_classes=10: Odd("prints", num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_networks", module)
    small = ["--dataset", "digits", "--limit-train", 20, "--limit-test", 20, "--run-dir", tmp_path]
    trained = convsim("train", "--arch", "odd_networks:build", *small, "--epochs", 1, "--name", "a", "--json")
    resumed = convsim("train", "--resume", tmp_path / "a", "--arch", "odd_networks:build", "--epochs", 2, "--json")
    measured = convsim("measure", "--arch", "odd_networks:build", "--json")
    for outcome in (trained, resumed, measured):
        assert outcome.code == 0, outcome.err
        assert outcome.document["schema"] == 2
        assert "here" in outcome.err


def test_a_network_that_exits_while_it_trains_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convsim: Convsim
) -> None:
    monkeypatch.setattr("convsim_cli.training.launch.check_network", lambda *_: None)
    module = ModuleType("odd_networks")
    module.build = lambda num_classes: Odd("exits", num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_networks", module)
    outcome = convsim("train", "--arch", "odd_networks:build", "--dataset", "digits", "--run-dir", tmp_path / "runs")
    assert outcome.code == 1
    assert "SystemExit: 3" in outcome.error


def test_arguments_with_a_NUL_are_refused(run: Run) -> None:  # noqa: N802
    for name in ("arch", "dataset", "data_dir", "weights"):
        (run.folder / "args.json").write_text(json.dumps(asdict(SMALL) | {name: "a\0b"}))
        with pytest.raises(InputError, match=rf"`{name}` 'a\\x00b': contains a NUL character"):
            open_run(run.folder)


def test_arguments_that_no_file_can_be_named_by_are_refused(run: Run, convsim: Convsim) -> None:
    path = run.folder / "args.json"
    for name in ("arch", "dataset", "data_dir", "weights", "mean"):
        path.write_text(json.dumps(asdict(SMALL) | {name: "a\ud800b"}))
        for command in (["train", "--resume", run.folder], ["train", "--config", path]):
            assert "'a\\ud800b': contains a character" in convsim(*command).error
    path.write_text(json.dumps({"\ud800": 1}))
    assert r"unknown argument \ud800" in convsim("train", "--config", path).error
    path.write_text(json.dumps(asdict(SMALL) | {"data_dir": os.fsdecode(b"a\xff")}))
    assert open_run(run.folder).arguments.data_dir == "a\udcff"


def test_a_network_too_large_for_the_memory_is_said_to_be(tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim("train", "--dataset", "digits", "--arch", "cnn:9999999", "--run-dir", tmp_path)
    assert (outcome.code, "not enough memory (" in outcome.error) == (1, True)
    assert "RuntimeError" not in outcome.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [b"bad\xff", b"a\nb", b"\x1b[31mred"])
def test_runs_of_any_name_are_drawn_without_a_warning(name: bytes, run: Run, convsim: Convsim) -> None:
    folder = run.folder.rename(run.folder.with_name(os.fsdecode(name)))
    drawn = convsim("plot", folder, "-o", folder / "x.svg")
    assert (drawn.code, "warning" in drawn.err) == (0, False)
