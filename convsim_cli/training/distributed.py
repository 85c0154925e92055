"""The processes of one data-parallel run, as `torchrun` starts them, and locks between launches.

Only rank 0 writes files and logs. Nothing here knows convsim: torch's DistributedDataParallel averages the gradients,
over nccl on CUDA and gloo elsewhere. If a process dies, the others fail at their next exchange.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from convsim_cli.errors import BusyError, ConvsimError, ConvsimWarning, InputError, RankZeroFailedError, wait_for_lock

T = TypeVar("T")

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
LONGEST_PREPARATION = timedelta(days=1)  # of rank 0, which downloads data and runs Algorithm 1 while the others wait


def is_rank_zero() -> bool:
    """Return whether this process is rank 0 of its launch, before it has joined the others."""
    return _launched() == 1 or os.environ.get("RANK", "0") == "0"


def _launched() -> int:
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that `torchrun` started together, if any. On CUDA each one gets its GPU as current device.

    Raises InputError for a device that all of them would share, and for fewer GPUs than processes.
    """
    size = _launched()
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"`device` {device}: torchrun gives each process its own GPU; use `device` cuda")
        local = int(os.environ["LOCAL_RANK"])
        if (count := torch.cuda.device_count()) <= local:
            raise InputError(f"process {local} of this machine has no GPU: the machine has {count}; start as many")
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_PREPARATION)
    try:
        yield Processes(distributed.get_rank(), size)
    finally:
        gc.collect()  # a DistributedDataParallel still alive would end its threads at interpreter exit, by an abort
        distributed.destroy_process_group()


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a folder. The lock ends with the process, even if it is killed.

    wait: until another process releases it, with a warning after two seconds. Raises BusyError if another process holds
    it. On a file system without locks this warns, and keeps nobody away.
    """
    with ExitStack() as held:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, descriptor)
            if wait:
                wait_for_lock(descriptor, f"works in {folder}")
            elif not _try_lock(descriptor):
                raise BusyError(f"{folder}: another process is working on this run")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise InputError(f"{folder}: cannot be opened or locked ({error.strerror})") from error
            said = f"{folder}: its file system has no locks; do not train a run there from two processes at once"
            warnings.warn(said, ConvsimWarning, stacklevel=3)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class Processes:
    """This process among those of a run, 0 ≤ rank < size. All processes must call the methods that communicate."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch, along its first axis."""
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, totals: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, which replaces it."""
        if self.size > 1:
            distributed.all_reduce(totals)
        return totals

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 only and return its result on every rank.

        Raises on rank 0 what the function raises, and RankZeroFailedError elsewhere.
        """
        result, failure = None, None
        if self.is_rank_zero:
            try:
                result = function()
            except ConvsimError as error:
                failure = error
        code = failure.exit_code if failure else None
        if self.size > 1:
            box: list[Any] = [result, code]
            distributed.broadcast_object_list(box, src=0)
            result, code = box
        if failure is not None:
            raise failure
        if code is not None:
            raise RankZeroFailedError(code)
        return cast(T, result)

    def rank_zero_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, then on the others, and return each one's own result: it may download files."""
        results: list[T] = []
        self.on_rank_zero(lambda: results.append(function()))
        return results[0] if results else function()

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return a module that averages its gradients over the processes. The model takes rank 0's weights."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process rank 0's buffers: the running statistics that evaluation uses."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)


ALONE = Processes()
