"""What a checkpoint is measured with: synthetic inputs, a data set or a folder of images.

What a network takes: found by a dry run, since a network may define its layers in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from convsim_cli.batch_norm import evaluation_mode
from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.inputs import datasets
from convsim_cli.inputs.datasets import load_dataset, load_images
from convsim_cli.inputs.images import Channels, Dataset
from convsim_cli.kernels import is_convolution
from convsim_cli.measurement.pairs import THRESHOLD
from convsim_cli.measurement.synthetic import PROBES, SIDE, make_inputs
from convsim_cli.networks.accuracy import resize
from convsim_cli.networks.architectures import usual_side
from convsim_cli.precision import as_written


@dataclass(frozen=True)
class Probe:
    """What to measure with, and what beside the figures.

    input: a synthetic input, or with a network a data set or a folder of images; samples: number of inputs; side:
    pixels along each axis, the usual number for None; data_dir: where data sets are; seed: of synthetic inputs and
    random kernels; mean, std: to normalize images by, the data set's own for None; threshold: mean cosine, in (0, 1],
    above which two filters are duplicates; bn_statistics: see `choose_statistics`; top: how many of the strongest
    filter pairs to list per layer; heat: the order of filters in heat maps, None for no heat maps; channels: of a
    network's synthetic inputs, found by a dry run for None. Raises InputError for a value out of range.
    """

    input: str = "white"
    samples: int = 16
    side: int | None = None
    data_dir: Path = Path("data")
    seed: int = 0
    mean: Channels | None = None
    std: Channels | None = None
    threshold: float = THRESHOLD
    bn_statistics: str = "auto"
    top: int = 0
    heat: str | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("top", 0), ("side", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"`{name}` is {value}; expected at least {least}")
        if not 0 < self.threshold <= 1:
            raise InputError(f"`threshold` is {self.threshold}; expected a cosine above 0, up to 1")
        if self.channels is not None and self.channels < 1:
            raise InputError(f"`input_channels` is {self.channels}; expected at least 1")
        if self.channels not in (None, 3) and self.input not in PROBES:
            raise InputError(f"`input_channels` goes with synthetic inputs: the images of `input` {self.input} have 3")
        if self.input in PROBES and (self.mean, self.std) != (None, None):
            raise InputError(
                f"`mean` and `std` normalize images: `input` {self.input} has none; name a data set or folder"
            )

    def require_synthetic(self) -> None:
        """Raise InputError for what needs a network to run through: images, or inputs of another number of channels."""
        if self.channels is not None:
            raise InputError("`input_channels` requires `arch`: each layer is probed with as many channels as it takes")
        if self.input not in PROBES:
            hint = "needs `arch`: a checkpoint alone is probed layer by layer" if self._is_known() else None
            raise InputError(f"`input` {self.input}: {hint or did_you_mean(self.input, (*PROBES, *datasets.NAMES))}")

    def dataset(self, arch: str) -> Dataset | None:
        """Return the labeled images to take, or None for synthetic ones and a folder of images. Raises InputError."""
        if self.input in PROBES:
            return None
        if not self._is_known():
            hint = did_you_mean(self.input, (*PROBES, *datasets.NAMES))
            raise InputError(f"`input` {self.input!r}: {hint}, or a folder")
        if not self.is_labeled:
            return None
        return load_dataset(
            self.input, self.data_dir, self.side or usual_side(arch), self.mean, self.std, test_only=True
        )

    def images(self, model: nn.Module, arch: str, data: Dataset | None) -> Tensor:
        """Return the inputs `[samples, C, …]` of a network. data: the data set of `dataset`."""
        if data is not None:
            return resize(data.normalize(data.test.images[: self.samples]), self.side)
        if self.input not in PROBES:
            return load_images(Path(self.input), self.samples, self._side(arch, 2), self.mean, self.std)
        channels, axes = find_input(model, lambda axes: self._side(arch, axes), self.channels)
        return make_inputs(self.input, self.samples, channels, (self._side(arch, axes),) * axes, self.seed)

    def _side(self, arch: str, axes: int) -> int:
        return self.side or (usual_side(arch) if axes == 2 else SIDE[axes])

    @property
    def is_labeled(self) -> bool:
        """Whether the inputs are the images of a data set, with labels."""
        return self.input in datasets.NAMES or self.input.startswith("folder:")

    def _is_known(self) -> bool:
        return self.is_labeled or Path(self.input).is_dir()


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
