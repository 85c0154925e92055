"""Full float32 for the products whose exactness convsim promises, whatever the process has switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch

Switch = tuple[
    Callable[[], Any], Callable[[Any], object], Any
]  # how to read it, how to set it, its value in full float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and reduced-precision float32 products out of the enclosed block.

    The switches are process-wide and are put back on leaving; those that are off already cost a look. `device` is where
    the enclosed products run.
    """
    changed = [(write, value) for read, write, exact in _switches(device.type) if (value := read()) != exact]
    autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    with autocast:
        try:
            if changed:
                for _, write, exact in _switches(device.type):
                    write(exact)
            yield
        finally:
            for write, value in changed:
                write(value)


@cache
def _switches(kind: str) -> list[Switch]:
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch >= 2.9: reading the older switches fails once these have been used
        owners = [backends.mkldnn.matmul, backends.mkldnn.conv]
        if kind != "cpu":
            owners += [backends.cuda.matmul, backends.cudnn.conv]
        return [(*_attribute(owner, "fp32_precision"), "ieee") for owner in owners]
    return [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (*_attribute(backends.cudnn, "allow_tf32"), False),
    ]


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)
