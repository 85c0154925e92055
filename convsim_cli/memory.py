"""The C library's allocator, told what a training loop and what a large checkpoint need of it.

glibc gives every block above 32 MiB back to the system as soon as it is freed, and keeps the others. A step of CNN1 at
batch 512 frees and takes several of 150 MB, so that the system clears the same pages again and again: a third of a
step's time. `init`, on the other hand, is done with a layer's blocks for good, and the next layer's need not fit into
the holes.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next allocation of this process, to its end, and return whether that could be set.

    Only glibc can be told; the process then holds the most that it has needed at once.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give what has been freed back to the system now. Only glibc can be told."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
