"""What several tests share: the real data and checkpoints beside the project, and the command line run in place."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Program
from torch import Tensor

from convsim_cli.inputs.datasets import DATASETS
from convsim_cli.inputs.images import Dataset
from convsim_cli.reproduction import published

# Tests share the cores among processes (pytest-xdist), each of one thread, in what they start as in themselves.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

SHARED = Path(os.environ.get("CONVSIM_SHARED", Path(__file__).parents[2] / "shared"))
CIFAR10 = SHARED / "data" / "cifar-10-batches-py"
CHECKPOINTS = {  # and what to save under the name
    "aliked_n16.pth": "github.com/Shiaoming/ALIKED: models/aliked-n16.pth",
    "espnet_decoder.pth": "github.com/sacmehta/ESPNet: pretrained/decoder/espnet_p_2_q_8.pth",
    "minifasnet_v2.pth": (
        "github.com/minivision-ai/Silent-Face-Anti-Spoofing: resources/anti_spoof_models/2.7_80x80_MiniFASNetV2.pth"
    ),
    "resnet20_cifar10.safetensors": "the state_dict of resnet20_cifar10.th, without the prefix module. of its names",
    "resnet20_cifar10.th": "github.com/akamaster/pytorch_resnet_cifar10: pretrained_models/resnet20-12fca82f.th",
    "rfb320_face.pth": (
        "github.com/Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB: models/pretrained/version-RFB-320.pth"
    ),
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run what names a file, a test or a keyword in this process: starting workers takes longer than a few tests."""
    named = any(Path(argument.partition("::")[0]).is_file() for argument in config.args)
    return 0 if named or config.option.keyword else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the shared checkpoints, so that `-m "not checkpoints"` leaves it out."""
    for item in items:
        if "checkpoint_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("checkpoints")


def _skip_without(path: Path, source: str) -> None:
    if not path.exists():
        pytest.skip(f"{path} is missing; get it from {source} (CONVSIM_SHARED names another folder than {SHARED})")


@pytest.fixture
def data_dir() -> Path:
    """The folder that holds the real CIFAR-10."""
    _skip_without(CIFAR10, "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz")
    return CIFAR10.parent


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the real CIFAR-10 once a process: its checksums take two seconds."""
    read = DATASETS["cifar10"]
    monkeypatch.setitem(DATASETS, "cifar10", lambda path: _cifar10(read) if path == CIFAR10.parent else read(path))


@cache
def _cifar10(read: Callable[[Path], Dataset]) -> Dataset:
    return read(CIFAR10.parent)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every row of the numerical tables end after 20 iterations, for tests of what is around them."""
    for table in (published.FITTED, published.TABLE_9):
        for key, settings in table.items():
            monkeypatch.setitem(table, key, replace(settings, iterations=20))


@pytest.fixture
def checkpoint_dir() -> Path:
    """The folder of real trained checkpoints."""
    for name, source in CHECKPOINTS.items():
        _skip_without(SHARED / "checkpoints" / name, source)
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
Start = Callable[..., Program]


def _make_device(path: Path) -> None:
    """Make a device that is `path` itself: a link to one would let a broken guard replace the machine's own."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))
    except PermissionError:
        path.symlink_to("/dev/full")  # which such a user cannot replace


IRREGULAR: dict[str, Callable[[Path], object]] = {  # what no file may be written over, with how to make it
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": _make_device,
    "a broken link": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the command line in a process of its own: `start("train", "--arch", "cnn1", stderr=subprocess.PIPE)`."""
    started: list[Program] = []

    def call(*arguments: object, **streams: Any) -> Program:
        started.append(Program(*arguments, **streams))
        return started[-1]

    yield call
    for program in started:
        program.close()


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
