"""What torch may have active around a call (transforms, fake tensors, compilation), and constants that survive it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

_KEPT = 64  # constants of one kind, the latest


def transformed() -> bool:
    """Return whether a transform of `torch.func` is active: grad, vmap, jvp and those made of them."""
    return torch._C._are_functorch_transforms_active()  # what autograd.Function.apply itself asks


def constant(make: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Keep what `make(like, *rest)` returns for the next call with the same device, dtype and `rest`.

    A tensor made under a mode is useless, or an error, outside of it: what is made while compiling or under a transform
    is not kept, and what is made for a fake tensor is kept for the FakeTensorMode of that tensor alone.
    """
    kept: dict[Hashable, Tensor] = {}

    def get(like: Tensor, /, *rest: P.args, **named: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(like, *rest, **named)
        fake = getattr(like, "fake_mode", None)
        key = (like.device, like.dtype, fake, *rest)
        hidden = transformed() and torch._C._len_torch_dispatch_stack() > 0  # fake tensors inside a transform's
        if key in kept and not hidden:
            return kept[key]
        with fake or nullcontext(), torch.inference_mode(False):
            made = make(like, *rest, **named)
        if (fake or type(made) is Tensor) and not transformed():
            kept[key] = made
            if len(kept) > _KEPT:
                del kept[next(iter(kept))]
        return made

    return get
