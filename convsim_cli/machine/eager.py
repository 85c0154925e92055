"""Run what torch.compile has compiled as it was written: compiled code does not call hooks that were added later."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def as_written() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run eagerly, so that their hooks are called.

    A no-op where torch.compile has not been loaded: loading it takes seconds.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
