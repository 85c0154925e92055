"""The optimizer of a run, and the learning rate of each of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi

import torch
from torch import nn

from convsim_cli.training.arguments import Arguments


def make_optimizer(parameters: Iterable[nn.Parameter], arguments: Arguments) -> torch.optim.Optimizer:
    """Return the optimizer that a run's arguments ask for."""
    lr, decay = arguments.lr, arguments.weight_decay
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True)
    momentum, nesterov = arguments.momentum, arguments.nesterov
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=decay, nesterov=nesterov, fused=True)


def learning_rate(arguments: Arguments, step: int, steps: int) -> float:
    """Return the learning rate of a run's optimizer step, which depends on nothing else.

    step: counted from 0 over the whole run. steps: in an epoch. With W steps of warm-up and T in all, step s takes
    lr·(s + 1)/W for s < W; after that lr, or with the cosine schedule lr·(1 + cos(π(s − W)/(T − W)))/2, the half wave
    of Loshchilov and Hutter (2017), equation 5, once from lr to 0.
    """
    warmup = arguments.warmup * steps
    if step < warmup:
        return arguments.lr * (step + 1) / warmup
    if arguments.schedule == "constant":
        return arguments.lr
    return arguments.lr * (1 + cos(pi * (step - warmup) / (arguments.epochs * steps - warmup))) / 2
