"""What each training mode does to the network before training."""

from __future__ import annotations

import torch
from torch import nn

from convsim_cli.kernels import module_kernels, weight_of
from convsim_cli.machine.progress import Advance
from convsim_cli.minimize import Minimization, minimize_kernel, rescale_to
from convsim_cli.training.arguments import Arguments


def prepare_(model: nn.Module, arguments: Arguments, advance: Advance | None = None) -> None:
    """Do to a fresh network, in place, what its mode does before training.

    init: Algorithm 1. rescale: each filter scaled to the norm that Algorithm 1 would give it, and nothing else. init
    with preserve_norm and rescale: the norm-preserved directions at those same norms.
    """
    if arguments.mode not in ("init", "rescale"):
        return
    raw, held = (
        Minimization(arguments.iterations, arguments.init_lr, preserve_norm=preserve) for preserve in (False, True)
    )
    selection = module_kernels(model)
    direction = held.select(selection).kernels if arguments.preserve_norm else []
    with torch.no_grad():
        for kernel in selection.kernels:
            weight = weight_of(model, kernel)
            result = weight.detach().clone()
            if kernel in direction:
                result, _ = minimize_kernel(kernel, result, held, advance)
            if not arguments.preserve_norm or arguments.rescale:
                shrunk, _ = minimize_kernel(kernel, weight, raw, advance)
                result = (
                    rescale_to(kernel, result, shrunk) if arguments.mode == "rescale" or arguments.rescale else shrunk
                )
            weight.copy_(result)


def preparation_steps(model: nn.Module, arguments: Arguments) -> int:
    """Return how many steps `prepare_` will report to `advance`."""
    if arguments.mode not in ("init", "rescale"):
        return 0
    raw, held = (Minimization(arguments.iterations, preserve_norm=preserve) for preserve in (False, True))
    selection = module_kernels(model)
    directions = held.steps(held.select(selection).kernels) if arguments.preserve_norm else 0
    return directions + (raw.steps(selection.kernels) if not arguments.preserve_norm or arguments.rescale else 0)
