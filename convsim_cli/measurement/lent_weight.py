"""Run a layer once more with another weight, whatever its class does around the convolution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

_TENSORS = ("weight", "bias")


def convolve_with(layer: nn.Module, weight: Tensor, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Return what a convolution gives for another weight and no bias, under its own padding, stride and so on.

    weight: of the shape of the layer's. inputs, options: what its `forward` is called with. Hooks are not called.
    """
    with _lent(layer, weight):
        maps: Tensor = layer.forward(*inputs, **options)
    return maps


@contextmanager
def _lent(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Give a layer a plain weight and no bias; on leaving it has its own parameters and parametrizations back."""
    kind, state = type(layer), vars(layer)
    parameters, attributes = dict(layer._parameters), {name: state[name] for name in _TENSORS if name in state}
    try:
        if parametrize.is_parametrized(layer):
            layer.__class__ = kind.__mro__[1]  # its properties compute the weight, whatever the instance holds
        for name in _TENSORS:
            layer._parameters.pop(name, None)
        state.update(weight=weight, bias=None)
        yield
    finally:
        layer.__class__ = kind
        for name in _TENSORS:
            state.pop(name, None)
        state.update(attributes)
        layer._parameters.clear()
        layer._parameters.update(parameters)
