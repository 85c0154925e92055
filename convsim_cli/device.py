"""Devices and the host: CUDA graphs, random generators, the allocator, small files, interruption, and progress."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from convsim_cli.errors import ConvsimError, InputError, did_you_mean, no_name_twice, open_regular

Advance = Callable[[int], None]  # takes the number of steps completed since the last call
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # takes a description and the total number of steps
Step = Callable[[], None]

WARM_UP = 3  # iterations before the recording of a graph: whatever is created once must exist by then
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_LARGE = 1 << 20  # bytes
LARGEST_TEXT = 100_000_000  # bytes of a JSON or CSV file: read, it takes several times as much


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes the first available accelerator.

    Raises InputError for an unknown name and for a device that this machine does not have: never a silent fallback.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and (kind != "cuda" or not index.isdecimal())):
        raise InputError(f"`device` {name}: {did_you_mean(kind, ('auto', 'cpu', 'cuda', 'cuda:N', 'mps'))}")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if len(index) > 9 or int(index or 0) >= there:  # int() refuses thousands of digits
        count, own = f"{there} {kind} device{'s' * (there != 1)}", f"{kind}, " if there else ""
        raise InputError(f"`device` {name}: this machine has {count}; use `device` {own}cpu or auto")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def repeated(step: Step, device: torch.device) -> Step:
    """Return a function that runs one iteration per call: `step` itself or, on CUDA, the replay of its graph.

    step: works on the same memory of `device` every time and never waits for the device. The first iterations run as
    they are. The recording raises ConvsimError if it fails; CONVSIM_CUDA_GRAPHS=0 in the environment does without.
    """
    if device.type != "cuda" or os.environ.get("CONVSIM_CUDA_GRAPHS") == "0":
        return step
    return _Graphed(step, device)


class _Graphed:
    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device, self._before = step, device, WARM_UP
        self._replay: Step | None = None

    def __call__(self) -> None:
        with torch.cuda.device(self._device):  # graphs and new streams belong to the current device
            if self._before > 0:
                self._before -= 1
                return self._step()
            if self._replay is None:
                self._replay = self._record()
            self._replay()

    def _record(self) -> Step:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        try:
            # torch.cuda.graph leaves its stream current if the capture cannot be ended: the outer context does not.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()  # recorded, not run
        except RuntimeError as error:
            reason = str(error.__context__ or error).partition("\n")[0]
            raise ConvsimError(
                f"{self._device}: an iteration could not be recorded as a CUDA graph ({reason}); "
                "set CONVSIM_CUDA_GRAPHS=0 to run without graphs"
            ) from error
        return graph.replay


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and numpy: user networks may draw from any of them."""
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % (1 << 32))


def generator_states() -> tuple[Any, ...]:
    """Return the states of Python's and numpy's global generators, in types that `weights_only` loads."""
    import numpy

    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), (name, numpy.asarray(keys).tolist(), *rest)


def restore_generators(states: tuple[Any, ...]) -> None:
    """Restore `generator_states`. Raises TypeError or ValueError for anything else."""
    import numpy

    pythons, (name, keys, position, *rest) = states
    if not 0 <= position <= len(keys):  # numpy would read beyond its keys
        raise ValueError(f"numpy's generator is at {position} of {len(keys)}")
    random.setstate(pythons)
    numpy.random.set_state((name, keys, position, *rest))


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next allocation of this process, to its end, and return whether that could be set.

    Only glibc supports this; the process then keeps its peak memory.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> bool:
    """Give every block of a megabyte or more back to the system once it is freed, and return whether that could be set.

    Only glibc supports this.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_MMAP_THRESHOLD, _LARGE))


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Defer Ctrl-C until the block has ended, then pass it on, usually as KeyboardInterrupt.

    Python handles signals in its main thread only: elsewhere this does nothing, and so where SIGINT is ignored.
    """
    former = signal.getsignal(signal.SIGINT)
    if not callable(former) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if held:
            former(signal.SIGINT, held[0])


def unreported(_: str, __: int) -> AbstractContextManager[Advance]:
    """Do nothing: the default `Progress`."""
    return nullcontext(lambda _: None)


def read_bounded(path: Path) -> bytes:
    """Return the content of a JSON or CSV file. Raises OSError, and ValueError for one too large to be convsim's."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST_TEXT:
            raise ValueError(f"it has {size:,} bytes; expected at most {LARGEST_TEXT:,}")
        return file.read()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError, and ValueError for damage."""
    try:
        return json.loads(read_bounded(path), object_pairs_hook=no_name_twice)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
