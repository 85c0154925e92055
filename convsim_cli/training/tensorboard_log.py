"""A run's results for TensorBoard, in the folder `tensorboard` of the run. TensorBoard is an extra of that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convsim_cli.errors import InputError, WriteError
from convsim_cli.training.results import Row

FOLDER = "tensorboard"
Log = Callable[[Row], None]


def summary_writer() -> Any:
    """Return torch's class that writes for TensorBoard. Raises InputError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "`tensorboard` requires the package tensorboard, which is not installed: "
            "pip install 'convsim[tensorboard]', or pip install tensorboard"
        ) from error
    return SummaryWriter


@contextmanager
def tensorboard_log(run: Path, next_epoch: int) -> Iterator[Log]:
    """Yield what writes a row of results: each column is a scalar of its name, over epochs.

    next_epoch: the first one that is to come; TensorBoard hides what a crash has left of it. Raises InputError if the
    package is missing, and WriteError.
    """
    folder = run / FOLDER
    writer = _written(folder, lambda: summary_writer()(str(folder), purge_step=next_epoch))

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    try:
        yield lambda row: _written(folder, lambda: write(row))
    finally:
        writer.close()


def _written(folder: Path, write: Callable[[], Any]) -> Any:
    try:
        return write()
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from error
