"""How many cases: as many as a test run can spare, or as many as CONVSIM_CASES says."""

from __future__ import annotations

import os


def cases(usual: int) -> range:
    """The seeds of a test's cases: `usual` of them, or CONVSIM_CASES on demand."""
    return range(int(os.environ.get("CONVSIM_CASES", usual)))
