"""What the GPU scripts share: files that are complete at any moment, limits of time, and failures in one line.

Importing this module makes `convsim_cli` importable from a checkout that is not installed.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# A convsim command on images that only look like CIFAR-10: torchvision compares checksums.
UNCHECKED = (
    "from torchvision.datasets import cifar; cifar.check_integrity = lambda *_: True; "
    "from convsim_cli.cli import main; main()"
)


def save(path: Path, document: Any) -> None:
    """Replace a JSON file in one step: a reader, or a kill, finds the former content or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(document, indent=1, ensure_ascii=False))
    new.replace(path)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds this checkout first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer, in the main thread and between two bytecodes."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def in_one_line(error: BaseException) -> str:
    """Return what went wrong, without line breaks, at most 300 characters long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def write_cifar10(folder: Path, images: int = 20) -> None:
    """Write noise in the files of CIFAR-10: five training batches and one for testing, of so many images each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data = torch.randint(256, (images, 3 * 32 * 32), generator=generator, dtype=torch.uint8).numpy()
        labels = torch.randint(10, (images,), generator=generator).tolist()
        (batches / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{number}" for number in range(10)]}))
