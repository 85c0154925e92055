"""How long work reports its progress.

with progress("minimize", steps) as advance:  # a Progress
    advance(50)                               # an Advance
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int], None]  # takes the number of steps completed since the last call
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # takes a description and the total number of steps


def unreported(_: str, __: int) -> AbstractContextManager[Advance]:
    """Report to nobody: the `Progress` where none is given."""
    return nullcontext(lambda _: None)
