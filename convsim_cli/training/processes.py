"""The processes of one data-parallel run, as `torchrun` starts them: who leads, and who does what share.

Nothing here knows convsim: torch's own DistributedDataParallel averages the gradients, over nccl on CUDA and gloo
elsewhere. A process that dies takes the others with it: their next exchange fails.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from convsim_cli.errors import ConvsimError, FollowedError, InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. Every method that exchanges something is to be called by all of them.

    rank: 0 ≤ rank < size; the process of rank 0 leads: it alone writes and talks.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch, along its first axis."""
        return batch.tensor_split(self.size)[self.rank]

    def add_up(self, totals: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.size > 1:
            distributed.all_reduce(totals)
        return totals

    def from_leader(self, value: T) -> T:
        """Return what the leading process has here."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def led(self, function: Callable[[], T]) -> T:
        """Return what a function gives in the leading process, which alone calls it.

        Raises there what the function raises, and FollowedError elsewhere.
        """
        found, failure = None, None
        if self.leads:
            try:
                found = function()
            except ConvsimError as error:
                failure = error
        found, code = self.from_leader((found, failure.exit_code if failure else None))
        if failure is not None:
            raise failure
        if code is not None:
            raise FollowedError(code)
        return cast(T, found)

    def leader_first(self, function: Callable[[], T]) -> T:
        """Return what a function gives, called by the leading process before the others: it may fetch files."""
        found: list[T] = []
        self.led(lambda: found.append(function()))
        return found[0] if found else function()

    def gather(self, value: T) -> list[T]:
        """Return what each process has here, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return a module whose gradients are averaged over the processes, having taken the leader's weights."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the leader's buffers: the running statistics that evaluation takes."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)


ALONE = Processes()


def leads() -> bool:
    """Return whether this process is to talk, before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the run that `torchrun` started this process for, if any; give its processes and this one's device.

    Raises InputError for a device that all of them would share, and for fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"--device {device}: torchrun gives each process a GPU of its own; take --device cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (count := torch.cuda.device_count()) <= device.index:
            raise InputError(f"process {device.index} of this machine has no GPU of its own: there are {count}")
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), size), device
    finally:
        gc.collect()  # a DistributedDataParallel still alive would end its threads at interpreter exit, by an abort
        distributed.destroy_process_group()
