"""Images in memory as uint8, normalized when they are used, and a network's loss and accuracy on them.

No worker processes are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from convsim_cli.device import Advance
from convsim_cli.errors import InputError
from convsim_cli.precision import full_precision

Channels = tuple[float, float, float]
Batches = Iterator[tuple[Tensor, Tensor]]  # images `[B, 3, height, width]`, normalized, and labels `[B]`

BATCH_PIXELS = 1000 * 32 * 32  # of the images that are evaluated at once
CACHED_PIXELS = BATCH_PIXELS // 4  # on a CPU twice as fast: the maps stay in its cache


@dataclass(frozen=True)
class Split:
    """Images `[n, height, width, 3]` as uint8, channels last, with labels `[n]` as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def first(self, count: int | None) -> Split:
        """Return the first `count` images, or all for None. Raises InputError for a count below 1."""
        if count is not None and count < 1:
            raise InputError(f"expected at least one image, got a limit of {count}")
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A dataset, and the mean and standard deviation per channel to normalize by, on a scale from 0 to 1.

    Raises InputError for a mean and deviation that give NaN or Inf in float32.

    class_names: in the order of the labels, where they have names.
    validation: images set apart from the training images (`hold_out`), if any.
    layout: of normalized images in memory.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: Channels
    std: Channels
    class_names: tuple[str, ...] = ()
    validation: Split | None = None
    layout: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        largest = torch.finfo(torch.float32).max
        channels = zip(self.mean, self.std, strict=True)
        if not all(0 < 255 * std < largest and (1 + abs(mean)) / min(std, 1) < largest for mean, std in channels):
            mean, std = (",".join(map(str, values)) for values in (self.mean, self.std))
            raise InputError(
                f"`mean` {mean} and `std` {std}: images normalized by these contain NaN or Inf; expected numbers on a "
                "scale from 0 to 1, those of `std` above 0"
            )

    def images_of_classes(self) -> dict[str, dict[str, int]]:
        """Return the number of training and test images of each class, by its name or number."""
        names = self.class_names or tuple(map(str, range(self.classes)))
        train, test = (split.labels.bincount(minlength=self.classes).tolist() for split in (self.train, self.test))
        return {name: {"train": train[label], "test": test[label]} for label, name in enumerate(names)}

    def limited(self, train: int | None, test: int | None) -> Dataset:
        """Return the dataset with the first images of each split only, all of them for None."""
        return replace(self, train=self.train.first(train), test=self.test.first(test))

    def hold_out(self, count: int | None) -> Dataset:
        """Return the dataset with its last `count` training images set apart for validation, none for None.

        Raises InputError if no training image would be left.
        """
        if count is None:
            return self
        train, left = self.train, len(self.train) - count
        if left < 1:
            raise InputError(f"`validation` {count}: expected fewer than the {len(train)} training images")
        return replace(self, train=train.first(left), validation=Split(train.images[left:], train.labels[left:]))

    def to(self, device: torch.device) -> Dataset:
        validation = self.validation and self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images `[B, height, width, 3]` as float32 `[B, 3, height, width]`, in the dataset's layout."""
        scale, shift = scale_and_shift(self.mean, self.std, images.device)
        normalized = torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)
        return normalized.contiguous(memory_format=self.layout)  # no copy where that is channels_last


@lru_cache(maxsize=8)
def scale_and_shift(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what normalizes uint8 images, cached on the device: creating it for every batch would wait for it."""
    with torch.inference_mode(False):
        mean_, std_ = torch.tensor(mean), torch.tensor(std)
        return (1 / (255 * std_)).to(device), (-mean_ / std_).to(device)


def resize(images: Tensor, side: int | None) -> Tensor:
    """Return images `[B, C, height, width]` of side × side pixels, untouched where that is None or what they have."""
    if side is None or tuple(images.shape[-2:]) == (side, side):
        return images
    return nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def parse_channels(name: str, text: str | None) -> Channels | None:
    """Return the three numbers of the argument `mean` or `std`, None for None.

    Raises InputError unless there are three finite numbers, those of `std` above 0.
    """
    if text is None:
        return None
    try:
        red, green, blue = (float(item) for item in text.replace(",", " ").split())
    except ValueError:
        raise InputError(f"`{name}` {text!r}: expected three numbers, for instance 0.485,0.456,0.406") from None
    if not all(map(math.isfinite, (red, green, blue))):
        raise InputError(f"`{name}` {text!r}: expected finite numbers")
    if name == "std" and min(red, green, blue) <= 0:
        raise InputError(f"`{name}` {text!r}: expected numbers above 0")
    return red, green, blue


def evaluation_totals(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return sums over a split, in evaluation mode, on the device: cross entropy (nats), and correct predictions.

    split: on the CPU or on the device. forward: called in place of the model, such as its compiled form.
    """
    model.eval()
    return _totals(forward or model, _batches(dataset, split, device), device)


def evaluation_batch(split: Split) -> int:
    """Return the largest batch that `evaluation_totals` takes of a split."""
    return math.ceil(len(split) / _number_of_batches(split))


def measure_accuracy(
    model: nn.Module, data: Dataset, device: torch.device, side: int | None, advance: Advance
) -> tuple[float | None, list[str]]:
    """Return a network's accuracy in per cent over the test images, with its stored statistics, and notes about it.

    None, and a note with the reason, if the network's output cannot be compared with labels. side: pixels to resize the
    images to. advance: takes the number of images evaluated since the last call.
    """
    pixels = CACHED_PIXELS if device.type == "cpu" else BATCH_PIXELS

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        advance(len(images))
        return logits

    model.eval()
    with full_precision(device):
        images, _ = next(_batches(data, data.test, device, side, pixels))
        with torch.no_grad():
            output = model(images)
        reason = ""
        if not isinstance(output, Tensor):
            reason = f"the network returns a {type(output).__name__}, not logits [images, {data.classes}]"
        elif output.ndim != 2 or len(output) != len(images):
            shape = list(output.shape)
            reason = f"for {len(images)} images the network returns {shape}, not [{len(images)}, {data.classes}]"
        elif output.shape[1] < data.classes:
            reason = f"{output.shape[1]} outputs for {data.classes} classes"
        if reason:
            return None, [f"no test accuracy: {reason}"]
        correct = _totals(forward, _batches(data, data.test, device, side, pixels), device)[1].item()
    notes = [f"{output.shape[1]} outputs for {data.classes} classes: only the first {data.classes} count"]
    return 100 * correct / len(data.test), notes if output.shape[1] > data.classes else []


def _batches(
    dataset: Dataset, split: Split, device: torch.device, side: int | None = None, pixels: int = BATCH_PIXELS
) -> Batches:
    """A split in batches of nearly equal size: of a small rest, batch statistics would be poor."""
    count = _number_of_batches(split, side, pixels)
    for images, labels in zip(split.images.tensor_split(count), split.labels.tensor_split(count), strict=True):
        yield resize(dataset.normalize(images.to(device)), side), labels.to(device)


def _number_of_batches(split: Split, side: int | None = None, pixels: int = BATCH_PIXELS) -> int:
    height, width = split.images.shape[1:3]
    batch = max(1, pixels // (side * side if side else height * width))
    return max(1, math.ceil(len(split) / batch))


def _totals(forward: Callable[[Tensor], Tensor], batches: Batches, device: torch.device) -> Tensor:
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with torch.no_grad():  # not inference_mode: a network may keep a tensor for its training
        for images, labels in batches:
            logits = forward(images).float()
            totals[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
    return totals
