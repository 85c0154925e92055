"""How many cases: as many as a test run can spare, or CONVSIM_TIMES as many."""

from __future__ import annotations

import os


def cases(usual: int) -> range:
    """The seeds of a test's cases: `usual` of them, times CONVSIM_TIMES on demand."""
    return range(usual * int(os.environ.get("CONVSIM_TIMES", "1")))
