from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convsim, Start

from convsim_cli.inputs.datasets import DATASETS
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.networks.architectures import build_network
from convsim_cli.reproduction import experiments, published
from convsim_cli.training.config import Arguments
from convsim_cli.training.run import read_results
from convsim_cli.training.trainer import Trainer

REDUCED = ("--archs", "cnn1", "--limit-train", 96, "--limit-test", 32)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of table5, less what differs from one run to the next."""
    return [{**row, "measured": {**row["measured"], "seconds": None}, "runs": None} for row in rows]


@pytest.mark.slow
def test_table5_and_figures_1_to_3_on_real_cifar10_share_their_runs(
    data_dir: Path, tmp_path: Path, convsim: Convsim
) -> None:
    how = (*REDUCED, "--arms", "baseline,init", "--epochs", 2, "--data-dir", data_dir, "--run-dir", tmp_path, "--json")
    table = convsim("reproduce", "table5", *how)
    document = table.document
    assert tuple(document)[:3] == ("schema", "command", "name")
    assert [(row["arch"], row["arm"], row["published"]["test_accuracy"]) for row in document["rows"]] == [
        ("cnn1", "baseline", 74.66),
        ("cnn1", "init", 79.16),
    ]
    for row in document["rows"]:
        history = read_results(Path(row["runs"][0]))
        assert row["measured"]["best_test_accuracy"] == max(epoch["test_accuracy"] for epoch in history)
        assert (row["measured"]["seeds"], row["measured"]["epochs"]) == (1, 2)
    reduced = [
        "2 of 100 epochs",
        "96 of 50,000 train images",
        "32 of 10,000 test images",
        "without cnn2",
        "without reg",
    ]
    assert document["reduced"] == reduced
    assert all(phrase in document["title"] for phrase in reduced)
    assert json.loads((tmp_path / "table5.json").read_text()) == document
    for name, column in (("figure1", "cs"), ("figure2", "train_loss"), ("figure3", "train_accuracy")):
        outcome = convsim("reproduce", name, *how)
        assert f"{name}: 2 runs, 2 of them already finished" in outcome.err
        assert [row["arm"] for row in outcome.document["rows"]] == ["baseline", "init"]
        for row in outcome.document["rows"]:
            assert row[column] == [epoch[column] for epoch in read_results(Path(row["run"]))]
        assert outcome.document["reduced"] == reduced
        assert is_png(tmp_path / f"{name}.png")


@pytest.fixture
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> int:
    """Minimize the deep network of Figures 4 and 5 for as many iterations as a test can spare."""
    monkeypatch.setattr(published, "DEEP_ITERATIONS", 5)
    return published.DEEP_ITERATIONS


@pytest.mark.slow
def test_figures_4_and_5_on_real_cifar10_share_their_runs(
    data_dir: Path, tmp_path: Path, convsim: Convsim, few_iterations: int
) -> None:
    how = ("--epochs", 1, "--limit-train", 16, "--limit-test", 8, "--data-dir", data_dir, "--run-dir", tmp_path)
    grid = convsim("reproduce", "figure4", "--lrs", 0.01, "--batch-sizes", 64, *how)
    assert [(row["lr"], row["batch_size"], row["gain_published"]) for row in grid.rows] == [("0.01", "64", "")]
    sweep = convsim("reproduce", "figure5", "--iterations", f"0,{few_iterations}", *how, "--json")
    assert "figure5: 2 runs, 2 of them already finished" in sweep.err
    measured = [row["measured"]["best_test_accuracy"] for row in sweep.document["rows"]]
    assert [f"{accuracy:.4g}" for accuracy in measured] == [grid.rows[0]["baseline"], grid.rows[0]["init"]]
    assert is_png(tmp_path / "figure4.png")
    assert is_png(tmp_path / "figure5.png")
    assert "without I = 10, 20" in sweep.document["title"]


@pytest.mark.slow
def test_a_killed_reproduction_resumes_to_the_same_result(
    data_dir: Path, tmp_path: Path, convsim: Convsim, start: Start
) -> None:
    how = ("table5", *REDUCED, "--arms", "baseline,reg", "--epochs", 4, "--data-dir", data_dir)
    child = start("reproduce", *how, "--run-dir", tmp_path / "killed", "-q")
    results = tmp_path / "killed" / "cnn1-reg-s0" / "results.csv"
    while child.poll() is None and (not results.exists() or results.read_text().count("\n") < 2):
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert results.read_text().count("\n") < 5
    again = convsim("reproduce", *how, "--run-dir", tmp_path / "killed", "--json")
    assert "table5: 2 runs, 1 of them already finished" in again.err
    whole = convsim("reproduce", *how, "--run-dir", tmp_path / "whole", "--json")
    assert without_seconds(again.document["rows"]) == without_seconds(whole.document["rows"])
    assert len(list((tmp_path / "killed").glob("*/args.json"))) == 2


@pytest.mark.slow
def test_two_reproductions_at_once_share_the_work_and_agree(data_dir: Path, tmp_path: Path, start: Start) -> None:
    how = ("table5", *REDUCED, "--arms", "baseline,reg", "--epochs", 2, "--data-dir", data_dir, "--run-dir", tmp_path)
    children = [start("reproduce", *how) for _ in range(2)]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted(path.parent.name for path in tmp_path.glob("*/args.json")) == ["cnn1-baseline-s0", "cnn1-reg-s0"]
    epochs = sum(line.startswith("cnn1-") and " epoch " in line for text in said for line in text.splitlines())
    assert epochs == 4  # two runs of two epochs, each trained once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tabel5",), "unknown experiment 'tabel5': did you mean 'table5'?"),
        (("table1", "--epochs", 3), "table1 does not take --epochs"),
        (("table5", "--episodes", 3), "table5 does not take --episodes"),
        (("table5", "--arms", "reg-neighbors"), "did you mean 'reg-neighbours'?"),
        (("table5", "--archs", "cnn3", "--data-dir", "DATA"), "unknown network 'cnn3'"),
        (("figure4", "--lrs", "0.1;0.2"), "--lrs '0.1;0.2': expected numbers separated by commas"),
        (("figure5", "--iterations", "10,-1"), "expected whole numbers of 0 or above separated by commas"),
        (("figure1", "--data-dir", "nowhere"), "point --data-dir to the parent of an intact one"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    arguments: tuple[object, ...],
    message: str,
    data_dir: Path,
    tmp_path: Path,
    convsim: Convsim,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere" / "cifar-10-batches-py").mkdir(parents=True)
    outcome = convsim("reproduce", *(data_dir if item == "DATA" else item for item in arguments))
    assert outcome.code == 2
    assert message in outcome.error
    assert not (tmp_path / "runs").exists()


def test_an_unusable_network_is_named_before_any_folder_is_created(
    data_dir: Path, tmp_path: Path, convsim: Convsim
) -> None:
    for arch, said in (
        ("cnn:1", "no convolution kernels that form pairs"),
        ("torchvision:inception_v3", "does not run"),
    ):
        outcome = convsim(
            "reproduce", "table5", "--archs", arch, "--data-dir", data_dir, "--run-dir", tmp_path / "runs"
        )
        assert outcome.code == 2
        assert f"arch {arch}: " in outcome.error
        assert said in outcome.error
    assert not (tmp_path / "runs").exists()


def test_the_numerical_tables_run_on_the_cpu_only(tmp_path: Path, convsim: Convsim) -> None:
    for device in ("cuda", "mps", "cpuu"):
        assert convsim("reproduce", "table2", "--device", device, "--run-dir", tmp_path).code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("few_iterations")
def test_a_diverging_arm_is_a_warning_and_an_empty_cell(data_dir: Path, tmp_path: Path, convsim: Convsim) -> None:
    how = ("--epochs", 1, "--limit-train", 16, "--limit-test", 8, "--data-dir", data_dir, "--run-dir", tmp_path)
    outcome = convsim("reproduce", "figure4", "--lrs", 1e30, "--batch-sizes", 8, *how)
    assert outcome.code == 0
    assert "convsim: warning" in outcome.err
    assert outcome.rows[0]["gain_measured"] == ""


def test_precision_and_compile_are_those_of_the_runs_and_tell_them_apart(
    tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.arange(8))
    data = Dataset("cifar10", split, split, 10, (0.5,) * 3, (0.3,) * 3)
    monkeypatch.setattr(experiments, "load_data", lambda _: data)
    monkeypatch.setattr("convsim_cli.training.trainer.compile_network", lambda model, _: model)
    how = ("--archs", "cnn1", "--arms", "baseline", "--epochs", 1, "--run-dir", tmp_path, "--device", "cpu", "--json")
    found = []
    for settings in ((), ("--precision", "tf32"), ("--precision", "bf16", "--compile"), ("--precision", "fp32")):
        document = convsim("reproduce", "table5", *settings, *how).document
        run = Path(document["rows"][0]["runs"][0])
        saved = json.loads((run / "args.json").read_text())
        assert (document["precision"], document["compile"]) == (saved["precision"], saved["compile"])
        found.append((run.name, saved["precision"], saved["compile"]))
    assert found == [
        ("cnn1-baseline-s0", "fp32", False),
        ("cnn1-baseline-s0-2", "tf32", False),
        ("cnn1-baseline-s0-3", "bf16", True),
        ("cnn1-baseline-s0", "fp32", False),
    ]


@pytest.fixture
def tiny_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for CIFAR-10, with black images."""
    split = Split(torch.zeros(40, 32, 32, 3, dtype=torch.uint8), torch.arange(40) % 10)
    data = Dataset("cifar10", split, split, 10, (0.5,) * 3, (0.3,) * 3)
    monkeypatch.setitem(DATASETS, "cifar10", lambda _: data)
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    return tmp_path / "data"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_counts_what_is_left_and_writes_nothing(
    tiny_cifar10: Path, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "time_epoch", lambda arguments, data: 10.0)
    how = ("table5", "--archs", "cnn:2,cnn:4", "--arms", "baseline,reg", "--data-dir", tiny_cifar10)
    how += ("--run-dir", tmp_path / "runs", "--device", "cpu")
    planned = convsim("reproduce", *how, "--epochs", 3, "--dry-run", "--json").document
    assert (planned["runs"], planned["finished"], planned["epochs"], planned["epochs_done"]) == (4, 0, 12, 0)
    assert planned["seconds"] == 120.0
    assert not (tmp_path / "runs").exists()
    assert convsim("reproduce", *how, "--archs", "cnn:2", "--epochs", 2).code == 0
    before = files(tmp_path)
    outcome = convsim("reproduce", *how, "--epochs", 3, "--dry-run")
    counts = [(row["arch"], row["epochs"], row["epochs_done"], row["time"]) for row in outcome.rows]
    assert counts == [("cnn:2", "6", "4", "20 s"), ("cnn:4", "6", "0", "1 min 0 s")]
    assert (
        "table5: 4 runs, 0 finished; 12 epochs, 4 done; the rest takes about 1 min 20 s at the current load"
        in outcome.err
    )
    finished = convsim("reproduce", *how, "--archs", "cnn:2", "--epochs", 2, "--dry-run")
    assert "2 runs, 2 finished; 4 epochs, 4 done; nothing is left to run" in finished.err
    assert files(tmp_path) == before


def test_a_dry_run_downloads_nothing(tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", lambda _: pytest.fail("it was about to be downloaded"))
    outcome = convsim("reproduce", "figure4", "--dry-run", "--data-dir", tmp_path, "--run-dir", tmp_path / "runs")
    assert outcome.code == 2
    assert f"CIFAR10 is not in {tmp_path / 'cifar-10-batches-py'}; point --data-dir to its parent" in outcome.error
    assert not list(tmp_path.iterdir())


def test_an_epoch_is_timed_in_parts_and_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.zeros(6000, 1, 1, 3, dtype=torch.uint8), torch.arange(6000) % 10)
    data = Dataset("cifar10", split, split, 10, (0.5,) * 3, (0.3,) * 3)
    timed = []

    class Clockwork:
        """A trainer that takes 1 ms for an image in training, and 0.1 ms in evaluation."""

        def __init__(self, model: Any, part: Dataset, arguments: Arguments, device: Any) -> None:
            self.images = len(part.train)
            self.evaluation_seconds = 0.0001 * (min(4096, self.images) + len(part.test))

        def run_epoch(self) -> dict[str, float]:
            timed.append(self.images)
            return {"seconds": 0.001 * self.images + self.evaluation_seconds}

    monkeypatch.setattr(experiments, "Trainer", Clockwork)
    whole = experiments.time_epoch(Arguments(arch="cnn:2", device="cpu"), data)
    assert whole == pytest.approx(0.001 * 6000 + 0.0001 * (4096 + 6000))
    assert timed == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]  # the first that takes four seconds
    timed.clear()
    small = experiments.time_epoch(Arguments(arch="cnn:2", device="cpu", limit_train=20, limit_test=10), data)
    assert small == pytest.approx(0.001 * 20 + 0.0001 * (20 + 10))
    assert timed == [16, 20]


def test_the_evaluation_of_an_epoch_is_timed_apart() -> None:
    split = Split(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.arange(8))
    data = Dataset("cifar10", split, split, 10, (0.5,) * 3, (0.3,) * 3)
    arguments = Arguments(arch="cnn:2", device="cpu")
    trainer = Trainer(build_network("cnn:2", 10, 0), data, arguments, torch.device("cpu"))
    seconds = trainer.run_epoch()["seconds"]
    assert 0 < trainer.evaluation_seconds < seconds


def test_a_dry_run_of_a_numerical_table_counts_its_iterations(tmp_path: Path, convsim: Convsim) -> None:
    outcome = convsim("reproduce", "table2", "--dry-run", "--episodes", 50, "--run-dir", tmp_path / "runs")
    assert outcome.rows == [{"name": "table2", "episodes": "50", "iterations": "5000"}]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [("--precision", "tf32"), ("--compile",)], ids=str)
def test_the_numerical_tables_have_no_precision_to_choose(
    tmp_path: Path, convsim: Convsim, settings: tuple[str, ...]
) -> None:
    outcome = convsim("reproduce", "table2", *settings, "--run-dir", tmp_path)
    assert outcome.code == 2
    assert f"table2 does not take {settings[0]}" in outcome.error


def test_a_table_is_written_also_where_standard_output_is_full(tmp_path: Path, start: Start) -> None:
    child = start("reproduce", "table1", "--episodes", 2, "--json", "-q", "--run-dir", tmp_path, stdout="/dev/full")
    assert child.wait() == 1
    assert json.loads((tmp_path / "table1.json").read_text())["name"] == "table1"


def test_a_mistyped_experiment_is_named_before_its_options(convsim: Convsim) -> None:
    assert "did you mean 'table1'?" in convsim("reproduce", "tabel1", "--episodes", 10).error
