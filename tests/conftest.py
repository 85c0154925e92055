"""What several tests share: the real data and checkpoints beside the project, and the command line run in place."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SHARED = Path(__file__).parents[2] / "shared"
CHECKPOINTS = (
    "aliked_n16.pth",
    "espnet_decoder.pth",
    "minifasnet_v2.pth",
    "resnet20_cifar10.safetensors",
    "resnet20_cifar10.th",
    "rfb320_face.pth",
)


@pytest.fixture
def data_dir() -> Path:
    """The folder that holds the real CIFAR-10."""
    if not (SHARED / "data" / "cifar-10-batches-py").is_dir():
        pytest.skip("the real CIFAR-10 is not in ../shared/data")
    return SHARED / "data"


@pytest.fixture
def checkpoint_dir() -> Path:
    """The folder of real trained checkpoints."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("the real checkpoints are not in ../shared/checkpoints")
    return SHARED / "checkpoints"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@dataclass
class Outcome:
    """How a command ended: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def rows(self) -> list[dict[str, str]]:
        header, *lines = (line.split("\t") for line in self.out.splitlines())
        return [dict(zip(header, line, strict=True)) for line in lines]

    @property
    def error(self) -> str:
        """The one line that an error is."""
        lines = [line for line in self.err.splitlines() if line.startswith("convsim: error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


Convsim = Callable[..., Outcome]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the command line in a process of its own, one that Ctrl-C reaches whoever started the tests."""
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "convsim_cli", *map(str, arguments)]
        default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def convsim(capsys: pytest.CaptureFixture[str]) -> Convsim:
    """Run the command line in this process: `convsim("init", path, "--json")`."""
    from convsim_cli.cli import run

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


def same_bits(a: Any, b: Any) -> bool:
    """Whether two checkpoints have one structure, and tensors of one type, shape and content to the bit."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
            return False
        return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
    if isinstance(a, dict):
        same = (
            type(a) is type(b) and list(a) == list(b) and vars(a).keys() == vars(b).keys()
            if hasattr(a, "__dict__")
            else list(a) == list(b)
        )
        return same and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)
