"""Full float32 for the products whose exactness convsim promises, whatever the process has switched on.

torch ≥ 2.9 has two sets of switches. The new ones are a precision per backend and operator; "none" inherits that of
the backend, and then the generic one. The old ones are `set_float32_matmul_precision` and `cudnn.allow_tf32`; their
setters write to both sets, and their getters raise where the two disagree. Inside `full_precision` both sets say full
float32, so that code which reads or writes either of them works there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Restore = tuple[Callable[[Any], object], Any]  # a setter, and what it is to set
Key = tuple[str, str]  # backend and operator of a new switch

_HAS_NEW = hasattr(torch._C, "_get_fp32_precision_getter")  # the public attributes cannot write to all of the switches
_FULL = ("none", "ieee")
_LOOKED_AT: tuple[Key, ...] = (("mkldnn", "matmul"), ("mkldnn", "conv"), ("cuda", "matmul"))
_ON_CPU: tuple[Key, ...] = (("generic", "all"), ("mkldnn", "all"), ("cuda", "all"), *_LOOKED_AT)  # parents first
_ELSEWHERE: tuple[Key, ...] = (*_ON_CPU, ("cuda", "conv"), ("cuda", "rnn"))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and reduced-precision float32 products out of the enclosed block.

    device: where the enclosed products run. The switches are process-wide and are restored on leaving. On the CPU,
    switches that are off already cost 2 µs to look at.
    """
    if device.type == "meta":  # nothing is computed
        yield
        return
    restore = _switch_off(device.type)
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        for write, value in restore:
            write(value)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Allow TF32 in the enclosed products and convolutions on CUDA, and keep everything else as `full_precision` does.

    On other devices the numbers are those of `full_precision`. A `full_precision` inside counts.
    """
    with full_precision(device):
        if device.type != "cuda":
            yield
            return
        torch.set_float32_matmul_precision("high")
        _allow_tf32_in_cudnn(True)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
            _allow_tf32_in_cudnn(False)


def _switch_off(kind: str) -> list[Restore]:
    """Switch off what lowers the precision on that kind of device, and return how to undo it, in order."""
    if not _HAS_NEW:
        return _switch_off_old(kind != "cpu" and torch.backends.cudnn.allow_tf32)
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    if kind == "cpu" and all(read(*key) in _FULL for key in _LOOKED_AT):
        return []
    cudnn = kind != "cpu" and _cudnn_allows_tf32()
    new: list[Restore] = []
    for key in _ON_CPU if kind == "cpu" else _ELSEWHERE:
        own = read(*key)  # not inherited: all that it inherits from is "none" by now
        new.append((partial(write, *key), own))
        if own != "none":
            write(*key, "none")
    if cudnn is None:  # with every new switch off, the getter still raises if the old one is on
        cudnn = _cudnn_allows_tf32() is None
    return _switch_off_old(cudnn) + new  # the old setters write to new switches, and so come first


def _switch_off_old(cudnn: bool) -> list[Restore]:
    old: list[Restore] = []
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        torch.set_float32_matmul_precision("highest")
        old.append((torch.set_float32_matmul_precision, precision))
    if cudnn:
        _allow_tf32_in_cudnn(False)
        old.append((_allow_tf32_in_cudnn, True))
    return old


def _cudnn_allows_tf32() -> bool | None:
    """Read the old switch of cuDNN: None where the new ones contradict it, which makes its getter raise."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _allow_tf32_in_cudnn(allow: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allow
