"""Many runs at once, and runs that are stopped by a signal at any moment."""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from conftest import Convsim, Start
from forks import call_in_fork

from convsim_cli.training.config import Arguments
from convsim_cli.training.launch import create_run
from convsim_cli.training.run import read_results

TRAIN = ("train", "--arch", "cnn:4", "--dataset", "digits", "--limit-train", 160, "--limit-test", 60)
TRAIN += ("--batch-size", 20, "--iterations", 20)
EPOCHS = 5


def create_ten_runs(parent: Path) -> list[Path]:
    return [create_run(Arguments(), parent, None).folder for _ in range(10)]


def test_eight_processes_that_start_ten_runs_each_have_eighty_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = [folder for made in pool.map(call_in_fork, 8 * [create_ten_runs], 8 * [tmp_path]) for folder in made]
    assert len(folders) == len(set(folders)) == 80
    assert len(list(tmp_path.glob("*/args.json"))) == 80


def results(folder: Path) -> list[dict[str, Any]]:
    return [{**row, "seconds": 0} for row in read_results(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["init+reg", "rescale"])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(
    mode: str, tmp_path: Path, start: Start, convsim: Convsim
) -> None:
    how = (*TRAIN, "--mode", mode, "--momentum", 0.9, "--epochs", EPOCHS, "--run-dir", tmp_path)
    assert convsim(*how, "--name", "whole", "-q").code == 0
    chance, seconds = random.Random(mode), sum(row["seconds"] for row in read_results(tmp_path / "whole"))
    for case, stop in product(cases(1), (signal.SIGINT, signal.SIGKILL)):
        part = tmp_path / f"part{case}{stop.name}"
        child = start(*how, "--name", part.name, "-q")
        while child.poll() is None and not (part / "results.csv").exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, seconds / 3))
        child.send_signal(stop)
        assert child.wait() == (130 if stop == signal.SIGINT else -signal.SIGKILL), "it had ended before the signal"
        assert len(results(part)) < EPOCHS
        assert convsim("train", "--resume", part, "-q").code == 0
        assert results(part) == results(tmp_path / "whole")
        for file in ("last.safetensors", "best.safetensors"):
            assert (part / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        assert not list(part.glob(".convsim-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_the_same_seed_twice_is_the_same_to_the_bit(tmp_path: Path, convsim: Convsim) -> None:
    first, second = (tmp_path / name for name in ("one", "two"))
    for folder in (first, second):
        folder.mkdir()
        convsim("init", "--arch", "cnn:8", "-o", folder / "m.safetensors", "--iterations", 20, "--seed", 3)
        convsim(*TRAIN, "--mode", "init", "--epochs", 2, "--run-dir", folder, "--name", "run", "--seed", 3)
        for name, command in (
            ("measured", ("measure", folder / "m.safetensors", "--seed", 3)),
            ("reproduced", ("reproduce", "table1", "--episodes", 5, "--seed", 3, "--run-dir", folder)),
        ):
            text = convsim(*command, "--json").out
            (folder / name).write_text(text.replace(str(folder), "FOLDER"))
    for file in ("m.safetensors", "run/last.safetensors", "run/best.safetensors", "measured", "reproduced"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert results(first / "run") == results(second / "run")
