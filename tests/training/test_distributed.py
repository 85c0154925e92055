"""Several processes of one run, over gloo: forked, with what torchrun tells them (benchmarks/parity.py starts it)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Start
from forks import Program, call_in_fork, fork
from torch import distributed, nn

from convsim_cli.errors import ConvsimWarning
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.training.config import Arguments
from convsim_cli.training.distributed import Processes, is_rank_zero, join_processes, locked
from convsim_cli.training.run import Run, RunCallbacks, command_to_train, read_results, train_run
from convsim_cli.training.trainer import Trainer, reestimate_together

SMALL = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", "61", "--limit-test", "31", "--batch-size", "20")

Ranks = Callable[..., list[Program]]


def environments() -> list[dict[str, str]]:
    """Return what torchrun tells each of two processes on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


@pytest.fixture
def ranks(start: Start) -> Ranks:
    """Start the command line in two processes of one run: `ranks("train", "--arch", "cnn1")`."""
    return lambda *arguments: [start(*arguments, environment=environment) for environment in environments()]


def test_the_others_wait_for_rank_0_as_long_as_it_prepares_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, timedelta] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "init_process_group", lambda _, **options: found.update(options))
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with join_processes(torch.device("cpu")):
        assert found["timeout"] >= timedelta(hours=12)  # torch's own are 10 and 30 minutes


def test_a_rank_without_others_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_rank_zero()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_rank_zero()


def train_an_epoch(environment: dict[str, str], path: Path) -> None:
    """Train on 64 images in batches of 21: shares are uneven, and of the last, a single image, rank 1 has none."""
    os.environ.update(environment)
    with join_processes(torch.device("cpu")) as processes:
        torch.manual_seed(processes.rank)  # whatever the others start from, rank 0's weights count
        features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=4), nn.Flatten())
        model = features.append(nn.LazyLinear(10))
        data = load_dataset("digits", Path()).limited(71, 31).hold_out(7)
        model(data.normalize(data.test.images[:1]))
        arguments = Arguments(mode="reg", lr=0.1, beta="auto", beta_schedule="loss", batch_size=21, augment="flip-crop")
        trainer = Trainer(model, data, arguments, torch.device("cpu"), processes)
        row = trainer.run_epoch()
        torch.manual_seed(1)  # from here on the same in every process
        normalized = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
        normalized.append(nn.BatchNorm2d(4))
        reestimate_together(normalized, data, torch.arange(60).split(10), processes)
        if processes.is_rank_zero:
            figures = torch.tensor([trainer.beta or 0.0, *(value for key, value in row.items() if key != "seconds")])
            statistics = {f"normalized.{name}": tensor for name, tensor in normalized.state_dict().items()}
            torch.save({**trainer.model.state_dict(), **statistics, "row": figures}, path)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    call_in_fork(train_an_epoch, {}, tmp_path / "one")
    for process in [fork(train_an_epoch, environment, tmp_path / "two") for environment in environments()]:
        process.join()
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_only_rank_zero_writes_and_logs_and_a_run_can_be_resumed(tmp_path: Path, ranks: Ranks, start: Start) -> None:
    train = ("train", *SMALL, "--mode", "init", "--iterations", 5, "--run-dir", tmp_path)
    part = [
        start(*train, "--name", "part", "--epochs", 1, "--json", stdout=subprocess.PIPE, environment=told)
        for told in environments()
    ]
    (out, err), (other_out, other_err) = (process.communicate() for process in part)
    assert json.loads(out)["runs"][0]["epochs"] == 1
    assert [line.startswith("epoch 1/1") for line in err.splitlines() if line.startswith("epoch")] == [True]
    assert (other_out, "epoch" in other_err) == ("", False)
    resumed = ranks("train", "--resume", tmp_path / "part", "--epochs", 2, "-q")
    assert [process.wait() for process in resumed] == [0, 0]
    assert [process.wait() for process in ranks(*train, "--name", "whole", "--epochs", 2, "-q")] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]
    part_rows, whole_rows = ([{**row, "seconds": 0} for row in read_results(tmp_path / n)] for n in ("part", "whole"))
    assert part_rows == whole_rows
    assert (tmp_path / "part" / "last.safetensors").read_bytes() == (
        tmp_path / "whole" / "last.safetensors"
    ).read_bytes()


def the_error_in(said: str) -> str:
    (line,) = (line for line in said.splitlines() if "convsim: error" in line)
    return line


@pytest.mark.parametrize(
    ("mistake", "code", "said"),
    [
        (("--dataset", "nodata"), 2, "unknown dataset 'nodata'"),
        (("--lr", "1e30"), 1, "epoch 1: the loss is nan"),
    ],
    ids=["bad input", "diverging"],
)
def test_an_error_is_reported_once(
    mistake: tuple[str, ...], code: int, said: str, tmp_path: Path, ranks: Ranks
) -> None:
    started = ranks("train", *SMALL, *mistake, "--run-dir", tmp_path, "-q")
    lines = "".join(process.communicate()[1] for process in started)
    assert [process.returncode for process in started] == [code, code]
    assert said in the_error_in(lines)


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path: Path, ranks: Ranks) -> None:
    first, second = ranks("train", *SMALL, "--epochs", 100_000, "--run-dir", tmp_path, "--name", "x", "-q")
    while not (tmp_path / "x" / "results.csv").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second.kill()
    _, said = first.communicate(timeout=60)
    assert second.wait() == -signal.SIGKILL
    assert first.returncode == 1
    assert the_error_in(said)


def test_a_folder_on_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(ConvsimWarning, match="has no locks"), locked(tmp_path):
        pass


def test_waiting_for_a_folder_is_said_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convsim_cli.errors.PATIENCE", 0.05)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, [held]).start()
    with pytest.warns(ConvsimWarning, match="waiting for another process"), locked(tmp_path, wait=True):
        pass


def test_the_other_ranks_load_data_after_rank_0_when_a_run_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Ranks(Processes):
        def rank_zero_first(self, function: Callable[[], Any]) -> Any:
            asked.append(function)
            raise KeyboardInterrupt

    monkeypatch.setattr("convsim_cli.training.run.read_state", lambda _: None)
    run = Run(Path("/"), Arguments(processes=1))
    monkeypatch.setattr("convsim_cli.training.run.locked", nullcontext)
    with pytest.raises(KeyboardInterrupt):
        train_run(run, RunCallbacks(), None, Ranks())
    assert asked


def test_a_run_of_several_processes_is_resumed_by_as_many() -> None:
    command = command_to_train("resume", Path("runs/a b"), {}, 2)
    assert command == "torchrun --nproc-per-node 2 -m convsim_cli train --resume 'runs/a b'"
