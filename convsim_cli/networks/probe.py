"""What a checkpoint is measured with: synthetic inputs, a data set or a folder of images.

What inputs a network takes is found by a dry run, since a network may define its layers in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from convsim_cli.errors import ConvsimError, InputError, did_you_mean
from convsim_cli.inputs import datasets
from convsim_cli.inputs.datasets import load_dataset, load_images
from convsim_cli.inputs.images import Channels, Dataset, resize
from convsim_cli.kernels import is_convolution
from convsim_cli.layers import side_effect_free
from convsim_cli.measurement.pairs import THRESHOLD
from convsim_cli.measurement.synthetic import FEATURES, LAYER_PROBES, PROBES, SIDE, make_inputs
from convsim_cli.networks.architectures import usual_side

USUAL = (3, 1)  # channels of images


@dataclass(frozen=True)
class Probe:
    """What to measure with, and what beside the figures.

    input: a synthetic input, or with a network a data set or a folder of images; samples: number of inputs; side:
    pixels along each axis, the usual number for None; data_dir: where data sets are; seed: of synthetic inputs and
    random kernels; mean, std: to normalize images by, the data set's own for None; threshold: mean cosine, in (0, 1],
    above which two filters are duplicates; bn_statistics: see `choose_statistics`; top: how many of the strongest
    filter pairs to list per layer; heat: whether to make heat maps; channels: of a network's synthetic inputs, found by
    a dry run for None. Raises InputError for a value out of range.
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
    heat: bool = False
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
        if self.channels not in (None, 3) and self.input not in LAYER_PROBES:
            raise InputError(f"`input_channels` goes with synthetic inputs: the images of `input` {self.input} have 3")
        if self.input in LAYER_PROBES and (self.mean, self.std) != (None, None):
            raise InputError(
                f"`mean` and `std` normalize images: `input` {self.input} has none; name a data set or folder"
            )

    def require_synthetic(self) -> None:
        """Raise InputError for what needs a network to run through: images, or inputs of another number of channels."""
        if self.channels is not None:
            raise InputError("`input_channels` requires `arch`: each layer is probed with as many channels as it takes")
        if self.input not in LAYER_PROBES:
            hint = "needs `arch`: a checkpoint alone is probed layer by layer" if self._is_known() else None
            known = (*LAYER_PROBES, *datasets.NAMES)
            raise InputError(f"`input` {self.input}: {hint or did_you_mean(self.input, known)}")

    def load(self, model: nn.Module, arch: str, training: bool = False) -> tuple[Tensor, Dataset | None]:
        """Return the inputs `[samples, C, …]` of a network, and the data set that they are from where they have labels.

        training: take the first training images of a data set, in place of its test images. Raises InputError.
        """
        if self.input in PROBES:
            channels, axes = find_input(model, lambda axes: self._side(arch, axes), self.channels)
            space = (self._side(arch, axes),) * axes
            return make_inputs(self.input, self.samples, channels, space, self.seed), None
        if self.input == FEATURES:
            raise InputError(
                f"`input` {FEATURES} stands in for what a layer of a file alone sees; with `arch` the network's own "
                "layers see it: name white, natural, a data set or a folder"
            )
        if not self._is_known():
            hint = did_you_mean(self.input, (*PROBES, *datasets.NAMES))
            raise InputError(f"`input` {self.input!r}: {hint}, or a folder")
        side = self._side(arch, 2)
        if not self.is_labeled:
            return load_images(Path(self.input), self.samples, side, self.mean, self.std), None
        data = load_dataset(self.input, self.data_dir, side, self.mean, self.std, test_only=not training)
        split = data.train if training else data.test
        return resize(data.normalize(split.images[: self.samples]), self.side), data

    def _side(self, arch: str, axes: int) -> int:
        return self.side or (usual_side(arch) if axes == 2 else SIDE[axes])

    @property
    def is_labeled(self) -> bool:
        """Whether the inputs are the images of a data set, with labels."""
        return self.input in datasets.NAMES or self.input.startswith("folder:")

    def _is_known(self) -> bool:
        return self.is_labeled or Path(self.input).is_dir()


@contextmanager
def running_on(shape: Sequence[int], arch: str, advice: str) -> Iterator[None]:
    """Raise InputError where the code of a network raises in the block: it does not run on inputs of this shape."""
    try:
        yield
    except ConvsimError:
        raise
    except Exception as error:  # whatever a network's own code raises
        raise InputError(
            f"`arch` {arch}: does not run on inputs {list(shape)} "
            f"({' '.join(str(error).split())[:160] or type(error).__name__}); {advice}"
        ) from error


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
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    try:
        with side_effect_free(model), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(_stop))
            for number, count in dict.fromkeys(usual + own):
                if _accepts(model, number, (side(count),) * count):
                    return number, count
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
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


def _stop(*_: object) -> NoReturn:
    raise _Accepted
