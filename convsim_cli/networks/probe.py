"""What a checkpoint is measured with: synthetic inputs, a data set or a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.inputs import datasets
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.image_folders import load_images
from convsim_cli.inputs.images import Channels, Dataset
from convsim_cli.measurement.mean_cosines import THRESHOLD
from convsim_cli.measurement.synthetic_inputs import PROBES, SIDE, make_inputs
from convsim_cli.networks.accuracy import resize
from convsim_cli.networks.input_channels import find_input
from convsim_cli.networks.names import usual_side


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
