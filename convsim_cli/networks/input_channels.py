"""What a network takes: found by a dry run, since a network may define its layers in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from convsim_cli.kernels import is_convolution
from convsim_cli.machine.eager import as_written
from convsim_cli.measurement.batch_norm import evaluation_mode

USUAL = (3, 1)  # channels of images


def find_input(model: nn.Module, side: Callable[[int], int], channels: int | None = None) -> tuple[int, int]:
    """Return the number of channels that a network takes, and of the axes that follow them (2 for images).

    An input of zeros is tried with 3 channels, with 1, and with those of each convolution; the first convolution that
    runs on it decides. The network stays as it was. side: number of axes → length of each. channels: their number, if
    it is known. A network that takes none of these gets what its first convolution is defined with.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_convolution(layer)]
    axes = [axes for axes, _ in Counter(len(layer.kernel_size) for layer in layers).most_common()]
    usual = [(number, count) for count in axes for number in (USUAL if channels is None else (channels,))]
    own = [(layer.in_channels, len(layer.kernel_size)) for layer in layers if channels is None]
    with _untouched(model), _stopped(layers):
        for number, count in dict.fromkeys(usual + own):
            if _accepts(model, number, (side(count),) * count):
                return number, count
    return own[0] if own else usual[0]


class _Accepted(BaseException):  # no Exception: a network may catch those
    """A convolution has run."""


def _accepts(model: nn.Module, channels: int, sides: tuple[int, ...]) -> bool:
    """Return whether a convolution runs on an input of zeros, before anything fails."""
    parameter = next(model.parameters())
    try:
        model(torch.zeros(1, channels, *sides, device=parameter.device))
    except _Accepted:
        return True
    except Exception:  # whatever a network's own code raises for an input that it does not take
        return False
    return False


@contextmanager
def _stopped(layers: list[nn.Module]) -> Iterator[None]:
    """Let the first of these layers that has run stop the network."""

    def stop(*_: object) -> NoReturn:
        raise _Accepted

    hooks = [layer.register_forward_hook(stop) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode without gradients, and undo what that changes: attributes, buffers, modes."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    attributes += [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), as_written(), evaluation_mode(model):
            yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
