"""The scripts for a GPU, without one: no minute on a lent machine may be lost to what a CPU can show."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import parity
import pytest
import records
import torch
from training import noise

import convsim_cli
from convsim_cli.cli import COMMANDS
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.training.config import MODES
from tests.test_gpu import no_wait

NAMES = [one.name for one in parity.ENTRIES]


def some_rows(_: argparse.Namespace) -> Iterator[gpu.Part]:
    """A row, a failure, a part that takes too long, a row, and a failure outside of any part."""

    def one(what: str) -> Iterator[gpu.Row]:
        yield what, 1.0, "s", ""

    def fails() -> Iterator[gpu.Row]:
        yield "before the failure", 1.0, "s", ""
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    def waits() -> Iterator[gpu.Row]:
        time.sleep(60)
        yield "too late", 1.0, "s", ""

    yield "one", 30, lambda: one("first")
    yield "two", 30, fails
    yield "three", 0.2, waits
    yield "four", 30, lambda: one("last")
    raise KeyError("stage")


def killed(_: argparse.Namespace) -> Iterator[gpu.Part]:
    """A stage that takes its process along."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield "never", 30, lambda: iter(())


def stuck(_: argparse.Namespace) -> Iterator[gpu.Part]:
    """A stage that does not end."""
    time.sleep(600)
    yield "never", 30, lambda: iter(())


def later(_: argparse.Namespace) -> Iterator[gpu.Part]:
    yield "later", 30, lambda: iter([("later", "as before", "", "")])


@pytest.mark.slow
def test_a_stage_that_fails_keeps_its_rows_and_all_later_stages(tmp_path: Path) -> None:
    stages = (gpu.Stage("a", 120, some_rows), gpu.Stage("a", 120, killed), gpu.Stage("a", 4, stuck))
    assert gpu.main((*stages, gpu.Stage("a", 120, later)), ["--device", "cpu", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [(what, value) for what, value, *_ in found["some_rows"]] == [
        ("first", 1.0),
        ("before the failure", 1.0),
        ("two", "failed: RuntimeError: CUDA error: an illegal memory access"),
        ("three", "failed: TimeoutError: stopped after 0 s"),
        ("last", 1.0),
        ("some_rows", "failed: KeyError: 'stage'"),
    ]
    assert found["killed"] == [["killed", "failed: its process ended with -9", "", ""]]
    assert found["stuck"] == [["stuck", "failed: stopped after 4 s", "", ""]]
    assert found["later"] == [["later", "as before", "", ""]]


@pytest.mark.parametrize("call", ["a", "b"])
def test_the_stages_of_a_call_end_within_nine_minutes(call: str) -> None:
    assert 0 < sum(stage.limit for stage in gpu.STAGES if stage.call == call) <= 540


def smoke(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        device=torch.device("cpu"), smoke=True, output=folder, run_dir=folder / "runs", data_dir=folder, limit=60
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [gpu.init, gpu.penalty, gpu.epochs, gpu.memory], ids=lambda stage: stage.__name__)
def test_every_part_of_a_stage_gives_rows(stage: Any, tmp_path: Path) -> None:
    for name, limit, part in stage(smoke(tmp_path)):
        rows = list(part())
        assert rows, name
        assert limit <= next(known.limit for known in gpu.STAGES if known.parts is stage)
        assert all(isinstance(value, str) or value > 0 for _, value, *_ in rows)


def finished(arm: str) -> dict[str, Any]:
    measured = {"epochs": 100, "best_test_accuracy": 80.0, "last_test_accuracy": 79.0, "seconds": 60.0}
    return {"rows": [{"arm": arm, "published": {"test_accuracy": None}, "measured": measured}]}


def test_table_5_goes_seed_by_seed_and_reports_what_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []

    def convsim(given: argparse.Namespace, *arguments: str) -> Any:
        started.append(arguments)
        arm, seed = arguments[-1], arguments[arguments.index("--seed") + 1]
        folder = given.run_dir / f"cnn1-{arm}-s{seed}"
        folder.mkdir(parents=True)
        (folder / "results.csv").write_text("epoch\n1\n")
        (folder / "state.pt").write_text("large")
        code = int(arm == "reg")
        return SimpleNamespace(
            poll=lambda: code, returncode=code, communicate=lambda: (json.dumps(finished(arm)), None)
        )

    monkeypatch.setattr(gpu, "_convsim", convsim)
    given = smoke(tmp_path)
    given.smoke = False
    rows, failures = [], []
    for _, _, part in gpu.table5(given):
        try:
            for row in part():
                rows.append(row)
        except RuntimeError as error:
            failures.append(str(error))
    assert [arguments[arguments.index("--seed") + 1] for arguments in started] == [*"000001111122222"]
    assert [arguments[-1] for arguments in started] == 3 * [*gpu.ARMS]
    assert all({"--archs", "cnn1", "--precision", "tf32"} <= {*arguments} for arguments in started)
    assert [what for what, *_ in rows if "s2" in what and "best" in what] == [
        f"table5, cnn1-{arm}-s2, 100 epochs: best test accuracy" for arm in gpu.ARMS if arm != "reg"
    ]
    assert ("table5, init, 3 seeds: best test accuracy", 80.0, "± 0.00 %", "") in rows
    assert failures == [f"failed: cnn1-reg-s{seed} with 1; see what they printed" for seed in range(3)]
    with tarfile.open(tmp_path / "table5-s1.tar.gz") as packed:
        assert sorted(packed.getnames()) == sorted(f"cnn1-{arm}-s1/results.csv" for arm in gpu.ARMS)


def test_training_that_is_stopped_says_how_far_it_has_come(tmp_path: Path) -> None:
    (tmp_path / "runs" / "long").mkdir(parents=True)
    (tmp_path / "runs" / "long" / "results.csv").write_text("epoch,test_accuracy\n1,40\n2,50\n")
    sleeping = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(TimeoutError, match="long after 2 epochs: 2,50"), records.time_limit(0.5):
        list(gpu._ended(smoke(tmp_path), {"long": sleeping}, "packed"))
    assert sleeping.returncode == -signal.SIGTERM
    assert (tmp_path / "packed.tar.gz").exists()


def test_noise_is_tested_on_as_many_images_as_cifar10_has() -> None:
    data = noise(500, 100)
    assert (len(data.train), len(data.test)) == (500, 100)


def test_a_checkout_that_is_not_installed_is_found_first() -> None:
    assert str(records.ROOT) in sys.path
    assert (records.ROOT / "convsim_cli" / "__init__.py").exists()
    assert records.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(records.ROOT)


@pytest.mark.slow
def test_the_documented_command_collects_every_gpu_test_and_nothing_else() -> None:
    (command,) = (line for line in (gpu.__doc__ or "").splitlines() if "-m pytest" in line)
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments, "--collect-only", "-q"],
        cwd=records.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 40
    assert all(test.startswith("tests/test_gpu.py::") for test in tests)


@pytest.mark.parametrize("fails", [False, True], ids=["after a wait", "after a failure"])
def test_the_mode_that_refuses_waits_is_left_again(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if len(modes) == 1:  # as torch, which has set the mode when this is raised
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    if fails:
        with pytest.raises(ArithmeticError), no_wait():
            raise ArithmeticError
    else:
        with no_wait():
            assert modes == ["error"]
    assert modes == ["error", "default"]


def test_the_parity_list_holds_every_name_command_mode_and_objective() -> None:
    public = {name: getattr(convsim_cli, name) for name in convsim_cli.__all__}
    raised = {name for name, each in public.items() if isinstance(each, type) and issubclass(each, Exception)}
    expected = {f"library: {name}" for name in public.keys() - raised}
    expected |= {f"train: mode {mode}" for mode in MODES}
    for objective in OBJECTIVES:
        expected |= {f"penalty: {objective}", f"graphs: {objective}, adam", f"graphs: {objective}, sgd"}
    assert expected <= {*NAMES}
    words = {word.strip(",") for name in NAMES if name.startswith("convsim ") for word in name.split()}
    assert {command.__name__ for command in COMMANDS} <= words
    assert len(NAMES) == len({*NAMES})


@pytest.mark.slow
@pytest.mark.parametrize("one", parity.ENTRIES, ids=NAMES)
def test_an_entry_of_the_parity_list_agrees_with_itself(one: parity.Entry) -> None:
    row = parity.compare(one, torch.device("cpu"), patience=300)
    assert row["outcome"] == "ok"


@pytest.mark.parametrize(
    ("found", "expected", "apart"),
    [
        (torch.tensor([1.0, 2.002]), torch.tensor([1.0, 2.0]), 0.002 / 5**0.5),
        (1.0, 2.0, 0.5),
        (0, 0.0, 0.0),
        (None, None, 0.0),
        (None, 1.0, float("inf")),
        (float("nan"), 1.0, float("inf")),
        (torch.zeros(2), torch.zeros(3), float("inf")),
    ],
)
def test_a_difference_is_relative_and_infinite_for_what_is_missing(found: Any, expected: Any, apart: float) -> None:
    assert parity.difference(found, expected) == pytest.approx(apart, rel=1e-3)


def test_an_entry_that_differs_fails_or_takes_too_long_says_so() -> None:
    def apart(device: torch.device) -> parity.Figures:
        return {"same": 1.0, "other": 1.0 + (device.type == "meta")}

    def slow(_: torch.device) -> parity.Figures:
        time.sleep(60)
        return {}

    def row(compute: parity.Compute, patience: float = 30) -> dict[str, Any]:
        return parity.compare(parity.Entry("entry", 1e-3, compute), torch.device("meta"), patience)

    assert row(apart)["outcome"] == "FAILED: other"
    assert row(lambda device: {device.type: 1.0})["outcome"].startswith("FAILED: ArithmeticError: other figures")
    assert row(lambda _: {}["gone"])["outcome"] == "FAILED: KeyError: 'gone'"
    assert row(slow, 0.2)["outcome"] == "FAILED: TimeoutError: stopped after 0 s"
