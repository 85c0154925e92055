"""A finished run, trained once, to be harmed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import NAMES, SMALL

from convsim_cli.training.launch import create_run
from convsim_cli.training.run import Run, train_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = create_run(SMALL, tmp_path_factory.mktemp("runs"), "one")
    train_run(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A finished run of two epochs, to be harmed."""
    (tmp_path / "one").mkdir()
    for name in NAMES:
        (tmp_path / "one" / name).write_bytes((trained.folder / name).read_bytes())
    return Run(tmp_path / "one", trained.arguments)
