"""What torch.compile is to leave alone. Imported where something is being compiled, and only there: it loads dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function as it is, between two compiled graphs."""
    return function(*arguments)
