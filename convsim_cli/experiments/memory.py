"""The C library's allocator, told that a training loop will want again what it frees.

glibc gives every block above 32 MiB back to the system as soon as it is freed. A step of CNN1 at batch 512 frees and
takes several of 150 MB, so that the system clears the same pages again and again: a third of a step's time.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next allocation of this process, to its end, and return whether that could be set.

    Only glibc can be told; the process then holds the most that it has needed at once.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))
