"""Full float32 for the products whose exactness convsim promises, whatever the process has switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Switch = tuple[
    Callable[[], Any], Callable[[Any], object], Any
]  # how to read it, how to set it, its value in full float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and reduced-precision float32 products out of the enclosed block.

    The switches are process-wide and are put back on leaving. `device` is where the enclosed products run.
    """
    switches = _switches()
    former = [read() for read, _, _ in switches]
    with torch.autocast(device.type, enabled=False):
        try:
            for _, write, exact in switches:
                write(exact)
            yield
        finally:
            for (_, write, _), value in zip(switches, former, strict=True):
                write(value)


def _switches() -> list[Switch]:
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch >= 2.9: reading the older switches fails once these have been used
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        return [(*_attribute(owner, "fp32_precision"), "ieee") for owner in owners]
    return [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (*_attribute(backends.cudnn, "allow_tf32"), False),
    ]


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)
