"""CUDA without a GPU: fake tensors on it, and a count of what would be launched and waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convsim_cli.inputs.images import scale_and_shift
from convsim_cli.kernels.modules import graph_leaves
from convsim_cli.networks.architectures import build_network

CUDA = torch.device("cuda")
_FREE = ("empty", "scalar_tensor", "lift_fresh", "detach", "_unsafe_view", "alias")  # launch nothing, as views do


class Trace(TorchDispatchMode):
    """What runs on CUDA while this mode is active, by the name of the operator.

    launches: operators that work there; some are several kernels, views are none; `_foreach_` ones are one for all only
    where layouts and types are the same. waits: reading a value, and copies
    to the CPU. A value that is read is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        on_cuda = any(_on(leaf, "cuda") for leaf in tree_leaves((args, kwargs)))
        if name == "_local_scalar_dense":
            self.waits[name] += on_cuda
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        result = None if name == "_fused_sgd_" else func(*args, **kwargs)  # it has no form for fake tensors
        outputs = tree_leaves(result)
        if namespace in ("prim", "profiler") or func.is_view or name.startswith(_FREE):
            return result
        if on_cuda and any(_on(leaf, "cpu") for leaf in outputs):
            self.waits[name] += 1
        elif on_cuda or any(_on(leaf, "cuda") for leaf in outputs):
            self.launches[name] += _launches_of_foreach(args) if name.startswith("_foreach_") else 1
        return result


def needs_a_driver() -> bool:
    """Whether this torch asks the CUDA driver even for fake tensors, as 2.6 with CUDA does and 2.14 does not."""
    if torch.__version__ >= TorchVersion("2.10"):
        return False
    try:
        with FakeTensorMode():
            torch.empty(2, 3, device=CUDA).mT.contiguous()
    except RuntimeError:
        return True
    return False


def _launches_of_foreach(args: tuple[Any, ...]) -> int:
    """One for all tensors together, or one each where those of one position differ in layout or type."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    for together in zip(*lists, strict=True):
        strides = [[step for step, size in zip(one.stride(), one.shape, strict=True) if size > 1] for one in together]
        if any(one.dtype != lists[0][0].dtype for one in together) or strides[1:] != strides[:-1]:
            return len(lists[0])
    return 1


def _on(value: object, kind: str) -> bool:
    return isinstance(value, Tensor) and value.device.type == kind


def real_network(name: str) -> nn.Module:
    """Build a network that `to(CUDA)` makes fake: modules of fake tensors cannot be moved."""
    with unset_fake_temporarily():
        return build_network(name)


def _backward(loss: Tensor) -> None:
    """Give every parameter a gradient: the real engine, which is torch's own work alone, looks for a driver."""
    for parameter in graph_leaves(loss):
        parameter.grad = torch.zeros_like(parameter)


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every tensor fake, and CUDA there; skips where this build of torch has no fake tensors on CUDA."""
    patch.setenv("CONVSIM_CUDA_GRAPHS", "0")
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(Tensor, "backward", _backward)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    patch.setattr(torch.cuda, "get_rng_state", lambda *_: None)  # kept by the host: no launch, no wait
    patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    scale_and_shift.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # so that a module can be moved to the device
            try:
                torch.empty(1, device=CUDA)
            except (AssertionError, RuntimeError) as error:
                pytest.skip(f"no fake tensors on CUDA: {error}")
            yield
    finally:
        scale_and_shift.cache_clear()
