"""Ctrl-C while C++ calls back into Python: an exception there can end the process, or turn into another one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended, and pass it on then: usually as KeyboardInterrupt.

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
