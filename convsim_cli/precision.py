"""Full float32 for the products whose exactness convsim promises, whatever the process has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and reduced-precision float32 products out of the enclosed block.

    The switches are process-wide and are put back on leaving. `device` is where the enclosed products run.
    """
    switches = _switches()
    former = [getattr(owner, name) for owner, name, _ in switches]
    with torch.autocast(device.type, enabled=False):
        try:
            for owner, name, exact in switches:
                setattr(owner, name, exact)
            yield
        finally:
            for (owner, name, _), value in zip(switches, former, strict=True):
                setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch >= 2.9: reading the older switches fails once these have been used
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [
        (backends.cuda.matmul, "allow_tf32", False),
        (backends.cudnn, "allow_tf32", False),
        (_MatmulPrecision, "value", "highest"),
    ]


class _MatmulPrecisionType(type):
    """`torch.set_float32_matmul_precision` as an attribute, as the other switches are (it also governs the CPU)."""

    @property
    def value(cls) -> str:
        return torch.get_float32_matmul_precision()

    @value.setter
    def value(cls, precision: str) -> None:
        torch.set_float32_matmul_precision(precision)


class _MatmulPrecision(metaclass=_MatmulPrecisionType):
    pass
