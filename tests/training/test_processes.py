"""Several processes of one run, over gloo, started by torchrun as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convsim_cli.training.results import read_results

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", "61", "--limit-test", "31", "--batch-size", "20")

# 64 images in batches of 21: shares are uneven, and of the last batch, a single image, the second process has none.
EPOCH = """
import sys
from pathlib import Path
import torch
from torch import nn
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.training.processes import joined
from convsim_cli.training.arguments import Arguments
from convsim_cli.training.evaluation import reestimate_together
from convsim_cli.training.trainer import Trainer

with joined(torch.device("cpu")) as (processes, device):
    torch.manual_seed(processes.rank)  # whatever the others start from, rank 0's weights count
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=4), nn.Flatten(), nn.LazyLinear(10))
    data = load_dataset("digits", Path()).limited(64, 31)
    model(data.normalize(data.test.images[:1]))
    arguments = Arguments(mode="reg", lr=0.1, beta=0.01, beta_schedule="loss", batch_size=21)
    trainer = Trainer(model, data, arguments, device, processes)
    row = trainer.run_epoch()
    torch.manual_seed(1)  # from here on the same in every process
    normalized = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    reestimate_together(normalized, data, torch.arange(60).split(10), processes)
    if processes.is_rank_zero:
        figures = torch.tensor([value for key, value in row.items() if key != "seconds"])
        statistics = {f"normalized.{name}": tensor for name, tensor in normalized.state_dict().items()}
        torch.save({**trainer.model.state_dict(), **statistics, "row": figures}, sys.argv[1])
"""


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def torchrun() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to be killed at the end of a test, with all that they have started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run(*command: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished


def test_two_processes_train_as_one_does(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "epoch.py"
    script.write_text(EPOCH)
    run(sys.executable, script, tmp_path / "one", environment=environment)
    run(*TORCHRUN, script, tmp_path / "two", environment=environment)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_only_rank_zero_writes_and_logs_and_a_run_can_be_resumed(tmp_path: Path, environment: dict[str, str]) -> None:
    train = (*TORCHRUN, "-m", "convsim_cli", "train", *SMALL, "--mode", "init", "--iterations", "5")
    part = run(*train, "--run-dir", tmp_path, "--name", "part", "--epochs", 1, "--json", environment=environment)
    assert json.loads(part.stdout)["runs"][0]["epochs"] == 1
    assert [line.startswith("epoch 1/1") for line in part.stderr.splitlines() if line.startswith("epoch")] == [True]
    resume = (*TORCHRUN, "-m", "convsim_cli", "train", "--resume", tmp_path / "part", "--epochs", 2, "-q")
    run(*resume, environment=environment)
    run(*train, "--run-dir", tmp_path, "--name", "whole", "--epochs", 2, "-q", environment=environment)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]
    part_rows, whole_rows = ([{**row, "seconds": 0} for row in read_results(tmp_path / n)] for n in ("part", "whole"))
    assert part_rows == whole_rows
    assert (tmp_path / "part" / "last.safetensors").read_bytes() == (
        tmp_path / "whole" / "last.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (("--dataset", "nodata"), "unknown data set 'nodata'"),
        (("--lr", "1e30"), "epoch 1: the loss is nan"),
    ],
    ids=["bad input", "diverging"],
)
def test_an_error_is_reported_once(
    mistake: tuple[str, ...], said: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [*TORCHRUN, "-m", "convsim_cli", "train", *SMALL, *mistake, "--run-dir", str(tmp_path), "-q"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    (line,) = (line for line in ended.stderr.splitlines() if "convsim: error" in line)
    assert said in line


def test_a_process_that_dies_ends_the_run_with_an_error(
    tmp_path: Path, environment: dict[str, str], torchrun: list[subprocess.Popen[str]]
) -> None:
    command = (
        *TORCHRUN,
        "-m",
        "convsim_cli",
        "train",
        *SMALL,
        "--epochs",
        "100000",
        "--run-dir",
        tmp_path,
        "--name",
        "x",
    )
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    torchrun.append(process)
    while not (tmp_path / "x" / "results.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(pid for pid in children if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    os.kill(int(victim), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
