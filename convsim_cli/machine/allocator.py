"""The C library's allocator, told what a training loop and what a large checkpoint need of it.

glibc gives every block above 32 MiB back to the system as soon as it is freed, and keeps the others. A step of CNN1 at
batch 512 frees and takes several of 150 MB, so that the system clears the same pages again and again: a third of a
step's time. `init`, on the other hand, takes a few blocks for each layer and is then done with them: those that were
kept would be beside those of the next layer, of another size.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_LARGE = 1 << 20  # bytes


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next allocation of this process, to its end, and return whether that could be set.

    Only glibc can be told; the process then holds the most that it has needed at once.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> bool:
    """Give every block of a megabyte or more back to the system once it is freed, and return whether that could be set.

    Only glibc can be told.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_MMAP_THRESHOLD, _LARGE))


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
